"""What the model graphs share: modules over the seam, norms, rotary embedding, attention, the two ways to run layers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jlora._typing import AnyArray, Array, Bool, DTypeLike, Float, Int, JsonObject, PyTree
from jlora.lora import embed, linear
from jlora.weight import as_dense, origin

Remat = Literal["none", "layer"]

INIT_STD = 0.02  # GPT-2's and Llama's `initializer_range`


class KVCache(NamedTuple):
    """Keys and values of one layer by position; the stacked form has a leading layer axis on both."""

    k: Float[Array, "batch kv_len kv_heads head_dim"]
    v: Float[Array, "batch kv_len kv_heads head_dim"]


class Rope(NamedTuple):
    """A rotation of queries and keys by their positions."""

    theta: float
    scaling: "Llama3Scaling | LinearScaling | None"


class LayerKind(NamedTuple):
    """What may differ between the layers of one graph, as data."""

    window: int | None = None
    """How many keys a query sees, its own the last; None: all up to its own."""
    rope: Rope | None = None
    """None: queries and keys are not rotated."""


class Context(struct.PyTreeNode):
    """What a layer is told of a call. The layers of one `LayerKind` share it."""

    positions: Int[AnyArray, "batch seq"]
    index: Int[AnyArray, "#batch seq"]
    """Of each query among the keys."""
    mask: Bool[Array, "#batch seq kv_len"] | None
    """Which keys each query sees; None: plain causal, which has faster kernels."""
    rope: tuple[Float[Array, "batch seq head_dim"], Float[Array, "batch seq head_dim"]] | None = None
    """cos and sin of the rotary angles, float32; None: no rotation."""
    blind: Bool[Array, "batch seq"] | None = None
    """Queries that see no key at all, such as those of padding on the left; None: there is none."""
    window: int | None = struct.field(pytree_node=False, default=None)
    """Of a plain causal mask; any other has it among its zeros."""


def stored(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Any:
    """The module's parameter, whatever kind of value it is.

    `nn.Module.param` compares shapes leaf by leaf and would refuse a `Weight` where it initialized an array.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


def vector(module: nn.Module, name: str, init: Callable, size: int, dtype: DTypeLike) -> Float[Array, " size"]:
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
    dtype: DTypeLike

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


