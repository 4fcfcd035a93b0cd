"""What layers are told of a call: positions, which keys a query sees, the rotation; and the cache of keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlora._typing import AnyArray, Array, Bool, Float, Int, JsonObject
from jlora.models.attention import attention, causal, within
from jlora.models.rope import Rope, rope_angles, rope_frequencies


class KVCache(NamedTuple):
    """Keys and values of one layer by position; the stacked form has a leading layer axis on both.

    Heads come first, as in the products: with positions first each token would transpose all that were before it.
    """

    k: Float[Array, "batch kv_heads kv_len head_dim"]
    v: Float[Array, "batch kv_heads kv_len head_dim"]


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
    recompute: bool = struct.field(pytree_node=False, default=False)
    """Whether the attention weights are calculated again in the backward pass."""


def attend(q, k, v, context: Context, cache: KVCache | None, *, scale: float | None = None):
    """Attention over this call's keys, or over the cache after writing them into it at their positions."""
    if cache is not None:
        cache = KVCache(_written(cache.k, k, context.positions), _written(cache.v, v, context.positions))
        k, v = cache.k.swapaxes(1, 2), cache.v.swapaxes(1, 2)
    q_as_k, recompute = q.astype(k.dtype), context.recompute
    y = attention(q_as_k, k, v, context.mask, window=context.window, scale=scale, recompute=recompute).astype(q.dtype)
    if context.blind is not None:
        # As torch's `scaled_dot_product_attention` has it.
        y = jnp.where(context.blind[:, :, None, None], jnp.zeros((), y.dtype), y)
    return y, cache


def _written(
    kept: Float[Array, "batch kv_heads kv_len head_dim"],
    new: Float[Array, "batch seq kv_heads head_dim"],
    positions: Int[AnyArray, "batch seq"],
) -> Float[Array, "batch kv_heads kv_len head_dim"]:
    """The cache with what is new at its positions; behind the last one nothing is written."""
    if new.shape[:2] == (1, 1) and jax.default_backend() == "cpu":
        # XLA:CPU makes a slice of a single write, and fuses it into the products that read the cache: they get a copy of all of it.
        # With a second one, which falls behind the end, it is written in place (30 layers of SmolLM2 with 512 positions: attention
        # takes 6.6 instead of 25.6 ms on two AVX2 cores).
        positions = jnp.concatenate([positions, jnp.full_like(positions, kept.shape[2])], axis=1)
        new = jnp.repeat(new, 2, axis=1)
    rows = jnp.arange(new.shape[0])[:, None]
    return kept.at[rows, :, positions].set(new.astype(kept.dtype), mode="drop")


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
        length = jax.tree.leaves(cache)[0].shape[-2]
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


def alternatives(contexts: Sequence[Context]) -> JsonObject:
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
