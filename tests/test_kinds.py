"""PEFT's kinds of adapter beside plain LoRA: DoRA, biases, whole modules, embeddings, PiSSA; live against PEFT."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from jaxprs import walk
from oracles import VOCAB, make_torch_model, our_logits, torch_logits
from safetensors.numpy import load_file, save_file
from steps import LLAMA, build, make_batch
from trees import perturbed, same_bits

import jlora
from jlora import FullWeight, LoraConfig, LoraWeight
from jlora.cli.inspect import adapter_table
from jlora.files.peft import from_peft
from jlora.lora import adapted_leaves, adapted_modules
from jlora.lora.kinds import column_norms
from jlora.train.checkpoints import Checkpoints
from jlora.tree.paths import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(5)
PARITY = {
    "dora-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora-llama": ("llama", {"target_modules": ["k_proj", "up_proj"], "use_dora": True, "use_rslora": True}),
    "dora-qwen2": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora-head": ("llama", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "bias-dora": ("gpt2", {"target_modules": ["c_fc"], "bias": "lora_only", "use_dora": True}),
    "bias-nowhere": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "save-untied": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "save-tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "save-norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "save-conv1d": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["mlp.c_fc", "ln_f", "wpe"]}),
    "save-and-bias": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "mlp"], "bias": "all"}),
    "save-parent": ("qwen2", {"target_modules": ["down_proj"], "modules_to_save": ["self_attn"]}),
    "embedding-untied": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-tied": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "pissa-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
    "pissa-llama": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "pissa-dora": ("qwen2", {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True}),
    "pissa-embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "init_lora_weights": "pissa"}),
}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    cache = {}

    def get(family, stack=False):
        if (family, stack) not in cache:
            cache[family, stack] = jlora.load(checkpoints[family][0], dtype=jnp.float32, stack=stack)
        return cache[family, stack]

    return get


def wrapped(family, *, noise=0.1, tied=None, **fields):
    """A PEFT model all of whose trained parameters have moved; `tied`: whether the head is the embedding."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields))
    changes = {} if tied is None else {"tie_word_embeddings": tied}
    model = peft.get_peft_model(make_torch_model(family, **changes), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return model


# Against PEFT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning:peft")
@pytest.mark.parametrize("case", PARITY)
def test_files_go_both_ways(checkpoints, loaded, case, tmp_path):
    family, fields = PARITY[case]
    theirs = wrapped(family, **fields)
    theirs.save_pretrained(tmp_path / "peft")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(checkpoints[family][1])).max() > 1e-2, "the adapter must show"

    config = LoraConfig.load(tmp_path / "peft")
    for stack in (False, True):
        model, params = loaded(family, stack)
        adapted = jlora.load_adapter(tmp_path / "peft", params)
        np.testing.assert_allclose(our_logits(model, adapted), expected, atol=1e-4)
        jlora.save_adapter(tmp_path / str(stack), adapted, config=config, base_model=str(checkpoints[family][0]))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("False", "True")]
    assert files[0] == files[1]

    back = peft.PeftModel.from_pretrained(make_torch_model(family), tmp_path / "True").eval()
    np.testing.assert_allclose(torch_logits(back), expected, atol=1e-4)
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "True"))
    if config.init != "pissa":
        # PEFT writes the base of what it takes for an embedding too, and some biases three times; no reader needs them.
        idle = re.compile(r"base_layer\.weight$|\.(modules_to_save|original_module)\.")
        before = {name: x for name, x in before.items() if not idle.search(name)}
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    again = jlora.load_adapter(tmp_path / "True", loaded(family)[1])
    np.testing.assert_allclose(our_logits(loaded(family)[0], again), expected, atol=1e-4)


