"""Several adapters of one base: files, the choice of each row, and what a choice costs; against PEFT's mixed batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from oracles import IDS, make_torch_model
from trees import perturbed, same_bits

import jlora
from jlora import LoraConfig, RoutedWeight
from jlora.lora import adapted_modules
from jlora.tree.paths import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = {
    "default": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "pirate": {"r": 2, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {r".*\.0\..*": 6}},
    "poet": {"r": 3, "lora_alpha": 9, "layers_to_transform": [1]},
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"], "qwen2": ["v_proj", "gate_proj"]}
ROWS = ["poet", "default", None, "pirate", "default"]


def batch(rows=5):
    return np.random.default_rng(4).integers(0, 97, (rows, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def peft_models():
    """family -> PEFT model with the three adapters, each trained a little."""
    cache = {}

    def get(family):
        if family not in cache:
            torch.manual_seed(2)
            model = None
            for name, fields in KINDS.items():
                config = peft.LoraConfig(**({"task_type": "CAUSAL_LM", "target_modules": TARGETS[family]} | fields))
                if model is None:
                    model = peft.get_peft_model(make_torch_model(family), config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            cache[family] = model.eval()
        return cache[family]

    return get


def theirs(model, ids, names):
    with torch.no_grad():
        names = ["__base__" if name is None else name for name in names]
        return model(input_ids=torch.tensor(ids).long(), adapter_names=names).logits.numpy()


def ours(model, params, ids):
    return np.asarray(model.apply({"params": params}, ids))


@pytest.mark.slow
def test_mixed_batches_give_pefts_logits(checkpoints, peft_models, family, tmp_path):
    peft_models(family).save_pretrained(tmp_path)
    model, params = jlora.load(checkpoints[family][0], dtype=jnp.float32)
    tree = jlora.load_adapters(tmp_path, params)
    assert jlora.adapter_names(tree) == tuple(KINDS)
    expected = theirs(peft_models(family), batch(), ROWS)
    np.testing.assert_allclose(ours(model, jlora.route(tree, ROWS), batch()), expected, atol=1e-4, rtol=1e-4)
    numbers = jnp.array([-1 if name is None else list(KINDS).index(name) for name in ROWS])
    assert same_bits(jlora.route(tree, numbers), jlora.route(tree, ROWS))
    for name in KINDS:
        chosen = jlora.route(tree, name)
        expected = theirs(peft_models(family), batch(), [name] * len(ROWS))
        np.testing.assert_allclose(ours(model, chosen, batch()), expected, atol=1e-4, rtol=1e-4)
        merged = ours(model, jlora.merge(chosen), batch())
        np.testing.assert_allclose(merged, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(ours(model, jlora.route(tree, None), batch()), ours(model, params, batch()))


@pytest.mark.slow
def test_stacked_layers(checkpoints, family):
    model, params = jlora.load(checkpoints[family][0], dtype=jnp.float32, stack=True)
    trees = {
        name: perturbed(jlora.add_lora(params, LoraConfig(rank=r, targets=TARGETS[family]), key=jax.random.key(r)), r)
        for name, r in (("a", 2), ("b", 5))
    }
    tree = jlora.stack_adapters(trees)
    rows = ["b", None, "a", "b", "b"]
    expected = [ours(model, trees.get(name, params), batch()[i : i + 1])[0] for i, name in enumerate(rows)]
    np.testing.assert_allclose(ours(model, jlora.route(tree, rows), batch()), expected, atol=1e-4)
    # The choice is a child like the others, so it goes along when the layers are taken apart.
    apart = jlora.unstack_layers(jlora.route(tree, rows))
    np.testing.assert_allclose(ours(model, apart, batch()), expected, atol=1e-4)
    assert same_bits(jlora.stack_layers(apart), jlora.route(tree, rows))


@pytest.mark.parametrize("tokens", [(), (1,), (2,)])
@pytest.mark.parametrize("transpose", [False, True])
def test_each_row_has_the_product_of_its_own_adapter(tokens, transpose):
    """One token a row or several, and no row anything of another's adapter."""
    rng = np.random.default_rng(0)
    base = {"proj": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}}
    trees = {
        n: perturbed(jlora.add_lora(base, LoraConfig(rank=r, targets=["proj"]), key=jax.random.key(r)), r)
        for n, r in (("a", 2), ("b", 3), ("c", 1))
    }
    tree = jlora.stack_adapters(trees)
    rows = ["b", None, "a", "b", "a"]
    x = jnp.asarray(rng.normal(size=(5, *tokens, 5 if transpose else 6)), jnp.float32)
    whole = jlora.route(tree, rows)["proj"]["kernel"]
    found = jlora.linear(x, whole, transpose=transpose)
    for row, y, name in zip(x, found, rows, strict=True):
        expected = jlora.linear(row, trees.get(name, base)["proj"]["kernel"], transpose=transpose)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    damaged = dataclasses.replace(whole, lora_A=whole.lora_A.at[2].set(jnp.nan), lora_B=whole.lora_B.at[2].set(jnp.inf))
    np.testing.assert_array_equal(jlora.linear(x, damaged, transpose=transpose), found)


