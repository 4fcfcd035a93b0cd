"""LoRA on models that know nothing of it: a Flax Linen vision transformer, an NNX multilayer perceptron, and plain JAX.

    python examples/lora_any_model.py
    python examples/lora_any_model.py --smol    # SmolLM2-135M as forty lines of plain JAX, on the lighthouse keeper's text

Each gets its parameters as a plain tree, puts `LoraWeight` leaves into it, and calls the model through `jlora.wrap`. The
perceptron's and the transformer's frozen kernels are packed to 4 bits as well. The task is made up: tell images by which of
their corners is bright. The language model keeps the blocks of its GGUF file, and learns real text.
"""

import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm2
from flax import nnx

import jlora

CLASSES, SIZE = 4, 8


def batch(key, rows=64):
    """Noisy images [rows, 8, 8, 1] and the corner that is bright."""
    corner_key, noise_key = jax.random.split(key)
    corner = jax.random.randint(corner_key, (rows,), 0, CLASSES)
    image = 0.5 * jax.random.normal(noise_key, (rows, SIZE, SIZE, 1))
    bright = jnp.zeros((CLASSES, SIZE, SIZE, 1))
    half = SIZE // 2
    for k in range(CLASSES):
        bright = bright.at[k, half * (k // 2) : half * (k // 2 + 1), half * (k % 2) : half * (k % 2 + 1)].set(1.0)
    return image + bright[corner], corner


# A Linen vision transformer, layers under one scan. Its parameters are a plain tree already.


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(nn.LayerNorm()(x)))), None


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (2, 2), strides=2, name="patches")(images)
        x = x.reshape(len(x), -1, 32)
        x = x + self.param("positions", nn.initializers.normal(1.0), x.shape[1:])
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="encoder")(x, None)
        return nn.Dense(CLASSES, name="classes")(x.mean(axis=1))


def linen(key):
    model = VisionTransformer()
    params = model.init(key, batch(key)[0])["params"]
    # What each axis is for: HWIO of the patches; in the stack of layers (b), heads are outputs of q, k, v and inputs of out.
    roles = {
        "patches": "iiio", "query": "bioo", "key": "bioo", "value": "bioo", "out": "biio", "up": "bio", "down": "bio",
    }  # fmt: skip
    params = jlora.quantize_params(params, jlora.NF4(), targets=["up", "down"], roles=roles)
    params = jlora.add_lora(params, jlora.LoraConfig(rank=4, targets=list(roles)), key=key, roles=roles)
    return jlora.wrap_linen(model), params


# An NNX module: its graph is static, its parameters become a plain tree, and the function puts them together again.


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(SIZE * SIZE, 64, rngs=rngs)
        self.down = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, images):
        return self.down(nnx.relu(self.up(images.reshape(len(images), -1))))


def nnx_module(key):
    apply, params = jlora.wrap_nnx(Perceptron(nnx.Rngs(0)))
    params = jlora.quantize_params(params, jlora.NF4())
    return apply, jlora.add_lora(params, jlora.LoraConfig(rank=4), key=key)


# A plain function of a dictionary. (For an Equinox module there is `jlora.wrap_equinox`; its kernels, stored [out, in],
# have the roles "oi".)


def plain(key):
    first, second = jax.random.split(key)
    params = {"w1": jax.random.normal(first, (SIZE * SIZE, 48)) / 8, "w2": jax.random.normal(second, (48, CLASSES)) / 7}

    def call(params, images):
        return jnp.tanh(images.reshape(len(images), -1) @ params["w1"]) @ params["w2"]

    return jlora.wrap(call), jlora.add_lora(params, jlora.LoraConfig(rank=4), key=key)


# A language model, written as the papers have it, of the parameters of a checkpoint.


