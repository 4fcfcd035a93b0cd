"""`jlora.wrap` and the explicit path on our own models, and on models of Flax Linen, NNX and Equinox."""

import dataclasses
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("remat", [False, True])
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
    graph, state = nnx.split(model)
    pure = moved(jlora.add_lora(nnx.to_pure_dict(state), LoraConfig(rank=3), key=KEY))

    def call(pure, x):
        filled = nnx.split(model)[1]
        nnx.replace_by_pure_dict(filled, pure)
        return nnx.merge(graph, filled)(x)

    wrapped = jlora.wrap(call)
    assert wrapped.check(pure, x).totals()["factored"] == 2
    assert_same(jax.jit(wrapped)(pure, x), call(jlora.merge(pure), x), 1e-4)


# Equinox: a module is a tree, whose leaves are replaced in place


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """What an Equinox module is to JAX: arrays and functions as leaves, under the names of its fields."""

    def __init__(self, layers, activation):
        self.layers, self.activation = layers, activation

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in ("layers", "activation")], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __call__(self, x):
        first, second = self.layers
        return second(self.activation(first(x)))


def test_modules_that_are_trees(quick_compilation):
    keys = jax.random.split(KEY, 3)
    layers = [
        Linear(jax.random.normal(k, shape) / 6, jnp.ones(shape[0]))
        for k, shape in zip(keys, ((36, 20), (8, 36)), strict=False)
    ]
    module, x = Module(layers, jax.nn.gelu), jax.random.normal(keys[2], (5, 20))
    config = LoraConfig(rank=3, targets=["layers.0.weight", "layers.1.weight"])
    module = moved(jlora.add_lora(module, config, key=KEY, roles={"weight": "oi"}))
    assert module.activation is jax.nn.gelu and module.layers[0].weight.lora_A.shape == (20, 3)
    wrapped = jlora.wrap(lambda m, x: jax.vmap(m)(x))
    assert wrapped.check(module, x).totals()["factored"] == 2
    dense = jax.tree.map(
        lambda w: w.dense() if isinstance(w, LoraWeight) else w, module, is_leaf=lambda w: isinstance(w, LoraWeight)
    )
    assert_same(wrapped(module, x), jax.vmap(dense)(x), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["lora_any_model.py"])
def test_examples_run(example):
    out = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert "loss" in out.stdout