STEPS = {
    "dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora-rows": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-dora-stacked": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True}),
    "save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "pissa": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_ten_steps_follow_peft_and_torch(loaded, case, tmp_path):
    """From PEFT's initial adapter, on the same batches: losses and everything that is trained."""
    family, fields = STEPS[case]
    theirs = wrapped(family, noise=0.0, **fields)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(2)
    # No token 1, the models' padding: torch's embeddings give its row no gradient.
    batches = [rng.integers(2, VOCAB // 4, (4, 12)) for _ in range(10)]
    rate = 5e-3

    theirs.train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    expected = []
    for ids in batches:
        loss = theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())

    model, params = loaded(family, case.endswith("stacked"))
    adapter, base = jlora.split(jlora.load_adapter(tmp_path, params))
    assert jlora.count(adapter) == sum(p.numel() for p in trained)
    tx = optax.adamw(rate, weight_decay=0.01)
    state = jlora.train.init_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    losses = []
    for ids in batches:
        ids = ids.astype(np.int32)
        state, metrics = step(state, base, {"input_ids": ids, "labels": ids}, KEY)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, atol=1e-3)
    assert same_bits(jlora.remove_lora(jlora.combine(state.adapter, base)), params)
    final = torch_logits(theirs.eval())
    assert np.abs(final - our_logits(model, jlora.combine(adapter, base))).max() > 0.5, (
        "training must have gone somewhere"
    )
    np.testing.assert_allclose(our_logits(model, jlora.combine(state.adapter, base)), final, atol=2e-2)


# Invariants

OURS = {
    "dora": {"use_dora": True},
    "dora-embedding": {"use_dora": True, "targets": ["c_attn", "wte"]},
    "bias": {"bias": "all"},
    "save": {"targets": ["c_attn"], "modules_to_save": ["wte", "ln_f", "mlp"]},
    "embedding": {"targets": ["wte", "wpe", "c_fc"]},
    "pissa": {"init": "pissa"},
    "all": {"targets": ["c_attn", "wte"], "use_dora": True, "bias": "all", "init": "pissa", "modules_to_save": ["wpe"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OURS)
def test_the_tree_invariants(loaded, case):
    config = LoraConfig(rank=3, **OURS[case])
    model, params = loaded("gpt2")
    start = jlora.add_lora(params, config, key=KEY)
    base_logits = our_logits(model, params)
    np.testing.assert_allclose(our_logits(model, start), base_logits, atol=1e-5 * np.abs(base_logits).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jlora.merge(start), params)

    moved = perturbed(start)
    for tree in (start, moved):
        adapter, base = jlora.split(tree)
        assert same_bits(jlora.combine(adapter, base), tree)
        assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
        assert jlora.count(adapter) + jlora.count(base) == jlora.count(tree)
        removed = flatten(jlora.remove_lora(tree))
        assert all(removed[path] is leaf for path, leaf in flatten(params).items())
    mask = jlora.adapter_mask(moved)
    assert jax.tree.structure(mask) == jax.tree.structure(moved)
    picked = [x for x, on in zip(jax.tree.leaves(moved), jax.tree.leaves(mask), strict=True) if on]
    assert sorted(x.shape for x in picked) == sorted(x.shape for x in jax.tree.leaves(jlora.split(moved)[0]))

    logits = our_logits(model, moved)
    assert np.abs(logits - base_logits).max() > 1e-2
    stacked = jlora.stack_layers(moved)
    assert same_bits(jlora.unstack_layers(stacked), moved)
    np.testing.assert_allclose(our_logits(model, stacked), logits, atol=1e-4)
    assert adapted_leaves(stacked).keys() == adapted_leaves(moved).keys()
    direct = jlora.add_lora(jlora.stack_layers(params), config, key=KEY)
    assert jax.tree.structure(direct) == jax.tree.structure(jlora.stack_layers(start))
    # GPT-2's head is its embedding: merged, it would change with that.
    untied, moved_untied = jlora.untie(model, moved)
    np.testing.assert_allclose(our_logits(untied, jlora.merge(moved_untied)), logits, atol=1e-4)

    small = jlora.cast(moved, jnp.bfloat16)
    assert same_bits(jlora.split(small)[0], jlora.split(moved)[0])
    assert {x.dtype for x in jax.tree.leaves(jlora.remove_lora(small))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_nothing_is_trained_in_the_buffer_of_the_frozen(loaded):
    """A donated adapter must not take the base with it."""
    params = loaded("gpt2")[1]
    adapter, base = jlora.split(jlora.add_lora(params, LoraConfig(rank=2, **OURS["all"]), key=KEY))
    pointers = [{x.unsafe_buffer_pointer() for x in jax.tree.leaves(half)} for half in (adapter, base)]
    assert not pointers[0] & pointers[1]


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("kind", [{"use_dora": True}, {"init": "pissa"}, {"use_dora": True, "dropout": 0.3}], ids=str)
def test_nothing_of_a_frozen_kernel_is_made(stack, kind):
    model, adapter, base = build(LLAMA, stack=stack)
    params = jlora.remove_lora(jlora.combine(adapter, base))
    adapter, base = jlora.split(jlora.add_lora(params, LoraConfig(rank=3, **kind), key=KEY))
    kernels = {leaf.shape[-2:] for path, leaf in flatten(params).items() if path.endswith("/kernel")}
    forbidden = {s for k in kernels for t in (k, k[::-1]) for s in (t, (2, *t))} | {(113, 40)}
    tx = optax.adam(1e-3)
    state = jlora.train.init_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    jaxpr = jax.make_jaxpr(step)(state, base, make_batch(), KEY).jaxpr
    views = ("pjit", "jit", "squeeze", "dynamic_slice", "reshape", "optimization_barrier", "copy")
    made = {
        (eqn.primitive.name, out.aval.shape)
        for eqn in walk(jaxpr)
        if eqn.primitive.name not in views
        for out in eqn.outvars
        if tuple(getattr(out.aval, "shape", ())) in forbidden
    }
    assert not made
    assert not {x.shape for x in jax.tree.leaves(state)} & forbidden


@pytest.mark.slow
def test_checkpoints_hold_every_kind(loaded, tmp_path):
    params = loaded("gpt2")[1]
    adapter, _ = jlora.split(perturbed(jlora.add_lora(params, LoraConfig(rank=2, **OURS["all"]), key=KEY)))
    state = jlora.train.init_state(adapter, optax.adam(1e-3))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, eval_loss=None)
    blank = jax.tree.map(jnp.zeros_like, state)
    assert same_bits(checkpoints.restore(blank, 0), state)


@pytest.mark.slow
def test_a_run_of_every_kind(gpt2_dir, text_file, tmp_path):
    config = jlora.FinetuneConfig(
        model=gpt2_dir, data=text_file, output=str(tmp_path / "run"), targets=("c_attn",), rank=2, steps=3, batch_size=2,
        max_length=16, quiet=True, use_dora=True, init="pissa", bias="all", modules_to_save=("ln_f",), eval_fraction=0,
    )  # fmt: skip
    result = jlora.finetune(config)
    assert adapter_table(str(result.adapter_dir)).row_count == 2 + 14
    model, params = jlora.load(gpt2_dir, dtype=jnp.float32)
    adapted = jlora.load_adapter(result.adapter_dir, params)
    assert sum(isinstance(w, FullWeight) for w in adapted_leaves(adapted).values()) == 14
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(gpt2_dir), result.adapter_dir
    )
    expected = torch_logits(theirs.eval())
    np.testing.assert_allclose(our_logits(model, adapted), expected, atol=1e-4)
    assert np.abs(expected - our_logits(model, params)).max() > 1e-3
    with pytest.raises(ValueError, match="'pissa' needs dense kernels; got quantize='nf4'"):
        dataclasses.replace(config, quantize="nf4")


# The values


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dora_weight(base, rank=3, **fields):
    d_in, d_out = base.shape
    factors = normal(d_in, rank, seed=1), normal(rank, d_out, seed=2)
    norms = column_norms(base)
    return LoraWeight(base, *factors, 0.5, magnitude=norms + 0.1 * normal(d_out, seed=3), base_norm=norms, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_dora_is_the_product_by_the_merged_kernel(quantized):
    base = normal(128, 40)
    weight = dora_weight(jlora.quantize(base, jlora.NF4()) if quantized else base)
    merged = np.asarray(weight.dense(jnp.float32))
    total = np.asarray(jlora.merge({"w": weight.base})["w"]) + 0.5 * np.asarray(weight.lora_A @ weight.lora_B)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), weight.magnitude, rtol=1e-5)
    np.testing.assert_allclose(merged, total * np.asarray(weight.magnitude) / np.linalg.norm(total, axis=0), rtol=1e-4)
    x, y = normal(2, 5, 128), normal(7, 40)
    np.testing.assert_allclose(jlora.linear(x, weight), x @ merged, atol=1e-3)
    np.testing.assert_allclose(jlora.linear(y, weight, transpose=True), y @ merged.T, atol=1e-3)
    np.testing.assert_allclose(jlora.embed(jnp.array([[3, 0]]), weight), merged[[[3, 0]]], atol=1e-4)
    small = jlora.linear(x.astype(jnp.bfloat16), weight)
    assert small.dtype == jnp.bfloat16
    assert np.abs(np.asarray(small, np.float32) - np.asarray(x @ merged)).max() < 0.03 * np.abs(x @ merged).max()


@pytest.mark.slow
def test_doras_norm_is_a_constant_to_the_gradient():
    weight, x = dora_weight(normal(12, 5)), normal(4, 12)

    def ours(a, b, m):
        return jnp.sum(jnp.sin(jlora.linear(x, dataclasses.replace(weight, lora_A=a, lora_B=b, magnitude=m))))

    def plain(a, b, m):
        total = weight.base + 0.5 * a @ b
        return jnp.sum(jnp.sin(x @ (total * m / jax.lax.stop_gradient(jnp.linalg.norm(total, axis=0)))))

    factors = weight.lora_A, weight.lora_B, weight.magnitude
    for got, want in zip(*(jax.grad(f, argnums=(0, 1, 2))(*factors) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_column_of_zeros_stays_zero():
    weight = dora_weight(normal(6, 4).at[:, 1].set(0.0))
    weight = dataclasses.replace(weight, lora_B=jnp.zeros((3, 4)), magnitude=column_norms(weight.base))
    assert (jlora.linear(normal(2, 6), weight)[:, 1] == 0).all() and (weight.dense()[:, 1] == 0).all()


def test_dora_drops_out_where_peft_does():
    """PEFT's layer in training, given our mask: the scaled product meets the dropped input, the base the whole one."""
    d_in, d_out, rank = 12, 5, 3
    weight = dora_weight(normal(d_in, d_out), rank, dropout=0.4, key=KEY)
    x = normal(7, d_in, seed=9)
    linear = torch.nn.Linear(d_in, d_out)
    config = peft.LoraConfig(r=rank, lora_alpha=0.5 * rank, lora_dropout=0.4, use_dora=True)
    layer = peft.tuners.lora.Linear(linear, "default", config=config, r=rank, lora_alpha=0.5 * rank)
    dropped = torch.tensor(np.asarray(weight.drop(x)))

    class Ours(torch.nn.Module):
        def forward(self, x):
            return dropped

    tensors = {
        linear.weight: weight.base.T,
        layer.lora_A["default"].weight: weight.lora_A.T,
        layer.lora_B["default"].weight: weight.lora_B.T,
        layer.lora_magnitude_vector["default"].weight: weight.magnitude,
    }
    with torch.no_grad():
        for parameter, value in tensors.items():
            parameter.copy_(torch.tensor(np.asarray(value)))
        layer.lora_dropout["default"] = Ours()
        expected = (layer.train()(torch.tensor(np.asarray(x))) - linear.bias).numpy()
    np.testing.assert_allclose(jlora.linear(x, weight), expected, atol=1e-5)
    assert np.abs(expected - np.asarray(jlora.linear(x, dataclasses.replace(weight, key=None)))).max() > 0.1


def test_a_lookup_drops_nothing():
    params = {"wte": {"embedding": normal(9, 4)}}
    config = LoraConfig(rank=2, targets=["wte"], dropout=0.5)
    params = perturbed(jlora.add_lora(params, config, key=KEY))
    table = params["wte"]["embedding"]
    dropped = jlora.with_dropout(params, KEY)["wte"]["embedding"]
    assert dropped.key is not None
    assert (jlora.embed(jnp.arange(9), dropped) == jlora.embed(jnp.arange(9), table)).all()


def test_initial_factors_of_an_embedding_are_pefts(loaded):
    adapted = jlora.add_lora(loaded("gpt2")[1], LoraConfig(rank=64, targets=["wte"], init="gaussian"), key=KEY)
    weight = adapted_modules(adapted)["transformer.wte"]
    assert not weight.lora_A.any() and weight.lora_A.shape == (VOCAB, 64)
    assert abs(float(weight.lora_B.std()) - 1.0) < 0.05


def test_full_weight_behind_the_seam():
    base = normal(6, 4).astype(jnp.bfloat16)
    weight = FullWeight(base, base.astype(jnp.float32) + 0.25)
    x, y = normal(3, 6), normal(3, 4)
    np.testing.assert_allclose(jlora.linear(x, weight), x @ weight.value, atol=1e-5)
    np.testing.assert_allclose(jlora.linear(y, weight, transpose=True), y @ weight.value.T, atol=1e-5)
    assert jlora.embed(jnp.array([1, 99]), weight).dtype == jnp.bfloat16
    assert (jlora.embed(jnp.array([1, 99]), weight) == weight.dense()[jnp.array([1, 5])]).all()
    assert (weight.shape, weight.dtype, weight.size) == ((6, 4), jnp.bfloat16, 48)
    with pytest.raises(TypeError, match=r"`FullWeight` of shape \(6, 4\)"):
        x @ weight


def test_pissa_takes_the_largest_singular_values(loaded):
    params = loaded("llama")[1]
    kernel = params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    weight = adapted_modules(jlora.add_lora(params, LoraConfig(rank=4, init="pissa"), key=KEY))[
        "model.layers.0.self_attn.q_proj"
    ]
    u, s, vt = np.linalg.svd(np.asarray(kernel), full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    np.testing.assert_allclose(weight.scaling * np.asarray(weight.lora_A @ weight.lora_B), best, atol=1e-4)
    np.testing.assert_allclose(weight.base.dense(), np.asarray(kernel) - best, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "qwen2",
            {"modules_to_save": ["lm_head"]},
            r"`modules_to_save` 'lm_head' matches no module\. This model has no head",
        ),
        ("llama", {"modules_to_save": ["lm_hed"]}, r"'lm_hed' matches no module\. Did you mean 'lm_head'"),
        ("llama", {"modules_to_save": ["mlp"]}, r"both name 'model\.layers\.0\.mlp\.down_proj'"),
        ("llama", {"bias": "all"}, r"`bias` 'all' finds no bias to train\. Use bias='none'"),
        ("qwen2", {"targets": ["o_proj"], "bias": "lora_only"}, r"finds no bias to train in the adapted modules"),
        ("llama", {"init": "pissa", "rank": 33}, r"'pissa' needs a `rank` of at most.*got rank 33.*k_proj"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(loaded, family, fields, message):
    with pytest.raises(ValueError, match=message):
        jlora.add_lora(loaded(family)[1], LoraConfig(**fields), key=KEY)


@pytest.mark.slow
def test_quantized_bases(loaded):
    model, params = loaded("llama")
    packed = jlora.quantize_params(params, jlora.NF4())
    with pytest.raises(ValueError, match="'pissa' takes the singular values of dense kernels.*NF4Tensor"):
        jlora.add_lora(packed, LoraConfig(init="pissa"), key=KEY)
    with pytest.raises(ValueError, match=r"'mlp' names .*, which is quantized \(NF4Tensor\)"):
        jlora.add_lora(packed, LoraConfig(targets=["q_proj"], modules_to_save=["mlp"]), key=KEY)
    config = LoraConfig(rank=2, use_dora=True, modules_to_save=["lm_head", "norm"])
    adapted = jlora.add_lora(packed, config, key=KEY)
    np.testing.assert_allclose(our_logits(model, adapted), our_logits(model, packed), atol=1e-4)
    moved = perturbed(adapted)
    np.testing.assert_allclose(our_logits(model, moved), our_logits(model, jlora.merge(moved)), atol=1e-3)


def test_a_stack_is_trained_alike(loaded):
    params = loaded("qwen2", True)[1]
    config = LoraConfig(targets=["o_proj"], modules_to_save=["layers.0.mlp"])
    with pytest.raises(ValueError, match=r"stacked leaf 'model/layers/mlp/.*trains 1 of them.*unstack_layers"):
        jlora.add_lora(params, config, key=KEY)


TIES = {
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "embedding-llama": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-dora": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "save-gpt2": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "save-qwen2": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("case", TIES)
def test_an_adapted_embedding_that_is_the_head_is_merged_untied(case, stack, tmp_path):
    """PEFT's logits with the adapter on. Its own `merge_and_unload` changes the head with a LoRA on the embedding (it
    warns when the adapter is made), and gives them only for `modules_to_save`."""
    family, fields = TIES[case]
    theirs = wrapped(family, tied=True, **fields)
    theirs.save_pretrained(tmp_path / "adapter")
    make_torch_model(family, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    expected = torch_logits(theirs)
    model, params = jlora.load(tmp_path / "base", dtype=jnp.float32, stack=stack)
    adapted = jlora.load_adapter(tmp_path / "adapter", params)
    merged = theirs.merge_and_unload()
    follows = np.abs(torch_logits(merged) - expected).max() < 1e-4
    assert follows == case.startswith("save"), "PEFT merges otherwise than it did"

    with pytest.raises(ValueError, match=re.escape("`model, params = jlora.untie(model, params)`")):
        jlora.save_pretrained(tmp_path / "merged", model, adapted)
    assert not (tmp_path / "merged").exists()
    jlora.save_pretrained(tmp_path / "merged", *jlora.untie(model, adapted))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head, flatten(params)[model.config.embedding_path])
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_allclose(torch_logits(again.eval()), expected, atol=1e-4)
    back = jlora.load(tmp_path / "merged", dtype=jnp.float32, stack=stack)
    np.testing.assert_allclose(our_logits(*back), expected, atol=1e-4)

    if follows:
        merged.save_pretrained(tmp_path / "theirs")
        back = jlora.load(tmp_path / "theirs", dtype=jnp.float32, stack=stack)
        np.testing.assert_allclose(our_logits(*back), expected, atol=1e-4)


def test_untying(loaded):
    model, params = loaded("gpt2")
    untied, whole = jlora.untie(model, params)
    assert same_bits({name: whole[name] for name in params}, params)
    np.testing.assert_allclose(our_logits(untied, whole), our_logits(model, params), atol=1e-5)
    assert jlora.untie(untied, whole) == (untied, whole)
    adapter, base = jlora.split(jlora.add_lora(params, LoraConfig(targets=["wte"]), key=KEY))
    with pytest.raises(ValueError, match=r"these parameters lack\. Pass `combine\(adapter, base\)`"):
        jlora.untie(model, adapter)
    # A head of its own can be adapted as a head of its own.
    head = jlora.add_lora(whole, LoraConfig(rank=2, targets=["lm_head"]), key=KEY)
    assert list(adapted_modules(head)) == ["lm_head"]


@pytest.mark.slow
def test_an_adapter_on_an_untied_gpt2_goes_both_ways(tmp_path):
    """torch's Linear among Conv1Ds."""
    make_torch_model("gpt2", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model, params = jlora.load(tmp_path / "base", dtype=jnp.float32)
    fields = {"target_modules": ["lm_head", "wte", "c_attn"], "use_dora": True}
    theirs = wrapped("gpt2", tied=False, **fields)
    theirs.save_pretrained(tmp_path / "peft")
    adapted = jlora.load_adapter(tmp_path / "peft", params)
    np.testing.assert_allclose(our_logits(model, adapted), torch_logits(theirs), atol=1e-4)
    jlora.save_adapter(tmp_path / "ours", adapted, config=LoraConfig.load(tmp_path / "peft"), base_model="b")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(back), torch_logits(theirs), atol=1e-4)


@pytest.mark.slow
def test_an_adapted_embedding_beside_another_head_is_merged(loaded, tmp_path):
    model, params = loaded("llama")
    adapted = perturbed(jlora.add_lora(params, LoraConfig(targets=["embed_tokens"]), key=KEY))
    jlora.save_pretrained(tmp_path / "untied", model, adapted)
    back = jlora.load(tmp_path / "untied", dtype=jnp.float32)
    np.testing.assert_allclose(our_logits(*back), our_logits(model, adapted), atol=1e-4)


@pytest.mark.slow
def test_an_adapter_of_another_embedding_is_refused(loaded, tmp_path):
    wrapped("llama", target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other base: .*embed_tokens\.base_layer\.weight"):
        jlora.load_adapter(tmp_path, loaded("llama")[1])


def test_a_config_of_another_kind_is_not_written(loaded, tmp_path):
    params = loaded("gpt2")[1]
    config = LoraConfig(rank=2, use_dora=True, bias="all", targets=["c_attn"])
    adapted = jlora.add_lora(params, config, key=KEY)
    for change, message in (
        ({"use_dora": False}, "use_dora=True; the config says use_dora=False"),
        ({"bias": "none"}, "is trained whole; `bias` and `modules_to_save` say not"),
        ({"modules_to_save": ["ln_f"]}, "ln_f/scale is not trained whole"),
    ):
        with pytest.raises(ValueError, match=message):
            jlora.save_adapter(tmp_path, adapted, config=dataclasses.replace(config, **change), base_model="b")
    pissa = LoraConfig(rank=2, init="pissa")
    adapter, base = jlora.split(jlora.add_lora(params, pissa, key=KEY))
    with pytest.raises(ValueError, match=r"Pass `combine\(adapter, base\)`"):
        jlora.save_adapter(tmp_path, adapter, config=pissa, base_model="b")
    jlora.save_adapter(tmp_path, jlora.combine(adapter, base), config=pissa, base_model="b")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["init_lora_weights"]) == (4, 32.0, True)


def test_a_residual_that_peft_draws_anew_is_refused_with_the_reason(tmp_path):
    theirs = wrapped("llama", target_modules=["q_proj"], init_lora_weights="pissa_niter_1")
    theirs.save_pretrained(tmp_path)
    loads = []
    for seed in (0, 1):
        base = make_torch_model("llama")
        torch.manual_seed(seed)
        loads.append(torch_logits(peft.PeftModel.from_pretrained(base, tmp_path).eval()))
    assert np.abs(loads[0] - loads[1]).max() > 1e-2, "then its residual can be computed again"
    with pytest.raises(
        ValueError, match=r"(?s)init_lora_weights = 'pissa_niter_1'.*random projection, anew at every load"
    ):
        LoraConfig.load(tmp_path)


def test_a_tied_adapter_of_peft_is_refused_by_name():
    fields = {"peft_type": "LORA", "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    with pytest.raises(ValueError, match="ensure_weight_tying = True"):
        from_peft(fields)
