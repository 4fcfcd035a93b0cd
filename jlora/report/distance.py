"""How far two models are apart in what they predict."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, Float, Params
from jlora.models import Model

TOP = 10
"""Of the likeliest next tokens, so many are told."""
_WIDTH = 32  # rows are as wide as the next multiple, which saves compilations
_ALIVE = 64  # positions of which logits are alive together


class Along(NamedTuple):
    """Two models along one row of tokens."""

    kl: list[float]
    """KL(adapted || base) of the distributions after each token, nats."""
    l2: list[float]
    """Euclidean distance of the logit vectors there."""
    adapted: list[tuple[int, float]]
    """The likeliest tokens after the prompt, the first first: (id, probability)."""
    base: list[tuple[int, float]]


def next_token_distance(adapted: Float[Array, " vocab"], base: Float[Array, " vocab"]):
    """(KL(adapted || base) in nats, L2 distance) of two rows of logits, in float32; finite for finite logits."""
    log_p, log_q = (jax.nn.log_softmax(row.astype(jnp.float32)) for row in (adapted, base))
    # Rounding can make a divergence of equal distributions a hair negative.
    kl = jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q)), 0.0)
    return kl, jnp.linalg.norm(adapted.astype(jnp.float32) - base.astype(jnp.float32))


def along(model: Model, adapted: Params, base: Params, row: Sequence[int], *, prompt: int) -> Along:
    """
    Args:
        row: token ids of a prompt and what continues it.
        prompt: of them, how many are the prompt's.
    """
    # Right padding is invisible to a causal model.
    width = min(-(-len(row) // _WIDTH) * _WIDTH, model.config.max_length)
    ids = np.zeros((1, width), np.int32)
    ids[0, : len(row)] = row
    kl, l2, *tops = _along(model, adapted, base, ids, np.int32(prompt - 1))
    kl, l2 = (np.asarray(x)[: len(row)].tolist() for x in (kl, l2))
    pairs = [list(zip(np.asarray(i).tolist(), np.asarray(p).tolist(), strict=True)) for p, i in tops]
    return Along(kl, l2, *pairs)


@functools.partial(jax.jit, static_argnames="model")
def _along(model, adapted, base, ids, last):
    """([seq] KL, [seq] L2, (probabilities, ids) of the likeliest tokens after position `last`, of both)."""
    hidden = [model.apply({"params": tree}, ids, head=False)[0] for tree in (adapted, base)]

    def distance(pair):
        return next_token_distance(model.logits(adapted, pair[0]), model.logits(base, pair[1]))

    kl, l2 = jax.lax.map(distance, tuple(hidden), batch_size=_ALIVE)
    after = [jax.nn.softmax(model.logits(tree, h[last])) for tree, h in zip((adapted, base), hidden, strict=True)]
    return kl, l2, *(jax.lax.top_k(p, min(TOP, p.shape[-1])) for p in after)
