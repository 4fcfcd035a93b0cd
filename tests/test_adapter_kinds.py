"""A kind of adapter is one class: LoHa and MiSS against PEFT, and a kind of one's own (`examples/custom_adapter.py`)."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from oracles import IDS, make_torch_model, our_logits, torch_logits
from rich.console import Console
from safetensors.numpy import load_file
from trees import perturbed

import jlora
from jlora import LoraConfig
from jlora.cli.inspect import adapter_table
from jlora.lora import LohaWeight, LowRankWeight, MissWeight, adapted_leaves, adapted_modules
from jlora.lora.kinds import KINDS, AdaptedWeight, frozen, kind, trained
from jlora.runs.display import trained_table

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
ROOT = Path(__file__).parent.parent
THEIRS = {
    "loha": (
        peft.LoHaConfig,
        {"r": 4, "alpha": 6, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 2}, "init_weights": False},
    ),
    # 48 inputs are not whole pieces of 7.
    "miss": (peft.MissConfig, {"r": 7, "init_weights": False}),
}
CLASSES = {"loha": LohaWeight, "miss": MissWeight}


@pytest.fixture(scope="module")
def llama(checkpoints):
    return jlora.load(checkpoints["llama"][0], dtype=jnp.float32)


def theirs_of(name, **fields):
    torch.manual_seed(3)
    cls, own = THEIRS[name]
    config = cls(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **(own | fields))
    return peft.get_peft_model(make_torch_model("llama"), config).eval()


def rendered(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# LoHa and MiSS beside PEFT's


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_files_go_both_ways(llama, name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "peft")
    expected = torch_logits(theirs)
    model, params = llama
    assert np.abs(expected - our_logits(model, params)).max() > 1e-2, "the adapter must show"
    config = LoraConfig.load(tmp_path / "peft")
    assert config.kind == name
    for form, tree in {"layers": params, "stacked": jlora.stack_layers(params)}.items():
        adapted = jlora.load_adapter(tmp_path / "peft", tree)
        assert {type(w) for w in adapted_leaves(adapted).values()} == {CLASSES[name]}
        np.testing.assert_allclose(our_logits(model, adapted), expected, atol=1e-4)
        jlora.save_adapter(tmp_path / form, adapted, config=config, base_model="b")
        files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", form)]
        assert files[0].keys() == files[1].keys()
        assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])
        back = peft.PeftModel.from_pretrained(make_torch_model("llama"), tmp_path / form).eval()
        np.testing.assert_allclose(torch_logits(back), expected, atol=1e-4)
    fields = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("peft", "layers")]
    computed = {peft_name for peft_name, _ in CLASSES[name].PEFT.fields.values()} | {"peft_type"}
    assert all(fields[0][field] == fields[1][field] for field in computed)
    assert LoraConfig.load(tmp_path / "layers") == config
    assert "norm of" in rendered(adapter_table(str(tmp_path / "layers")))


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_gradients_are_pefts(llama, name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor(IDS)
    theirs(ids, labels=ids).loss.backward()
    expected = {n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}

    model, params = llama
    adapter, base = jlora.split(jlora.load_adapter(tmp_path, params))
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    loss_fn = jlora.train.causal_lm_loss(model)

    def mean(adapter):
        total, tokens = loss_fn(jlora.combine(adapter, base), batch, None)
        return total / tokens

    found = 0
    for module, weight in adapted_modules(jax.jit(jax.grad(mean))(adapter)).items():
        for child, (suffix, transposed) in weight.PEFT.tensors.items():
            ours, other = np.asarray(getattr(weight, child)), expected[f"base_model.model.{module}{suffix}"]
            np.testing.assert_allclose(ours.T if transposed else ours, other, atol=2e-5 + 1e-3 * np.abs(other).max())
            found += 1
    assert found == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_the_tree_invariants(llama, name):
    model, params = llama
    config = LoraConfig(kind=name, rank=5, targets=["q_proj", "down_proj"])
    start = jlora.add_lora(params, config, key=KEY)
    assert np.array_equal(our_logits(model, start), our_logits(model, params))
    tree = perturbed(start)
    expected = our_logits(model, tree)
    assert np.abs(expected - our_logits(model, params)).max() > 1e-2
    adapter, base = jlora.split(tree)
    both = jlora.combine(adapter, base)
    assert jax.tree.structure(both) == jax.tree.structure(tree)
    assert jlora.count(adapter) + jlora.count(base) == jlora.count(tree)
    np.testing.assert_allclose(our_logits(model, jlora.merge(tree)), expected, atol=1e-4)
    np.testing.assert_allclose(our_logits(model, jlora.stack_layers(tree)), expected, atol=1e-4)
    direct = jlora.add_lora(jlora.stack_layers(params), config, key=KEY)
    assert jax.tree.structure(direct) == jax.tree.structure(jlora.stack_layers(start))
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(jlora.stack_layers(start)), strict=True):
        assert np.array_equal(a, b)
    small = jlora.cast(tree, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(jlora.split(small)[0])} == {jnp.dtype("float32")}
    assert "whole" not in rendered(trained_table(tree)) and " 5 " in rendered(trained_table(tree))
    # Side by side with another kind: both are low-rank updates.
    plain = perturbed(jlora.add_lora(params, LoraConfig(rank=2, targets=["q_proj"]), key=KEY))
    routed = jlora.stack_adapters({"one": tree, "other": plain})
    np.testing.assert_allclose(our_logits(model, jlora.route(routed, "one")), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_on_a_packed_base(llama, name):
    """The adapter of an NF4 base is that of its dequantized base, and no dense kernel is kept for the backward pass."""
    model, params = llama
    packed = jlora.quantize_params(params, jlora.NF4(block_size=32), targets=["q_proj", "down_proj"])
    config = LoraConfig(kind=name, rank=4, targets=["q_proj", "down_proj"])
    tree = perturbed(jlora.add_lora(packed, config, key=KEY))
    dense = perturbed(jlora.add_lora(jlora.merge(packed), config, key=KEY))
    np.testing.assert_allclose(our_logits(model, tree), our_logits(model, dense), atol=1e-4)
    np.testing.assert_allclose(our_logits(model, jlora.merge(tree)), our_logits(model, dense), atol=1e-4)
    weight = next(iter(adapted_modules(tree).values()))
    x = jnp.ones((3, weight.shape[0]))
    adapter, base = weight.adapter_half(), weight.base_half()
    _, back = jax.vjp(lambda a: jlora.linear(x, base.joined(a)), adapter)
    assert weight.shape not in {leaf.shape for leaf in jax.tree.leaves(back)}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("transpose", [False, True])
def test_wrapped(name, transpose):
    """A function that knows nothing of it, dropout included, gives what `linear` gives."""
    params = {"w": jax.random.normal(KEY, (12, 20))}
    config = LoraConfig(kind=name, rank=5, targets=["w"], dropout=0.3)
    tree = jlora.with_dropout(perturbed(jlora.add_lora(params, config, key=KEY)), KEY)
    x = jax.random.normal(KEY, (6, 20 if transpose else 12))
    fn = jlora.wrap(lambda p, x: x @ (p["w"].T if transpose else p["w"]))
    expected = jlora.linear(x, tree["w"], transpose=transpose)
    np.testing.assert_allclose(fn(tree, x), expected, atol=1e-4)
    assert fn.check(tree, x).ok and fn.check(jax.eval_shape(lambda t: t, tree), x).ok
    assert (
        np.abs(expected - jlora.linear(x, dataclasses.replace(tree["w"], key=None), transpose=transpose)).max() > 1e-2
    )


def test_lohas_dropout_is_of_outputs(llama):
    """PEFT's `rank_dropout`: outputs of the update are dropped, and the others grow by the share that is kept."""
    weight = perturbed(
        jlora.add_lora({"w": jnp.zeros((8, 400))}, LoraConfig(kind="loha", dropout=0.4, targets=["w"]), key=KEY)
    )
    x = jnp.ones((2, 8))
    plain = jlora.linear(x, weight["w"])
    ratio = np.asarray(jlora.linear(x, jlora.with_dropout(weight, KEY)["w"]) / plain)
    np.testing.assert_allclose(ratio.mean(axis=1), 1.0, atol=1e-4)
    assert (ratio == 0).mean() == pytest.approx(0.4, abs=0.08) and (ratio[0] == ratio[1]).all()
    raw = jlora.with_dropout(weight, jax.random.PRNGKey(0))["w"]
    assert (jlora.linear(x, raw) == jlora.linear(x, jlora.with_dropout(weight, jax.random.key(0))["w"])).all()


