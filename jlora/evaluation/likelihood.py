"""How likely a continuation is behind a context."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, Int, Params
from jlora.models import Model

_MULTIPLE = 64
"""Of which a batch's width is one."""
_AT_ONCE = 64
"""Places of a row of which the logits are there at once: of the whole vocabulary they are the largest thing here."""


class Likelihood(NamedTuple):
    log: float
    """Nats: the sum over the continuation's tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


def likelihoods(
    model: Model, params: Params, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int
) -> Iterator[tuple[int, Likelihood]]:
    """Of rows (context, continuation), neither of them empty, together at most one token longer than the model's positions; rows of
    like lengths go together, the longest first.

    Yields:
        (index of a row, its likelihood), as batches are done.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(rows[i][0]) + len(rows[i][1]) for i in chosen) - 1
        width = min(-(-longest // _MULTIPLE) * _MULTIPLE, model.config.max_length)
        most = max(len(rows[i][1]) for i in chosen)
        most = 1 << (most - 1).bit_length() if most <= _AT_ONCE else -(-most // _AT_ONCE) * _AT_ONCE
        ids = np.zeros((batch_size, width), np.int32)
        places, targets, there = np.zeros((3, batch_size, most), np.int32)
        for row, i in enumerate(chosen):
            context, continuation = rows[i]
            whole, n = [*context, *continuation], len(continuation)
            ids[row, : len(whole) - 1] = whole[:-1]
            places[row, :n] = np.arange(len(context) - 1, len(whole) - 1)
            targets[row, :n], there[row, :n] = continuation, 1
        logs, greedy = map(np.asarray, _likelihoods(model, params, ids, places, targets, there))
        for row, i in enumerate(chosen):
            yield i, Likelihood(float(logs[row]), bool(greedy[row]))


@functools.partial(jax.jit, static_argnames="model")
def _likelihoods(
    model: Model,
    params: Params,
    ids: Int[Array, "batch seq"],
    places: Int[Array, "batch most"],
    targets: Int[Array, "batch most"],
    there: Int[Array, "batch most"],
):
    """(nats, whether all are the likeliest) of each row."""
    # Causal: padding on the right changes nothing before it.
    hidden = model.apply({"params": params}, ids, head=False)
    chosen = jnp.take_along_axis(hidden, places[:, :, None], axis=1)  # pyright: ignore[reportArgumentType]
    parts = max(1, places.shape[1] // _AT_ONCE)

    def cut(x):
        return jnp.stack(jnp.split(x, parts, axis=1))

    def of_part(part):
        states, wanted, counts = part
        logits = model.logits(params, states)
        logs = jax.nn.log_softmax(logits, axis=-1)
        of_wanted = jnp.take_along_axis(logs, wanted[:, :, None], axis=-1)[:, :, 0]
        likeliest = jnp.argmax(logits, axis=-1) == wanted
        return jnp.sum(jnp.where(counts == 1, of_wanted, 0.0), axis=1), jnp.all(likeliest | (counts == 0), axis=1)

    logs, greedy = jax.lax.map(of_part, (cut(chosen), cut(targets), cut(there)))
    return logs.sum(0), greedy.all(0)
