"""Grouped-query attention: the choice of its kernel, the one that is ours, and masks."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jlora._processor import not_before
from jlora._typing import AnyArray, Array, Bool, DTypeLike, Float, Int


def attention_kernel(
    *, dtype: DTypeLike, head_dim: int, seq: int, kv_len: int, masked: bool, backend: str
) -> Literal["cudnn", "xla"]:
    """Which attention runs: "cudnn" (flash) for 16-bit attention of a row to itself on a GPU, "xla" otherwise.

    cuDNN takes head_dim a multiple of 8 up to 128, and a mask as an additive bias of rows of even length, from Ampere on.
    """
    fits = backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    fits = fits and _compute_capability() >= 8.0
    return "cudnn" if fits and seq == kv_len and not (masked and seq % 2) else "xla"


def _compute_capability() -> float:
    """Of the GPU, such as 7.5 of a T4; infinite of one that does not say."""
    return float(getattr(jax.devices()[0], "compute_capability", "inf"))


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    mask: Bool[Array, "#batch seq kv_len"] | None,
    *,
    window: int | None = None,
    scale: float | None = None,
    recompute: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Grouped-query attention, softmax in float32.

    Where kv_len = seq a query must not be allowed a later key, which cuDNN leaves out whatever the mask says.

    Args:
        mask: which keys each query sees; None: those up to its own, kv_len = seq.
        window: without a mask, how many of these; None: all.
        scale: of the scores; None: 1/sqrt(head_dim).
        recompute: calculate the weights [batch, heads, seq, kv_len] again in the backward pass instead of keeping them, as "cudnn"
            always does.
    """
    batch, seq, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    window = None if window is None or window >= seq else window
    kv_heads = k.shape[2]
    kernel = attention_kernel(
        dtype=q.dtype, head_dim=head_dim, seq=seq, kv_len=k.shape[1], masked=mask is not None, backend=jax.default_backend()
    )  # fmt: skip
    if kernel == "cudnn":
        heads_alike = None if mask is None else mask[:, None]
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, mask=heads_alike, is_causal=True, scale=scale, local_window_size=local, implementation="cudnn"
        )
    if mask is None:
        mask = within(window, causal(seq), jnp.arange(seq)[None])
    groups = heads // kv_heads
    # The query heads that share a key head are more rows of it, so that everything below has four axes: with the group
    # as a fifth, XLA:CPU took twice as long (a layer of GPT-2 forward and backward, 512 tokens, CPU time: float32 27
    # against 13 ms, bfloat16 24 against 8).
    rows = q.reshape(batch, seq, kv_heads, groups, head_dim).swapaxes(2, 3).reshape(batch, -1, kv_heads, head_dim)
    mask = jnp.repeat(mask, groups, axis=1)[:, None]
    if q.dtype == jnp.float32 or k.shape[1] != seq:  # a cache has its heads first too
        # Heads first suits float32 (13 against 19 ms), but XLA:CPU runs bfloat16 dots of transposed operands in
        # float32 (16 against 8 ms).
        out = _attend("bhsd", scale, recompute, *(x.swapaxes(1, 2) for x in (rows, k, v)), mask).swapaxes(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        out = _attend("bshd", scale, recompute, rows, k, v, mask)
    return out.reshape(batch, seq, groups, kv_heads, head_dim).swapaxes(2, 3).reshape(q.shape)  # pyright: ignore[reportAttributeAccessIssue]: a partial `custom_vjp` is typed as object


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    axes: str, scale: float, recompute: bool, q: Array, k: Array, v: Array, mask: Bool[Array, "#batch 1 seq kv_len"]
) -> Array:
    """Attention of operands whose axes are `axes`, "bshd" or "bhsd"; as many key heads as query heads."""
    return _attend_fwd(axes, scale, recompute, q, k, v, mask)[0]


def _product(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


def _weights(axes, scale, q, k, mask, dtype):
    """Of each query the weights of the keys, [batch, heads, seq, kv_len]."""
    keys = axes.replace("s", "t")
    scores = _product(f"{axes},{keys}->bhst", q, k, jnp.float32) * scale
    # A finite floor: a row that sees no key gives a mean of the values, not NaN.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _attend_fwd(axes, scale, recompute, q, k, v, mask):
    weights = _weights(axes, scale, q, k, mask, v.dtype)
    out = _product(f"bhst,{axes.replace('s', 't')}->{axes}", weights, v, v.dtype)
    return out, (q, k, v, mask, None if recompute else weights, out)


def _attend_bwd(axes, scale, recompute, residuals, dy):
    # By hand, for the residuals: autodiff keeps float32 scores and exponentials beside the weights.
    q, k, v, mask, weights, out = residuals
    if recompute:
        weights = _weights(axes, scale, not_before(dy, q), k, mask, v.dtype)
    keys = axes.replace("s", "t")
    dweights = _product(f"{axes},{keys}->bhst", dy, v, jnp.float32)
    # The mean of the cotangents under the weights, of head_dim terms instead of kv_len (FlashAttention-2, section 2.3.2).
    mean = jnp.einsum(f"{axes},{axes}->bhs", dy, out, preferred_element_type=jnp.float32)[..., None]
    dscores = jnp.where(mask, weights * (dweights - mean) * scale, 0.0).astype(q.dtype)
    # The scores go first: XLA:CPU 0.10 compiles some of the swapped products to a bfloat16 dot that it cannot run.
    dq = _product(f"bhst,{keys}->{axes}", dscores, k, q.dtype)
    dk = _product(f"bhst,{axes}->{keys}", dscores, q, k.dtype)
    dv = _product(f"bhst,{axes}->{keys}", weights, dy, v.dtype)
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def causal(seq: int) -> Bool[Array, "1 seq seq"]:
    return jnp.tril(jnp.ones((seq, seq), bool))[None]


def within(
    window: int | None, mask: Bool[Array, "#batch seq kv_len"], index: Int[AnyArray, "#batch seq"]
) -> Bool[Array, "#batch seq kv_len"]:
    """The mask without the keys that lie `window` or more before their query, whose index among them is `index`."""
    keys = mask.shape[-1]
    return mask if window is None or window >= keys else mask & (jnp.arange(keys) > index[..., None] - window)
