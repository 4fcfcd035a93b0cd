"""The two compiled programs of a generation: the prompt at once, and what follows token by token."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._typing import Array, Bool, Int, Params
from jlora.generation.sampling import Draw, pick
from jlora.models import Model, empty_cache

_DOUBLED_UP_TO = 512
_LEAST_WIDTH, _LEAST_CAPACITY = 32, 256


def bucket(length: int, least: int) -> int:
    """`length` rounded up to one of a few sizes, so that similar ones share a compilation: `least` times a power of two up to
    512, from there on multiples of 512.

    >>> [bucket(n, 32) for n in (1, 32, 33, 500, 513, 1500)]
    [32, 32, 64, 512, 1024, 1536]
    """
    size = least
    while size < min(length, _DOUBLED_UP_TO):
        size *= 2
    return size if length <= size else -(-length // _DOUBLED_UP_TO) * _DOUBLED_UP_TO


def width_of(longest: int, capacity: int) -> int:
    """To which prompts are padded on the right."""
    return min(bucket(longest, _LEAST_WIDTH), capacity)


def capacity_of(model: Model, positions: int) -> int:
    """Of a cache for so many positions."""
    return min(bucket(positions, _LEAST_CAPACITY), model.config.max_length)


@dataclasses.dataclass
class Past:
    """Keys and values of one row, kept from call to call of `stream`: what a prompt begins with and is there is not computed again.

    Belongs to one model with one set of parameters; take a new one for another adapter.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    """The tokens whose keys and values are there, from the first position on."""
    cache: Any = None

    def shared(self, prompt: list[int]) -> int:
        """How many tokens of the prompt are there. Never all: the last one is what the next is drawn from."""
        same = next((i for i, (a, b) in enumerate(zip(self.ids, prompt, strict=False)) if a != b), None)
        return min(len(self.ids) if same is None else same, len(prompt) - 1)


class State(NamedTuple):
    """Between two tokens."""

    step: Int[Array, ""]
    """How many tokens have been drawn."""
    token: Int[Array, " batch"]
    """The last one of each row."""
    ended: Bool[Array, " batch"]
    counts: Int[Array, " batch"]
    """Tokens of each row up to and including its end."""
    sound: Bool[Array, ""]
    """Whether all logits were finite."""
    lengths: Int[Array, " batch"]
    """Of the prompts."""
    out: Int[Array, "batch capacity"]
    cache: Any


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity", "stacked"))
def new_cache(model: Model, batch: int, capacity: int, stacked: bool) -> Any:
    return empty_cache(model, batch, capacity, stacked=stacked)


@functools.partial(jax.jit, static_argnames="capacity")
def grown(cache: Any, capacity: int) -> Any:
    """The cache with room for more positions."""

    def grow(x):
        return jnp.pad(x, [(0, capacity - n if axis == x.ndim - 2 else 0) for axis, n in enumerate(x.shape)])

    return jax.tree.map(grow, cache)


def capacity_in(cache: Any) -> int:
    return jax.tree.leaves(cache)[0].shape[-2]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def begin(model: Model, params: Params, prompts, start, lengths, cache, draw: Draw) -> State:
    """The state with the first token drawn.

    Args:
        prompts: int32 [batch, width], from position `start` on, padded on the right.
        start: int32 [], what is in the cache before it is taken as it is.
        lengths: int32 [batch], whole prompts.
    """
    batch, width = prompts.shape
    # A token's cache slot is its position, and a query sees slots up to its own: what prompt padding wrote behind a
    # short row is overwritten before it can be seen.
    positions = jnp.broadcast_to(start + jnp.arange(width), prompts.shape)
    hidden, cache = model.apply({"params": params}, prompts, positions=positions, cache=cache, head=False)
    last = jnp.take_along_axis(hidden, (lengths - start - 1)[:, None, None], axis=1)[:, 0]
    token, sound = _next(model, params, last, draw, 0)
    out = jnp.zeros((batch, capacity_in(cache)), jnp.int32).at[:, 0].set(token)
    ended = jnp.isin(token, draw.stops)
    return State(jnp.int32(1), token, ended, jnp.ones(batch, jnp.int32), sound, lengths, out, cache)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def advance(model: Model, params: Params, state: State, draw: Draw, limit) -> State:
    """The state after more tokens, until there are `limit` (int32 []) or all rows have ended."""

    def more(state: State):
        return (state.step < limit) & ~jnp.all(state.ended)

    def extend(state: State):
        step, token, ended, counts, sound, lengths, out, cache = state
        positions = (lengths + step - 1)[:, None]
        hidden, cache = model.apply({"params": params}, token[:, None], positions=positions, cache=cache, head=False)
        token, finite = _next(model, params, hidden[:, 0], draw, step)
        out = out.at[:, step].set(token)
        ended, counts = ended | jnp.isin(token, draw.stops), counts + ~ended
        return State(step + 1, token, ended, counts, sound & finite, lengths, out, cache)

    return jax.lax.while_loop(more, extend, state)


def _next(model: Model, params: Params, hidden, draw: Draw, step) -> tuple[Int[Array, " batch"], Bool[Array, ""]]:
    """(token of each row, whether all logits are finite)."""
    logits = model.logits(params, hidden)
    return pick(logits, draw, step), jnp.all(jnp.isfinite(logits))
