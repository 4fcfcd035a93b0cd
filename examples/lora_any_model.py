"""LoRA on models that know nothing of it: a Flax Linen vision transformer, an NNX multilayer perceptron, and plain JAX.

    python examples/lora_any_model.py

Each gets its parameters as a plain tree, puts `LoraWeight` leaves into it, and calls the model through `jlora.wrap`. The
perceptron's and the transformer's frozen kernels are packed to 4 bits as well. The task is made up: tell images by which of
their corners is bright.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
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


def train(name, apply, params, key, steps=60):
    """AdamW on the adapter alone."""
    report = apply.check(params, batch(key)[0])
    print(f"\n{name}\n{report}")
    adapter, base = jlora.split(params)
    tx = optax.adamw(1e-2)

    def loss_fn(adapter, images, corner):
        logits = apply(jlora.combine(adapter, base), images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, corner).mean()

    @jax.jit
    def step(adapter, opt_state, key):
        loss, grads = jax.value_and_grad(loss_fn)(adapter, *batch(key))
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    opt_state, losses = tx.init(adapter), []
    for step_key in jax.random.split(key, steps):
        adapter, opt_state, loss = step(adapter, opt_state, step_key)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {jlora.count(adapter)} parameters trained")
    assert losses[-1] < 0.7 * losses[0]


if __name__ == "__main__":
    for name, make in {"Linen": linen, "NNX": nnx_module, "plain JAX": plain}.items():
        train(name, *make(jax.random.key(1)), jax.random.key(2))