@pytest.mark.slow
def test_another_choice_compiles_nothing(checkpoints, peft_models, tmp_path):
    peft_models("llama").save_pretrained(tmp_path)
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    tree = jlora.load_adapters(tmp_path, params)
    traces = []

    @jax.jit
    def logits(params, ids):
        traces.append(1)
        return model.apply({"params": params}, ids)

    outputs = [logits(jlora.route(tree, name), IDS) for name in (*KINDS, None)]
    assert len(traces) == 1 and logits._cache_size() == 1
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(outputs) for b in outputs[:i])

    @jax.jit
    def inside(tree, ids, numbers):
        traces.append(1)
        return model.apply({"params": jlora.route(tree, numbers)}, ids)

    for numbers in ([0, 1, 2, -1, 0], [2, 2, 1, 0, -1]):
        names = [None if i < 0 else list(KINDS)[i] for i in numbers]
        expected = ours(model, jlora.route(tree, names), batch())
        np.testing.assert_allclose(inside(tree, batch(), jnp.array(numbers)), expected, atol=1e-5)
    assert len(traces) == 2


@pytest.mark.slow
def test_generation_sends_each_prompt_through_its_adapter(checkpoints, peft_models, tmp_path):
    peft_models("gpt2").save_pretrained(tmp_path)
    model, params = jlora.load(checkpoints["gpt2"][0], dtype=jnp.float32)
    tree = jlora.load_adapters(tmp_path, params)
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(batch())]
    options = {"max_new_tokens": 8, "temperature": 0, "eos_token_id": []}
    mixed = jlora.generate(model, jlora.route(tree, ROWS), prompts, **options)
    alone = [jlora.generate(model, jlora.route(tree, n), [p], **options)[0] for n, p in zip(ROWS, prompts, strict=True)]
    assert mixed == alone
    assert mixed != jlora.generate(model, params, prompts, **options)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, jlora.NF4()], ids=["dense", "nf4"])
def test_embeddings_heads_and_quantized_bases(checkpoints, spec):
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32, quantize=spec)
    targets = {"a": ["embed_tokens", "lm_head"], "b": ["q_proj", "embed_tokens"], "c": ["lm_head"]}
    trees = {
        name: perturbed(jlora.add_lora(params, LoraConfig(rank=2, targets=t), key=jax.random.key(1)), seed)
        for seed, (name, t) in enumerate(targets.items())
    }
    tree = jlora.stack_adapters(trees)
    rows = ["b", "a", None, "c", "a"]
    expected = [ours(model, trees.get(name, params), batch()[i : i + 1])[0] for i, name in enumerate(rows)]
    np.testing.assert_allclose(ours(model, jlora.route(tree, rows), batch()), expected, atol=1e-4, rtol=1e-4)
    for name, alone in trees.items():
        np.testing.assert_allclose(
            ours(model, jlora.route(tree, name), batch()), ours(model, alone, batch()), atol=1e-4, rtol=1e-4
        )


