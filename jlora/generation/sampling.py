"""How the next token is drawn from logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import AnyArray, Array, Float, Int, PRNGKeyArray, UInt32


class Sampling(NamedTuple):
    """How to sample where nothing is said."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95


SAMPLING = Sampling()

_FEW = 128
"""Up to this `top_k` only so many logits are ranked: of 49,152 that takes a fraction of the time of sorting all."""
_STOPS = 8
"""Ids that end a row are filled up to a multiple of this, so that another number of them compiles nothing."""


class Draw(NamedTuple):
    """How to draw, as values: others compile nothing anew."""

    key: PRNGKeyArray
    temperature: Any
    """float32 []; 0: the likeliest token."""
    top_k: Any
    """int32 []."""
    top_p: Any
    """float32 []."""
    stops: np.ndarray
    """int32, -1 where there is none."""

    @classmethod
    def of(cls, *, key, temperature: float, top_k: int, top_p: float, stops: Sequence[int], vocab_size: int) -> "Draw":
        """Of arguments that have been checked."""
        return cls(
            jax.random.key(0) if key is None else key,
            np.float32(temperature),
            np.int32(min(top_k or vocab_size, vocab_size)),
            np.maximum(np.float32(top_p), np.finfo(np.float32).tiny),
            np.array([*stops, *[-1] * (-len(stops) % _STOPS or (0 if stops else _STOPS))], np.int32),
        )


def pick(logits: Float[Array, "batch vocab"], draw: Draw, step: Int[Array, ""] | int) -> Int[Array, " batch"]:
    """The next token of each row, which depends on its logits, the key, its index and the step alone."""

    def likeliest():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        kept = truncate(logits / draw.temperature, top_k=draw.top_k, top_p=draw.top_p)
        rows = jnp.arange(logits.shape[0])
        return jax.vmap(_drawn, (None, 0, None, 0))(draw.key, rows, step, kept)

    return jax.lax.cond(draw.temperature == 0, likeliest, drawn)


def _drawn(key: PRNGKeyArray, row, step, logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """A token of one row: which one depends on the key, the row's index and the step."""
    key = jax.random.fold_in(jax.random.fold_in(key, row), step)
    return jax.random.categorical(key, logits).astype(jnp.int32)


class Draws(NamedTuple):
    """How each row of a batch draws its next token, as values: others compile nothing anew."""

    seeds: UInt32[AnyArray, " batch"]
    """Row by row the `key` of `generate` is `jax.random.key(seed)`."""
    rows: Int[AnyArray, " batch"]
    """The index that the row would have in a call of `generate`."""
    steps: Int[AnyArray, " batch"]
    """How many tokens the row has drawn before."""
    temperatures: Float[AnyArray, " batch"]
    """0: the likeliest token."""
    top_k: Int[AnyArray, " batch"]
    """As many as there are tokens: all."""
    top_p: Float[AnyArray, " batch"]


def pick_each(logits: Float[Array, "batch vocab"], draws: Draws) -> Int[Array, " batch"]:
    """The next token of each row, drawn in its own way: the one that `generate` draws there with the same settings, whatever the
    other rows are."""
    greedy = draws.temperatures == 0
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        scaled = logits / jnp.where(greedy, 1.0, draws.temperatures)[:, None]
        kept = truncate(scaled, top_k=draws.top_k[:, None], top_p=draws.top_p[:, None])
        keys = jax.vmap(jax.random.key)(draws.seeds)
        return jnp.where(greedy, likeliest, jax.vmap(_drawn)(keys, draws.rows, draws.steps, kept))

    return jax.lax.cond(jnp.all(greedy), lambda: likeliest, drawn)


def truncate(
    logits: Float[Array, "batch vocab"],
    *,
    top_k: Int[AnyArray, ""] | Int[AnyArray, "batch 1"] | int,
    top_p: Float[AnyArray, ""] | Float[AnyArray, "batch 1"] | float,
) -> Float[Array, "batch vocab"]:
    """Logits with all but the `top_k` likeliest tokens, and of those all beyond probability `top_p`, at -inf.

    Both are of all rows, or one for each; what is kept of a row does not depend on the others.

    Reference: nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751; the order of the two is transformers'.
    """
    few = jnp.asarray(top_k) <= _FEW
    # Sorting the whole vocabulary takes longer than a small model's step: not where all of it is kept.
    many = ~few & ((jnp.asarray(top_k) < logits.shape[-1]) | (jnp.asarray(top_p) < 1.0))

    def floor(ranked):
        """The least logit that is kept, of the greatest ones in falling order: at least `top_k` of them."""
        among_k = jnp.arange(ranked.shape[-1]) < top_k
        probabilities = jax.nn.softmax(jnp.where(among_k, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # Rounding carries `before` to 1 in the tail, which top_p = 1 is to keep.
        kept = among_k & ((before < top_p) | (top_p >= 1.0))
        return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)

    def of_few():
        return floor(jax.lax.top_k(logits, min(_FEW, logits.shape[-1]))[0])

    def of_all():
        return floor(-jnp.sort(-logits, axis=-1))

    def nothing():
        return jnp.full((logits.shape[0], 1), -jnp.inf, logits.dtype)

    # Each row by its own way, also where both are gone: they round differently.
    by_few, by_all = jax.lax.cond(jnp.any(few), of_few, nothing), jax.lax.cond(jnp.any(many), of_all, nothing)
    least = jnp.where(few, by_few, jnp.where(many, by_all, -jnp.inf))
    return jnp.where(logits >= least, logits, -jnp.inf)
