"""What the model graphs share: modules over the seam, norms, rotary embedding, attention, the two ways to run layers."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, Bool, Float, Int
from jlora.lora import embed, linear
from jlora.weight import Weight, as_dense, origin

Remat = Literal["none", "layer"]

INIT_STD = 0.02  # GPT-2's and Llama's `initializer_range`


class KVCache(NamedTuple):
    """Keys and values of one layer by position; the stacked form has a leading layer axis on both."""

    k: Float[Array, "batch kv_len kv_heads head_dim"]
    v: Float[Array, "batch kv_len kv_heads head_dim"]


class Context(NamedTuple):
    """What every layer of one call shares."""

    positions: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq kv_len"] | None
    """Which keys each query sees; None: plain causal, which has faster kernels."""
    rope: tuple[Float[Array, "batch seq head_dim"], Float[Array, "batch seq head_dim"]] | None
    """cos and sin of the rotary angles, float32."""
    blind: Bool[Array, "batch seq"] | None = None
    """Queries that see no key at all, such as those of padding on the left; None: there is none."""


def stored(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Any:
    """The module's parameter, whatever kind of value it is.

    `nn.Module.param` compares shapes leaf by leaf and would refuse a `Weight` where it initialized an array.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


def vector(module: nn.Module, name: str, init: Callable, size: int, dtype: Any) -> Float[Array, " size"]:
    """A bias or a scale in `dtype`, whatever kind of value the parameter is."""
    return as_dense(stored(module, name, init, (size,)), dtype)


class Linear(nn.Module):
    """`x @ kernel + bias` through the seam; kernel [in, out]."""

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = stored(self, "kernel", nn.initializers.normal(INIT_STD), (x.shape[-1], self.features))
        y = linear(x, kernel)
        if self.use_bias:
            y = y + vector(self, "bias", nn.initializers.zeros, self.features, y.dtype)
        return y


class Embed(nn.Module):
    """Rows of an embedding [vocab, d_model], in `dtype`."""

    vocab: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        table = stored(self, "embedding", nn.initializers.normal(INIT_STD), (self.vocab, self.features))
        return embed(ids, table).astype(self.dtype)


class Head(nn.Module):
    """Holds an untied head's kernel [d_model, vocab]."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self):
        return stored(self, "kernel", nn.initializers.normal(INIT_STD), self.shape)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = vector(self, "scale", nn.initializers.ones, x.shape[-1], x.dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return scale * normed.astype(x.dtype)


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = vector(self, "scale", nn.initializers.ones, x.shape[-1], jnp.float32)
        bias = vector(self, "bias", nn.initializers.zeros, x.shape[-1], jnp.float32)
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.eps)
        return (normed * scale + bias).astype(x.dtype)


class Llama3Scaling(NamedTuple):
    """`rope_type: llama3`: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> np.ndarray:
    """Inverse frequencies, float32 [head_dim / 2].

    Reference: Su et al. 2021, arXiv:2104.09864; `llama3` scaling as in transformers' `modeling_rope_utils`.
    """
    inv = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        original = scaling.original_max_position_embeddings
        turns = original * inv / (2 * math.pi)  # full rotations within the original context
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        inv = smooth * inv + (1.0 - smooth) * inv / scaling.factor
    return inv.astype(np.float32)


def rope_angles(positions: Int[Array, "batch seq"], frequencies: np.ndarray):
    """(cos, sin), each float32 [batch, seq, head_dim], halves repeated."""
    # float32: bfloat16 rounds position 257 to 256, a whole radian off in the first pair.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch seq heads head_dim"], rope) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates pairs (i, i + head_dim/2): Hugging Face's half-split convention."""
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def attention_kernel(
    *, dtype: Any, head_dim: int, seq: int, kv_len: int, masked: bool, backend: str
) -> Literal["cudnn", "xla"]:
    """Which attention runs: "cudnn" (flash) for 16-bit attention of a row to itself on a GPU, "xla" otherwise.

    cuDNN takes head_dim a multiple of 8 up to 128, and a mask as an additive bias of rows of even length.
    """
    fits = backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if fits and seq == kv_len and not (masked and seq % 2) else "xla"


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    mask: Bool[Array, "batch seq kv_len"] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Grouped-query attention, scaled by 1/sqrt(head_dim), softmax in float32. `mask` None: causal, kv_len = seq.

    Where kv_len = seq a query must not be allowed a later key, which cuDNN leaves out whatever the mask says.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    kernel = attention_kernel(
        dtype=q.dtype, head_dim=head_dim, seq=seq, kv_len=k.shape[1], masked=mask is not None, backend=jax.default_backend()
    )  # fmt: skip
    if kernel == "cudnn":
        heads_alike = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=heads_alike, is_causal=True, implementation="cudnn")
    if mask is None:
        mask = jnp.tril(jnp.ones((seq, seq), bool))[None]
    groups = heads // kv_heads
    # The query heads that share a key head are more rows of it, so that everything below has four axes: with the group
    # as a fifth, XLA:CPU took twice as long (a layer of GPT-2 forward and backward, 512 tokens, CPU time: float32 27
    # against 13 ms, bfloat16 24 against 8).
    rows = q.reshape(batch, seq, kv_heads, groups, head_dim).swapaxes(2, 3).reshape(batch, -1, kv_heads, head_dim)
    mask = jnp.repeat(mask, groups, axis=1)[:, None]
    if q.dtype == jnp.float32:
        # Heads first suits float32 (13 against 19 ms), but XLA:CPU runs bfloat16 dots of transposed operands in
        # float32 (16 against 8 ms).
        out = _attend("bhsd", *(x.swapaxes(1, 2) for x in (rows, k, v)), mask).swapaxes(1, 2)
    else:
        out = _attend("bshd", rows, k, v, mask)
    return out.reshape(batch, seq, groups, kv_heads, head_dim).swapaxes(2, 3).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(axes: str, q: Array, k: Array, v: Array, mask: Bool[Array, "#batch 1 seq kv_len"]) -> Array:
    """Attention of operands whose axes are `axes`, "bshd" or "bhsd"; as many key heads as query heads."""
    return _attend_fwd(axes, q, k, v, mask)[0]