def test_stacking_and_unstacking(checkpoints, peft_models, tmp_path):
    peft_models("llama").save_pretrained(tmp_path / "peft")
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    tree = jlora.load_adapters(tmp_path / "peft", params)
    assert all(w.base is flatten(params)[p] for p, w in flatten(tree).items() if isinstance(w, RoutedWeight))
    assert jlora.nbytes(tree) < jlora.nbytes(params) * 2, "the base is not copied"
    apart = jlora.unstack_adapters(tree)
    assert list(apart) == list(KINDS)
    for name, alone in apart.items():
        directory = tmp_path / "peft" / ("" if name == "default" else name)
        assert same_bits(alone, jlora.load_adapter(directory, params)), name
        # What was read can be written, so a tree of directories goes round.
        jlora.save_adapter(tmp_path / "ours" / name, alone, config=LoraConfig.load(directory), base_model="base")
    assert same_bits(jlora.load_adapters(tmp_path / "ours", params), tree)
    restored = jlora.combine(*jlora.split(jlora.route(tree, ROWS)))
    assert same_bits(restored, jlora.route(tree, ROWS))
    assert same_bits(jlora.remove_lora(tree), params)


def test_pissa_stands_side_by_side_as_plain_lora(checkpoints):
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    pissa = jlora.add_lora(params, LoraConfig(rank=2, targets=["q_proj"], init="pissa"), key=jax.random.key(0))
    pissa = perturbed(pissa)
    tree = jlora.stack_adapters({"pissa": pissa})
    assert {w.ranks for w in flatten(tree).values() if isinstance(w, RoutedWeight)} == {(4,)}
    np.testing.assert_allclose(
        ours(model, jlora.route(tree, "pissa"), IDS), ours(model, pissa, IDS), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_adapters_trained_in_one_batch_move_as_if_trained_apart(checkpoints):
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32, stack=True)
    configs = {"a": LoraConfig(rank=2, targets=["q_proj"]), "b": LoraConfig(rank=3, targets=["q_proj", "up_proj"])}
    trees = {n: jlora.add_lora(params, c, key=jax.random.key(1)) for n, c in configs.items()}
    loss_fn, tx = jlora.train.causal_lm_loss(model), optax.sgd(0.5)  # no moments: an adapter without rows stands still

    def trained(tree, data):
        adapter, base = jlora.split(tree)
        state = jlora.train.init_state(jax.tree.map(jnp.copy, adapter), tx)  # which is donated
        step = jlora.train.make_step(loss_fn, tx)
        for _ in range(3):
            state, _ = step(state, base, data, jax.random.key(0))
        return jlora.combine(state.adapter, base)

    ids = batch(4)
    data = {"input_ids": ids, "labels": ids}
    together = trained(jlora.stack_adapters(trees), data | {"adapter_ids": np.array([1, 1, 1, 1], np.int32)})
    apart = jlora.unstack_adapters(together)
    assert same_bits(apart["a"], trees["a"])
    alone = adapted_modules(trained(trees["b"], data))
    for module, w in adapted_modules(apart["b"]).items():
        np.testing.assert_allclose(w.lora_B, alone[module].lora_B, atol=1e-5)  # sums in another order
        assert np.abs(w.lora_B).max() > 1e-4
    # Half the batch each: the sums of the two losses have gradients of their own.
    adapter, base = jlora.split(jlora.stack_adapters(trees))
    ids_of_row = np.array([0, 1, 0, 1], np.int32)
    mixed = jax.grad(lambda a: loss_fn(jlora.combine(a, base), data | {"adapter_ids": ids_of_row}, None)[0])(adapter)
    for i, (name, tree) in enumerate(trees.items()):
        half, rest = jlora.split(tree)
        rows = {key: value[ids_of_row == i] for key, value in data.items()}
        expected = jax.grad(lambda a, rest, rows: loss_fn(jlora.combine(a, rest), rows, None)[0])(half, rest, rows)
        for path, w in flatten(expected).items():
            got = flatten(mixed)[path].lora_B[..., i, : w.lora_B.shape[-2], :]
            np.testing.assert_allclose(got, w.lora_B, atol=1e-5, err_msg=f"{name} {path}")


