"""`jlora.wrap` and the explicit path on our own models, and on models of Flax Linen, NNX and Equinox."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora import LoraConfig, LoraWeight
from jlora.models import model_from_config

KEY = jax.random.key(0)
ROOT = Path(__file__).parents[1]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 50}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "vocab_size": 50,
    "tie_word_embeddings": False,
}
IDS = {"bos_token_id": 0, "eos_token_id": 0}


def moved(params):
    """The tree with factors that are not those of the start."""

    def one(w):
        if not isinstance(w, LoraWeight):
            return w
        return dataclasses.replace(w, lora_B=0.05 * jax.random.normal(KEY, w.lora_B.shape))

    return jax.tree.map(one, params, is_leaf=lambda w: isinstance(w, LoraWeight))


def assert_same(mine, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_our_models_give_what_the_explicit_path_gives(fields, quantize, stack, quick_compilation):
    model = model_from_config(fields | IDS, dtype=jnp.float32)
    ids = jax.random.randint(KEY, (3, 7), 0, 50)
    params = model.init(KEY, ids)["params"]
    if quantize:
        params = jlora.quantize_params(params, jlora.NF4(block_size=32))
    if stack:
        params = jlora.stack_layers(params)
    params = moved(jlora.add_lora(params, LoraConfig(rank=3, dropout=0.3), key=KEY))
    adapter, base = jlora.split(params)
    wrapped = jlora.wrap(model.apply)
    report = wrapped.check({"params": params}, ids)
    assert report.ok and not report.materialized and report.totals()["factored"] >= 4

    def value_and_grad(apply):
        def loss(adapter):
            params = jlora.with_dropout(jlora.combine(adapter, base), KEY)
            logits = apply({"params": params}, ids)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.grad(loss, has_aux=True))(adapter)

    assert_same(value_and_grad(wrapped), value_and_grad(model.apply), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
def test_overhead_of_a_training_step(stack):
    """Two layers of full width and all of the loss; `benchmarks/wrap_overhead.py` measures the whole GPT-2 likewise."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from wrap_overhead import measure
    finally:
        sys.path.pop(0)
    for quantize in (False, True):
        explicit, wrapped = (measure(w, quantize, stack, {"n_layer": 2}) for w in (False, True))
        assert wrapped["equations"] <= 1.1 * explicit["equations"]
        assert abs(wrapped["flops"] / explicit["flops"] - 1) < 0.01


@pytest.mark.slow
def test_overhead_of_the_whole_gpt2():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from wrap_overhead import measure
    finally:
        sys.path.pop(0)
    explicit, wrapped = (measure(w, False, False) for w in (False, True))
    assert wrapped["equations"] <= 1.1 * explicit["equations"]
    assert abs(wrapped["flops"] / explicit["flops"] - 1) < 0.01


@pytest.mark.slow
def test_an_adapted_embedding_with_a_tied_head():
    """The one difference: `wrap` adapts every use of a leaf, our own models keep the base in a tied head, as PEFT does."""
    model = model_from_config(GPT2 | IDS, dtype=jnp.float32)
    ids = jax.random.randint(KEY, (3, 7), 0, 50)
    params = moved(jlora.add_lora(model.init(KEY, ids)["params"], LoraConfig(rank=3, targets=["wte"]), key=KEY))
    head = jlora.wrap(lambda p, ids: (lambda h: h @ p["wte"].T)(jnp.take(p["wte"], ids, axis=0)))
    table = {"wte": params["transformer"]["wte"]["embedding"]}
    uses = {(use.primitive, use.status) for use in head.check(table, ids).uses}
    assert uses == {("gather", "factored"), ("dot_general", "factored(T)")}
    merged = jlora.merge(table)["wte"]
    assert_same(head(table, ids), merged[ids] @ merged.T, 1e-4)


# Flax Linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=24)(x)
        return x + nn.Dense(20)(nn.gelu(nn.Dense(36)(x + y))), None


class Linen(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 20)
        block = nn.remat(Block) if self.remat else Block
        x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(embed(ids), None)
        x = x @ self.param("raw", nn.initializers.lecun_normal(), (20, 20))
        return embed.attend(nn.LayerNorm()(x))


ROLES = {
    "query": "bioo",
    "key": "bioo",
    "value": "bioo",
    "out": "biio",
    "Dense_0": "bio",
    "Dense_1": "bio",
    "raw": "io",
}


@pytest.mark.slow
@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_linen(remat, quick_compilation):
    model, ids = Linen(remat), jax.random.randint(KEY, (2, 7), 0, 50)
    variables = model.init(KEY, ids)
    config = LoraConfig(rank=3, targets=[*ROLES, "Embed_0"])
    params = moved(jlora.add_lora(variables["params"], config, key=KEY, roles=ROLES))
    apply = jlora.wrap(model.apply)
    report = apply.check({"params": params}, ids)
    assert report.ok and not report.materialized and len({use.leaf for use in report.uses}) == 8, str(report)
    adapter, base = jlora.split(params)

    def gradient(f, prepare):
        value = lambda a: f({"params": prepare(jlora.combine(a, base))}, ids)  # noqa: E731
        # Linear in the logits, which are large: a sine of them would make much of their last bits.
        return jax.jit(lambda a: (value(a), jax.grad(lambda a: jnp.sum(value(a)[..., ::3]))(a)))(adapter)

    assert_same(gradient(apply, lambda p: p), gradient(model.apply, jlora.merge), 1e-4)


