"""Rows that come and go: a cache with a slot for each, filled with one prompt piece by piece, and a step of all rows at once.

`begin` and `advance` run a batch from its first token to its last. Here each row is somewhere else: it has its own position,
adapter and way to draw, which are values, so that one compiled step serves every mixture of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._typing import AnyArray, Array, Bool, Float, Int, Params
from jlora.generation.sampling import Draws, pick_each
from jlora.lora import route
from jlora.models import Model

ALTERNATIVES = 20
"""Of a token, whose log-probabilities can be had: as many as OpenAI's interface gives."""


class Drawn(NamedTuple):
    """The next token of each row, and what the model thought of it."""

    tokens: Int[Array, " batch"]
    sound: Bool[Array, " batch"]
    """Whether the row's logits were finite."""
    logprobs: Float[Array, " batch"]
    """Of the token among all, before temperature and truncation; 0 where nobody asked, as below."""
    top_logprobs: Float[Array, "batch alternatives"]
    top_tokens: Int[Array, "batch alternatives"]
    """The likeliest first."""


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def fill(
    model: Model,
    params: Params,
    cache: Any,
    ids: Int[AnyArray, "1 width"],
    start: Int[AnyArray, ""],
    count: Int[AnyArray, ""],
    slot: Int[AnyArray, ""],
    adapters: Int[AnyArray, "1"] | None,
    draws: Draws,
    inform: Bool[AnyArray, ""],
) -> tuple[Drawn, Any]:
    """The next piece of a prompt into a slot: (the token that would follow it, the updated cache).

    The arithmetic is of this prompt alone: nothing depends on what the other slots hold.

    Args:
        params: in the form for decoding; with several adapters, or with none.
        ids: padded on the right. What padding writes is overwritten before it can be seen.
        start: the position of the first one.
        count: how many of them are no padding.
        adapters: the number of the row's adapter, -1: the base alone; None: `params` holds none.
        draws: of the one row.
        inform: whether log-probabilities are asked for.
    """

    def axis(x):
        return x.ndim - 4  # behind the layers of a stack

    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis(x)), cache)
    positions = start + jnp.arange(ids.shape[1])[None]
    routed = _routed(params, adapters)
    hidden, row = model.apply({"params": routed}, ids, positions=positions, cache=row, head=False)
    cache = jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, slot, axis(x)), cache, row)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    return _drawn(model.logits(routed, last), draws, inform), cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def step(
    model: Model,
    params: Params,
    cache: Any,
    tokens: Int[AnyArray, " batch"],
    positions: Int[AnyArray, " batch"],
    adapters: Int[AnyArray, " batch"] | None,
    draws: Draws,
    inform: Bool[AnyArray, ""],
) -> tuple[Drawn, Any]:
    """One more token of every row: (what was drawn, the updated cache).

    A row's token depends on its own slot and settings alone. Idle rows stand at the position behind the cache's last, where nothing
    is written.

    Args:
        tokens: the last one of each row.
        positions: where it stands.
        adapters, inform: as in `fill`, for each row and for all.
    """
    routed = _routed(params, adapters)
    hidden, cache = model.apply(
        {"params": routed}, tokens[:, None], positions=positions[:, None], cache=cache, head=False
    )
    return _drawn(model.logits(routed, hidden[:, 0]), draws, inform), cache


def _routed(params: Params, adapters: Int[AnyArray, " batch"] | None) -> Any:
    return params if adapters is None else route(params, adapters)


def _drawn(logits: Float[Array, "batch vocab"], draws: Draws, inform: Bool[AnyArray, ""]) -> Drawn:
    tokens = pick_each(logits, draws)
    batch, count = logits.shape[0], min(ALTERNATIVES, logits.shape[1])

    def informed():
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0], *jax.lax.top_k(logprobs, count)

    def silent():
        return jnp.zeros(batch), jnp.zeros((batch, count)), jnp.zeros((batch, count), jnp.int32)

    return Drawn(tokens, jnp.all(jnp.isfinite(logits), axis=-1), *jax.lax.cond(inform, informed, silent))