def normed(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """Divided by the root of the mean square, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = vector(self, "scale", nn.initializers.ones, x.shape[-1], x.dtype)
        return scale * normed(x, self.eps).astype(x.dtype)


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = vector(self, "scale", nn.initializers.ones, x.shape[-1], jnp.float32)
        bias = vector(self, "bias", nn.initializers.zeros, x.shape[-1], jnp.float32)
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        return (normed(centered, self.eps) * scale + bias).astype(x.dtype)


@jax.checkpoint
def gelu(x: Float[Array, "*batch d_ff"]) -> Float[Array, "*batch d_ff"]:
    """The tanh form, computed in float32.

    Its backward pass starts from `x` again. Autodiff would keep three arrays like it, 8.6 MB a layer with 512 bfloat16
    tokens, whose writing costs more than a second tanh: 48 against 54 ms of CPU time a layer, float32 118 against 121.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class Llama3Scaling(NamedTuple):
    """`rope_type: llama3`: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, inv: np.ndarray) -> np.ndarray:
        turns = (
            self.original_max_position_embeddings * inv / (2 * math.pi)
        )  # full rotations within the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return smooth * inv + (1.0 - smooth) * inv / self.factor


class LinearScaling(NamedTuple):
    """`rope_type: linear`: every wavelength is slowed by `factor`."""

    factor: float

    def scaled(self, inv: np.ndarray) -> np.ndarray:
        return inv / self.factor


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | LinearScaling | None) -> np.ndarray:
    """Inverse frequencies, float32 [head_dim / 2].

    Reference: Su et al. 2021, arXiv:2104.09864; scaling as in transformers' `modeling_rope_utils`.
    """
    inv = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (inv if scaling is None else scaling.scaled(inv)).astype(np.float32)


def rope_angles(positions: Int[AnyArray, "batch seq"], frequencies: np.ndarray):
    """(cos, sin), each float32 [batch, seq, head_dim], halves repeated."""
    # float32: bfloat16 rounds position 257 to 256, a whole radian off in the first pair.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch seq heads head_dim"], rope) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates pairs (i, i + head_dim/2): Hugging Face's half-split convention. `rope` None: not at all."""
    if rope is None:
        return x
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def attention_kernel(
    *, dtype: DTypeLike, head_dim: int, seq: int, kv_len: int, masked: bool, backend: str
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
    mask: Bool[Array, "#batch seq kv_len"] | None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Grouped-query attention, softmax in float32.

    Where kv_len = seq a query must not be allowed a later key, which cuDNN leaves out whatever the mask says.

    Args:
        mask: which keys each query sees; None: those up to its own, kv_len = seq.
        window: without a mask, how many of these; None: all.
        scale: of the scores; None: 1/sqrt(head_dim).
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
    if q.dtype == jnp.float32:
        # Heads first suits float32 (13 against 19 ms), but XLA:CPU runs bfloat16 dots of transposed operands in
        # float32 (16 against 8 ms).
        out = _attend("bhsd", scale, *(x.swapaxes(1, 2) for x in (rows, k, v)), mask).swapaxes(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        out = _attend("bshd", scale, rows, k, v, mask)
    return out.reshape(batch, seq, groups, kv_heads, head_dim).swapaxes(2, 3).reshape(q.shape)  # pyright: ignore[reportAttributeAccessIssue]: a partial `custom_vjp` is typed as object


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(axes: str, scale: float, q: Array, k: Array, v: Array, mask: Bool[Array, "#batch 1 seq kv_len"]) -> Array:
    """Attention of operands whose axes are `axes`, "bshd" or "bhsd"; as many key heads as query heads."""
    return _attend_fwd(axes, scale, q, k, v, mask)[0]


def _product(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


def _attend_fwd(axes, scale, q, k, v, mask):
    keys = axes.replace("s", "t")
    scores = _product(f"{axes},{keys}->bhst", q, k, jnp.float32) * scale
    # A finite floor: a row that sees no key gives a mean of the values, not NaN.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _product(f"bhst,{keys}->{axes}", weights, v, v.dtype), (q, k, v, mask, weights)


def _attend_bwd(axes, scale, residuals, dy):
    # By hand, for the residuals: autodiff keeps float32 scores and exponentials beside the weights.
    q, k, v, mask, weights = residuals
    keys = axes.replace("s", "t")
    dweights = _product(f"{axes},{keys}->bhst", dy, v, jnp.float32)
    centered = dweights - jnp.sum(dweights * weights, axis=-1, keepdims=True)
    dscores = jnp.where(mask, weights * centered * scale, 0.0).astype(q.dtype)
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


def attend(q, k, v, context: Context, cache: KVCache | None, *, scale: float | None = None):
    """Attention over this call's keys, or over the cache after writing them into it at their positions."""
    if cache is not None:
        rows = jnp.arange(q.shape[0])[:, None]
        cache = KVCache(
            cache.k.at[rows, context.positions].set(k.astype(cache.k.dtype), mode="drop"),
            cache.v.at[rows, context.positions].set(v.astype(cache.v.dtype), mode="drop"),
        )
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    y = attention(q, k, v, context.mask, window=context.window, scale=scale)
    if context.blind is not None:
        # As torch's `scaled_dot_product_attention` has it.
        y = jnp.where(context.blind[:, :, None, None], jnp.zeros((), y.dtype), y)
    return y, cache


def segment_positions(segment_ids: Int[AnyArray, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that restart at 0 in every segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def make_context(
    input_ids: Int[AnyArray, "batch seq"],
    positions: Int[AnyArray, "batch seq"] | None,
    segment_ids: Int[AnyArray, "batch seq"] | None,
    attention_mask: Int[AnyArray, "batch seq"] | Bool[AnyArray, "batch seq"] | None,
    cache: Any,
) -> Context:
    """Positions and mask of one call, of layers that see all and rotate nothing; see `contexts_of`.

    With a cache, whose slots are positions, a query at position p sees the keys at 0..p.

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
    index = jnp.arange(shape[1])[None]
    if positions is None:
        positions = jnp.broadcast_to(index, shape) if segment_ids is None else segment_positions(segment_ids)
    if cache is not None:
        length = jax.tree.leaves(cache)[0].shape[-3]
        return Context(positions, positions, jnp.arange(length) <= positions[..., None])
    if not given:
        return Context(positions, index, None)
    if segment_ids is not None:
        return Context(positions, index, causal(shape[1]) & (segment_ids[:, :, None] == segment_ids[:, None, :]))
    seen = jnp.asarray(attention_mask, bool)
    return Context(positions, index, causal(shape[1]) & seen[:, None, :], blind=jnp.cumsum(seen, axis=1) == 0)


def contexts_of(context: Context, kinds: Sequence[LayerKind], head_dim: int) -> tuple[list[Context], list[int]]:
    """(the context of each kind of layer that there is, which of these each layer has)."""
    distinct = list(dict.fromkeys(kinds))
    ropes: dict[Rope | None, Any] = {None: None}
    for rope in dict.fromkeys(kind.rope for kind in distinct):
        if rope is not None:
            ropes[rope] = rope_angles(context.positions, rope_frequencies(head_dim, *rope))
    base = context.mask
    masks = {kind.window: None if base is None else within(kind.window, base, context.index) for kind in distinct}
    found = [
        context.replace(mask=masks[window], window=window if base is None else None, rope=ropes[rope])
        for window, rope in distinct
    ]
    return found, [distinct.index(kind) for kind in kinds]


def _alternatives(contexts: Sequence[Context]) -> JsonObject:
    """The fields in which contexts differ, as arrays with a leading axis over them. For a scan, whose layers are one program:
    windows become masks, and what is not rotated is rotated by nothing."""
    differing: JsonObject = {}
    if len({context.window for context in contexts}) > 1 or len({id(context.mask) for context in contexts}) > 1:
        masks = [causal(c.index.shape[1]) if c.mask is None else c.mask for c in contexts]
        differing["mask"] = jnp.stack([within(c.window, m, c.index) for c, m in zip(contexts, masks, strict=True)])
        differing["window"] = None
    ropes = [context.rope for context in contexts]
    rotated = next((rope for rope in ropes if rope is not None), None)
    if rotated is not None and len({id(rope) for rope in ropes}) > 1:
        still = jnp.ones_like(rotated[0]), jnp.zeros_like(rotated[1])
        differing["rope"] = jax.tree.map(lambda *x: jnp.stack(x), *(still if rope is None else rope for rope in ropes))
    return differing


class Layers(nn.Module):
    """Layers one after the other, each with its own subtree "0", "1", …"""

    block: Callable[..., nn.Module]
    kinds: Sequence[int]

    @nn.compact
    def __call__(self, x, cache, contexts):
        caches = []
        for i, kind in enumerate(self.kinds):
            x, cache_i = self.block(name=str(i))(x, None if cache is None else cache[i], contexts[kind])
            caches.append(cache_i)
        return x, None if cache is None else caches


def run_layers(
    parent: nn.Module,
    name: str,
    block: type[nn.Module],
    remat: Remat,
    x,
    cache,
    contexts: Sequence[Context],
    kinds: Sequence[int],
    **kwargs,
):
    """Runs a block a layer in the form that the parameters have: unrolled per layer, or one `nn.scan` over a stack.

    Args:
        parent: the module whose compact method calls this; holds the layers' parameters under `name`.
        block: module class; called as `block(**kwargs)(x, cache, context) -> (x, cache)`.
        remat: "layer": nothing but each layer's input is kept for the backward pass.
        cache: None, a list of `KVCache`, or one stacked `KVCache`.
        contexts, kinds: of `contexts_of`.

    Returns:
        (x, updated cache)
    """
    stacked = not parent.is_initializing() and "0" not in parent.variables["params"][name]
    if not stacked:
        block = nn.remat(block) if remat == "layer" else block
        return Layers(lambda name: block(**kwargs, name=name), tuple(kinds), name=name)(x, cache, contexts)
    differing = _alternatives(contexts) if len(contexts) > 1 else {}

    def layer(block, x, own, context, differing):
        cache, kind = own
        chosen = jax.tree.map(lambda alternatives: alternatives[kind], differing)
        return block(x, cache, context.replace(**chosen))

    scanned = nn.scan(
        # The choice is rematerialized with the layer, or every layer would keep its mask.
        nn.remat(layer, prevent_cse=False) if remat == "layer" else layer,
        variable_axes={"params": 0},
        split_rngs={"params": False},
        in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        out_axes=0,
        length=len(kinds),
    )
    own = cache, jnp.asarray(kinds) if differing else None
    return scanned(block(**kwargs, name=name), x, own, contexts[0], differing)


def frozen_base(w: PyTree) -> PyTree:
    """The weight as it was before it was adapted: a tied head multiplies by the embedding's base, as in PEFT."""
    return origin(w)