def _product(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


def _attend_fwd(axes, q, k, v, mask):
    keys = axes.replace("s", "t")
    scores = _product(f"{axes},{keys}->bhst", q, k, jnp.float32) * q.shape[-1] ** -0.5
    # A finite floor: a row that sees no key gives a mean of the values, not NaN.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _product(f"bhst,{keys}->{axes}", weights, v, v.dtype), (q, k, v, mask, weights)


def _attend_bwd(axes, residuals, dy):
    # By hand, for the residuals: autodiff keeps float32 scores and exponentials beside the weights.
    q, k, v, mask, weights = residuals
    keys = axes.replace("s", "t")
    dweights = _product(f"{axes},{keys}->bhst", dy, v, jnp.float32)
    centered = dweights - jnp.sum(dweights * weights, axis=-1, keepdims=True)
    dscores = jnp.where(mask, weights * centered * q.shape[-1] ** -0.5, 0.0).astype(q.dtype)
    # The scores go first: XLA:CPU 0.10 compiles some of the swapped products to a bfloat16 dot that it cannot run.
    dq = _product(f"bhst,{keys}->{axes}", dscores, k, q.dtype)
    dk = _product(f"bhst,{axes}->{keys}", dscores, q, k.dtype)
    dv = _product(f"bhst,{axes}->{keys}", weights, dy, v.dtype)
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend(q, k, v, context: Context, cache: KVCache | None):
    """Attention over this call's keys, or over the cache after writing them into it at their positions."""
    if cache is not None:
        rows = jnp.arange(q.shape[0])[:, None]
        cache = KVCache(
            cache.k.at[rows, context.positions].set(k.astype(cache.k.dtype), mode="drop"),
            cache.v.at[rows, context.positions].set(v.astype(cache.v.dtype), mode="drop"),
        )
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    y = attention(q, k, v, context.mask)
    if context.blind is not None:
        # As torch's `scaled_dot_product_attention` has it.
        y = jnp.where(context.blind[:, :, None, None], jnp.zeros((), y.dtype), y)
    return y, cache


def segment_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that restart at 0 in every segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def make_context(
    input_ids: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    attention_mask: Bool[Array, "batch seq"] | None,
    cache: Any,
) -> Context:
    """Positions and mask of one call (without rope). With a cache, a query at position p sees the keys at 0..p.

    Raises:
        ValueError: for both kinds of mask at once, one of them with a cache, or a mask that is not [batch, seq].
    """
    shape = input_ids.shape
    masks = {"segment_ids": segment_ids, "attention_mask": attention_mask}
    given = [name for name, mask in masks.items() if mask is not None]
    if len(given) + (cache is not None) > 1:
        raise ValueError(
            f"`{given[0]}` does not go together with {'a cache' if cache is not None else '`attention_mask`'}: give one of them."
        )
    for name in given:
        mask = jnp.asarray(masks[name])
        if mask.shape != shape or jnp.issubdtype(mask.dtype, jnp.inexact):
            raise ValueError(
                f"`{name}` must be integers {list(shape)} like the ids; got {mask.dtype} {list(mask.shape)}."
            )
    if positions is None:
        index = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        positions = index if segment_ids is None else segment_positions(segment_ids)
    if cache is not None:
        length = jax.tree.leaves(cache)[0].shape[-3]
        return Context(positions, jnp.arange(length) <= positions[..., None], None)
    if not given:
        return Context(positions, None, None)
    causal = jnp.tril(jnp.ones((shape[1], shape[1]), bool))
    if segment_ids is not None:
        return Context(positions, causal & (segment_ids[:, :, None] == segment_ids[:, None, :]), None)
    seen = jnp.asarray(attention_mask, bool)
    return Context(positions, causal & seen[:, None, :], None, jnp.cumsum(seen, axis=1) == 0)


class Layers(nn.Module):
    """Layers one after the other, each with its own subtree "0", "1", …"""

    block: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(self, x, cache, context):
        caches = []
        for i in range(self.depth):
            x, cache_i = self.block(name=str(i))(x, None if cache is None else cache[i], context)
            caches.append(cache_i)
        return x, None if cache is None else caches


def run_layers(
    parent: nn.Module, name: str, block: type[nn.Module], depth: int, remat: Remat, x, cache, context, **kwargs
):
    """Runs `depth` blocks in the form that the parameters have: unrolled per layer, or one `nn.scan` over a stack.

    Args:
        parent: the module whose compact method calls this; holds the layers' parameters under `name`.
        block: module class; called as `block(**kwargs)(x, cache, context) -> (x, cache)`.
        remat: "layer": nothing but each layer's input is kept for the backward pass.
        cache: None, a list of `KVCache`, or one stacked `KVCache`.

    Returns:
        (x, updated cache)
    """
    stacked = not parent.is_initializing() and "0" not in parent.variables["params"][name]
    if remat == "layer":
        block = nn.remat(block, prevent_cse=not stacked)
    if not stacked:
        return Layers(lambda name: block(**kwargs, name=name), depth, name=name)(x, cache, context)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": False},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        out_axes=0,
        length=depth,
    )
    return scanned(**kwargs, name=name)(x, cache, context)


def frozen_base(w: Any) -> Array | Weight:
    """The weight as it was before it was adapted: a tied head multiplies by the embedding's base, as in PEFT."""
    return origin(w)