@pytest.mark.parametrize("name", THEIRS)
def test_a_gpt2_is_saved_and_read_back(checkpoints, name, tmp_path):
    """PEFT has these kinds for linear layers alone, and says so of such a file; jlora reads it."""
    model, params = jlora.load(checkpoints["gpt2"][0], dtype=jnp.float32)
    config = LoraConfig(kind=name, rank=3, targets=["c_attn"])
    tree = perturbed(jlora.add_lora(params, config, key=KEY))
    jlora.save_adapter(tmp_path, tree, config=config, base_model="b")
    assert np.array_equal(our_logits(model, jlora.load_adapter(tmp_path, params)), our_logits(model, tree))
    with pytest.raises((TypeError, ValueError), match=r"Conv1D|not supported"):
        peft.PeftModel.from_pretrained(make_torch_model("gpt2"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lokr"}, r"`kind` must be one of .*'loha', 'lora', 'miss'.*; got 'lokr'"),
        ({"kind": "loha", "use_dora": True}, "`use_dora` means nothing to kind 'loha'"),
        ({"kind": "miss", "alpha": 4.0}, "`alpha` means nothing to kind 'miss'; got 4.0"),
        ({"kind": "miss", "rank_pattern": {"q_proj": 2}}, "`rank_pattern` means nothing to kind 'miss'"),
        ({"kind": "loha", "bias": "all"}, "`bias` means nothing to kind 'loha'"),
    ],
    ids=str,
)
def test_what_a_kind_does_not_read_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize("fields", [{"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 4}], ids=str)
def test_variants_that_are_not_represented_are_refused(fields, tmp_path):
    theirs = theirs_of("miss", r=8, **fields)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_weights = '{fields['init_weights']}'"):
        LoraConfig.load(tmp_path)


def test_what_changes_training_alone_is_said(tmp_path):
    theirs_of("loha", module_dropout=0.2, rank_dropout=0.1).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"module_dropout = 0\.2, which changes how PEFT trains"):
        assert LoraConfig.load(tmp_path).dropout == 0.1


@pytest.mark.parametrize("name", THEIRS)
def test_an_embedding_is_refused_by_name(llama, name):
    with pytest.raises(ValueError, match=f"`kind` '{name}' adapts kernels.*embed_tokens.*an embedding"):
        jlora.add_lora(llama[1], LoraConfig(kind=name, targets=["embed_tokens"]), key=KEY)


def test_a_config_of_another_kind_is_not_written(llama, tmp_path):
    tree = jlora.add_lora(llama[1], LoraConfig(kind="loha", rank=2, targets=["q_proj"]), key=KEY)
    with pytest.raises(ValueError, match="a LohaWeight; the config says kind='lora'"):
        jlora.save_adapter(tmp_path, tree, config=LoraConfig(rank=2, targets=["q_proj"]), base_model="b")


# A kind of one's own


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    path = ROOT / "examples" / "custom_adapter.py"
    spec = importlib.util.spec_from_file_location("custom_adapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = tmp_path_factory.mktemp("custom")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        model, params = module.train(directory)
    yield path, directory, model, params
    del KINDS["hadamard"]


@pytest.mark.slow
def test_the_example(example):
    path, directory, model, params = example
    assert len(path.read_text().splitlines()) <= 60
    expected = our_logits(model, params)
    adapter, base = jlora.split(params)
    fresh = jlora.remove_lora(params)
    assert np.abs(our_logits(model, fresh) - expected).max() > 0.5, "it trains"
    np.testing.assert_allclose(our_logits(model, jlora.merge(params)), expected, atol=1e-4)
    np.testing.assert_allclose(our_logits(model, jlora.stack_layers(params)), expected, atol=1e-4)

    def dropped(tree, key):
        return our_logits(model, jlora.with_dropout(tree, key))

    other = jax.random.key(9)
    assert np.abs(dropped(params, KEY) - dropped(params, other)).max() > 1e-2
    np.testing.assert_allclose(dropped(jlora.stack_layers(params), KEY), dropped(params, KEY), atol=1e-4)

    weight = adapted_modules(params)["model.layers.0.self_attn.q_proj"]
    x = jax.random.normal(KEY, (5, weight.shape[0]))
    fn = jlora.wrap(lambda w, x: x @ w)
    np.testing.assert_allclose(fn(weight, x), jlora.linear(x, weight), atol=1e-4)
    assert fn.check(weight, x).totals()["factored"] == 1
    sizes = [2 * 4 * sum(w.shape) for w in adapted_modules(params).values()]
    assert jlora.count(adapter) == sum(sizes) and jlora.count(params) == sum(sizes) + jlora.count(base)
    assert "norm of a2" not in rendered(adapter_table(str(directory)))  # the file is LoHa's, and jlora has LoHa
    assert "down_proj" in rendered(trained_table(params))

    torch_model = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "examples/assets/tiny-llama", dtype="float32"
    )
    theirs = peft.PeftModel.from_pretrained(torch_model, directory).eval()
    np.testing.assert_allclose(torch_logits(theirs), expected, atol=1e-4)
    again = jlora.load_adapter(directory, fresh)
    assert {type(w) for w in adapted_leaves(again).values()} == {LohaWeight}
    np.testing.assert_allclose(our_logits(model, again), expected, atol=1e-4)


@pytest.fixture
def own_kind():
    """A kind that jlora's own do not resemble: a trained scale of every output, no update of low rank, no file format."""

    @kind
    class Scaled(AdaptedWeight):
        NAME = "scaled"
        base: jax.Array = frozen()
        gain: jax.Array = trained()
        extra: jax.Array | None = trained(default=None)
        dropout: float = 0.0

        @property
        def lead(self):
            return self.gain

        @classmethod
        def draw(cls, key, d_in, d_out, rank):
            return {"gain": jnp.ones((1, d_out))}

        def matmul(self, x, *, transpose, out_dtype):
            x = x * self.gain[0] if transpose else x
            y = jlora.linear(x, self.base, transpose=transpose, out_dtype=out_dtype)
            return y if transpose else y * self.gain[0].astype(out_dtype)

        def take(self, ids):
            return jlora.embed(ids, self.base) * self.gain[0]

        def dense(self, dtype=None):
            return (jlora.weight.as_dense(self.base, jnp.float32) * self.gain).astype(dtype or self.dtype)

    yield Scaled
    del KINDS["scaled"]


@pytest.mark.slow
def test_a_kind_says_what_it_cannot(llama, own_kind, tmp_path):
    model, params = llama
    config = LoraConfig(kind=own_kind, targets=["q_proj"])
    tree = perturbed(jlora.add_lora(params, config, key=KEY))
    expected = our_logits(model, tree)
    np.testing.assert_allclose(our_logits(model, jlora.merge(tree)), expected, atol=1e-4)
    np.testing.assert_allclose(our_logits(model, jlora.stack_layers(tree)), expected, atol=1e-4)
    adapter, base = jlora.split(tree)
    assert adapted_modules(jlora.combine(adapter, base)).keys() == adapted_modules(tree).keys()
    with pytest.raises(ValueError, match=r"cannot hold 'model/layers/0.*PEFT's files do not hold a Scaled"):
        jlora.save_adapter(tmp_path / "a", tree, config=config, base_model="b")
    with pytest.raises(
        ValueError, match=r"hold low-rank updates; 'model\.layers\.0.*' is a Scaled, which does not say"
    ):
        jlora.save_mlx_adapter(tmp_path / "a", tree, config=config, model=model)
    assert not (tmp_path / "a").exists()
    weight = adapted_modules(tree)["model.layers.0.self_attn.q_proj"]
    with pytest.raises(
        TypeError, match="does not know how a Scaled is used, the weight at 'w': it does not say what it is"
    ):
        jlora.wrap(lambda w, x: x @ w)(weight, jnp.ones((2, weight.shape[0])))
    with pytest.raises(ValueError, match="The adapter 'a' has a Scaled, which does not say"):
        jlora.stack_adapters({"a": tree})
    dropping = jlora.add_lora(params, dataclasses.replace(config, dropout=0.5), key=KEY)
    with pytest.raises(TypeError, match="A Scaled with `dropout` 0.5 needs a place for its key"):
        jlora.with_dropout(dropping, KEY)


def test_several_adapters_are_not_written_as_one(llama, tmp_path):
    model, params = llama
    config = LoraConfig(rank=2, targets=["q_proj"])
    routed = jlora.stack_adapters({"a": jlora.add_lora(params, config, key=KEY)})
    with pytest.raises(ValueError, match=r"holds several side by side. Save each tree of `unstack_adapters\(params\)`"):
        jlora.save_adapter(tmp_path / "a", routed, config=config, base_model="b")
    assert issubclass(LohaWeight, LowRankWeight)