def llama(params, ids, *, config):
    """Logits [batch, seq, vocab] of ids [batch, seq]."""
    n, heads, d = ids.shape[1], config.num_attention_heads, config.head_dim
    angles = jnp.arange(n)[:, None] * config.rope_theta ** -jnp.linspace(0, 1, d // 2, endpoint=False)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def norm(x, scale):
        return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps)

    def rotate(x):
        first, second = jnp.split(x.reshape(*x.shape[:2], -1, d), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attention(x, p):
        q, k = rotate(x @ p["q_proj"]["kernel"]), rotate(x @ p["k_proj"]["kernel"])
        v = (x @ p["v_proj"]["kernel"]).reshape(k.shape)
        k, v = (jnp.repeat(y, heads // y.shape[2], axis=2) for y in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / d**0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(n, dtype=bool), scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["o_proj"]["kernel"]

    def mlp(x, p):
        return (jax.nn.silu(x @ p["gate_proj"]["kernel"]) * (x @ p["up_proj"]["kernel"])) @ p["down_proj"]["kernel"]

    model = params["model"]
    x = model["embed_tokens"]["embedding"][ids]
    for i in range(config.num_hidden_layers):
        layer = model["layers"][str(i)]
        x = x + attention(norm(x, layer["input_layernorm"]["scale"]), layer["self_attn"])
        x = x + mlp(norm(x, layer["post_attention_layernorm"]["scale"]), layer["mlp"])
    return norm(x, model["norm"]["scale"]) @ model["embed_tokens"]["embedding"].T


def lighthouse(key):
    file = smollm2.required()
    model, params = jlora.load(file, dtype="float32", quantize="keep")
    params = jlora.add_lora(params, jlora.LoraConfig(rank=8, targets=["q_proj", "v_proj", "down_proj"]), key=key)
    text = (Path(__file__).parent / "assets" / "style.txt").read_text()
    ids = np.array(jlora.load_tokenizer(file)(text)["input_ids"])
    apply = jlora.wrap(partial(llama, config=model.config))

    logits, ours = apply(params, ids[None, :64]), model.apply({"params": params}, ids[None, :64])
    print(f"plain JAX and jlora.models: logits equal to {jnp.max(jnp.abs(logits - ours)):.0e}")

    def windows(key, rows=4, width=64):
        found = jnp.asarray(ids)[jax.random.randint(key, (rows, 1), 0, len(ids) - width) + jnp.arange(width + 1)]
        return found[:, :-1], found[:, 1:]

    return apply, params, windows


def train(name, apply, params, key, *, batch=batch, steps=60, rate=1e-2, falls_to=0.7):
    """AdamW on the adapter alone."""
    report = apply.check(params, batch(key)[0])
    lines = str(report).splitlines()  # a summary, and a line for each weight
    print(f"\n{name}", *lines[:14], *["…"][: len(lines) > 14], sep="\n")
    adapter, base = jlora.split(params)
    tx = optax.adamw(rate)

    def loss_fn(adapter, base, inputs, labels):
        logits = apply(jlora.combine(adapter, base), inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit  # the base is an argument: what is closed over, XLA folds into the program
    def step(adapter, base, opt_state, key):
        loss, grads = jax.value_and_grad(loss_fn)(adapter, base, *batch(key))
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    opt_state, losses = tx.init(adapter), []
    for step_key in jax.random.split(key, steps):
        adapter, opt_state, loss = step(adapter, base, opt_state, step_key)
        losses.append(float(loss))
    last = sum(losses[-5:]) / 5
    print(f"loss {losses[0]:.3f} -> {last:.3f}, {jlora.count(adapter)} parameters trained")
    assert last < falls_to * losses[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["--smol"]:
        apply, params, windows = lighthouse(jax.random.key(1))
        train("SmolLM2", apply, params, jax.random.key(2), batch=windows, steps=30, rate=1e-3, falls_to=0.95)
    else:
        for name, make in {"Linen": linen, "NNX": nnx_module, "plain JAX": plain}.items():
            train(name, *make(jax.random.key(1)), jax.random.key(2))