def two(params):
    config = LoraConfig(rank=2, targets=["q_proj"])
    return {n: jlora.add_lora(params, config, key=jax.random.key(i)) for i, n in enumerate(("keeper", "poet"))}


def refuse_dropout(params):
    config = LoraConfig(rank=2, targets=["q_proj"], dropout=0.1)
    tree = jlora.stack_adapters({"a": jlora.add_lora(params, config, key=jax.random.key(0))})
    jlora.with_dropout(tree, jax.random.key(0))


def refuse_kind(**fields):
    def stack(params):
        config = LoraConfig(rank=2, targets=["q_proj"], **fields)
        jlora.stack_adapters(two(params) | {"third": jlora.add_lora(params, config, key=jax.random.key(0))})

    return stack


def refuse_roles(params):
    tree, config = {"q": jnp.ones((4, 2, 3))}, LoraConfig(rank=2, targets=["q"])
    jlora.stack_adapters({"heads": jlora.add_lora(tree, config, key=jax.random.key(0), roles={"q": "ioo"})})


def refuse_other_base(params):
    other = jax.tree.map(lambda x: x + 1, params)
    jlora.stack_adapters({"keeper": two(params)["keeper"], "poet": two(other)["poet"]})


REFUSED = {
    "unchosen": (lambda p: jlora.merge(jlora.stack_adapters(two(p))), "none is chosen.*route"),
    "a name there is none of": (lambda p: jlora.route(jlora.stack_adapters(two(p)), "keper"), "Did you mean 'keeper'"),
    "a name in a row": (lambda p: jlora.route(jlora.stack_adapters(two(p)), ["poet", "x"]), "no adapter 'x'"),
    "a number": (lambda p: jlora.route(jlora.stack_adapters(two(p)), jnp.array([0, 2])), r"-1\.\.1; got 2"),
    "floats": (lambda p: jlora.route(jlora.stack_adapters(two(p)), jnp.array([0.5])), "must be integers"),
    "one adapter": (lambda p: jlora.route(two(p)["poet"], "poet"), "do not hold several"),
    "no adapter": (lambda p: jlora.stack_adapters({}), "at least one"),
    "merge of rows": (
        lambda p: jlora.merge(jlora.route(jlora.stack_adapters(two(p)), ["poet", "keeper"])),
        "no one dense weight",
    ),
    "other base": (refuse_other_base, "different bases at"),
    "other tree": (lambda p: jlora.stack_adapters(two(p) | {"x": two(p["model"])["poet"]}), "different trees"),
    "DoRA": (refuse_kind(use_dora=True), "'third' has a DoRA magnitude"),
    "whole modules": (refuse_kind(modules_to_save=["norm"]), "'third' has a FullWeight"),
    "dropout": (refuse_dropout, "without dropout"),
    "other axes": (refuse_roles, "'heads' has a kernel of roles 'ioo'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(checkpoints, case):
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(params)


def test_a_choice_for_other_rows_is_refused(checkpoints):
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    tree = jlora.route(jlora.stack_adapters(two(params)), ["poet", "keeper", "poet"])
    with pytest.raises(ValueError, match="3 rows; got a batch of shape"):
        model.apply({"params": tree}, batch())
    head = LoraConfig(rank=2, targets=["lm_head"])
    tree = jlora.stack_adapters({"a": jlora.add_lora(params, head, key=jax.random.key(0))})
    data = {"input_ids": batch(), "labels": batch(), "adapter_ids": np.zeros(5, np.int32)}
    with pytest.raises(ValueError, match="head that differs by row"):
        jlora.train.causal_lm_loss(model)(tree, data, None)


def test_a_directory_without_adapters(checkpoints, tmp_path):
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    with pytest.raises(FileNotFoundError, match="no adapters in"):
        jlora.load_adapters(tmp_path, params)


def test_wrapped_functions_refuse_it_by_name(checkpoints):
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    tree = jlora.route(jlora.stack_adapters(two(params)), "poet")
    with pytest.raises(TypeError, match="does not know how a RoutedWeight is used"):
        jlora.wrap(lambda p, x: x @ p["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"])(tree, jnp.ones((2, 48)))