# Flax NNX


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(20, 36, rngs=rngs), nnx.Linear(36, 20, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def test_nnx(quick_compilation):
    model, x = Mlp(nnx.Rngs(0)), jax.random.normal(KEY, (5, 20))
    wrapped, params = jlora.wrap_nnx(model)
    assert_same(wrapped(params, x), model(x), 1e-6)
    params = moved(jlora.add_lora(params, LoraConfig(rank=3), key=KEY))
    assert wrapped.check(params, x).totals()["factored"] == 2
    assert_same(jax.jit(wrapped)(params, x), wrapped(jlora.merge(params), x), 1e-4)


# Helpers, and state that is no parameter


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(12)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class NnxNorm(nnx.Module):
    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(20, 12, rngs=rngs), nnx.BatchNorm(12, rngs=rngs)
        self.dropout, self.down = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(self.norm(self.up(x))))


@pytest.mark.slow
def test_linen_helper_with_other_collections(quick_compilation):
    model, x = LinenNorm(), jax.random.normal(KEY, (5, 20))
    variables = model.init(KEY, x, training=False)
    params = moved(jlora.add_lora(variables["params"], LoraConfig(rank=3), key=KEY))
    stats = {"batch_stats": variables["batch_stats"]}
    wrapped, merged = jlora.wrap_linen(model), jlora.merge(params)
    more = {"training": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
    mine, theirs = wrapped(params, x, collections=stats, **more), model.apply({"params": merged, **stats}, x, **more)
    assert_same(mine, theirs, 1e-4)
    quiet = wrapped(params, x, training=False, collections=mine[1])
    assert_same(quiet, model.apply({"params": merged, **theirs[1]}, x, training=False), 1e-4)


@pytest.mark.slow
def test_nnx_helper_with_other_state(quick_compilation):
    model, x = NnxNorm(nnx.Rngs(0)), jax.random.normal(KEY, (5, 20))
    wrapped, params, state = jlora.wrap_nnx(model, mutable=True)
    assert set(params) == {"up", "norm", "down"} and set(state) == {"norm", "dropout"}
    adapted = moved(jlora.add_lora(params, LoraConfig(rank=3, targets=["up", "down"]), key=KEY))
    (y, after), (y_merged, after_merged) = (jax.jit(wrapped)(p, state, x) for p in (adapted, jlora.merge(adapted)))
    assert_same((y, after["norm"]), (y_merged, after_merged["norm"]), 1e-4)
    y_next, _ = wrapped(adapted, after, x)
    assert float(jnp.abs(y_next - y).max()) > 1e-2  # another dropout mask

    # The module itself was not changed; called itself, it does the same.
    dense, _ = wrapped(params, state, x)
    assert_same(dense, model(x), 1e-6)


def test_nnx_helper_loses_no_state(quick_compilation):
    model, x = NnxNorm(nnx.Rngs(0)), jax.random.normal(KEY, (5, 20))
    wrapped, params = jlora.wrap_nnx(model)
    adapted = jlora.add_lora(params, LoraConfig(rank=3, targets=["up", "down"]), key=KEY)
    for tree in (params, adapted):
        with pytest.raises(ValueError, match=r"changed dropout/rngs/.*count.*norm/mean.*mutable=True"):
            wrapped(tree, x)
    model.eval()
    wrapped, _ = jlora.wrap_nnx(model)
    assert_same(jax.jit(wrapped)(adapted, x), model(x), 1e-5)  # lora_B is zero


# Equinox: a module is a tree, whose leaves are replaced in place


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [False, True])
def test_equinox(quantize, quick_compilation):
    mlp = eqx.nn.MLP(20, 8, 36, 2, activation=jax.nn.gelu, use_final_bias=False, key=KEY)
    x = jax.random.normal(KEY, (5, 20))
    f, params = jlora.wrap_equinox(mlp)
    roles, targets = {"weight": "oi"}, [f"layers.{k}.weight" for k in range(3)]
    if quantize:
        params = jlora.quantize_params(params, jlora.NF4(block_size=32), targets=targets, roles=roles)
    params = moved(jlora.add_lora(params, LoraConfig(rank=3, targets=targets), key=KEY, roles=roles))
    assert isinstance(params, eqx.nn.MLP) and params.layers[0].weight.lora_A.shape == (20, 3)
    assert f.check(params, x[0]).totals()["factored"] == 3
    adapter, base = jlora.split(params)

    def weights(module):
        return [layer.weight for layer in module.layers]

    def of_wrapped(adapter):
        return jax.vmap(f, (None, 0))(jlora.combine(adapter, base), x)

    def of_equinox(adapter):
        merged = jlora.merge(jlora.combine(adapter, base))
        return jax.vmap(eqx.tree_at(weights, mlp, weights(merged)))(x)

    def value_and_gradient(f):
        return jax.jit(lambda a: (f(a), jax.grad(lambda a: jnp.sum(jnp.sin(f(a))))(a)))(adapter)

    assert_same(value_and_gradient(of_wrapped), value_and_gradient(of_equinox), 1e-4)
    # A module as the tree itself, with its functions among the leaves.
    whole = eqx.tree_at(weights, mlp, weights(params))
    assert_same(jlora.wrap(lambda module, x: module(x))(whole, x[0]), of_wrapped(adapter)[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["lora_any_model.py"])
def test_examples_run(example):
    out = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert "loss" in out.stdout
