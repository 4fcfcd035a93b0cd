"""Any number of prompts, in batches."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jlora._numbers import NotFinite
from jlora._typing import Params, PRNGKeyArray
from jlora.generation.api import prepared
from jlora.generation.form import for_decoding
from jlora.models import Model

_LOOK_EVERY = 16
"""Tokens between two questions whether a row has ended: each costs the time of a small transfer."""


def generate_many(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    key: PRNGKeyArray | None,
    ended: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """`generate` of one batch after the other; prompts of like lengths go together, the longest first.

    Every batch is of `batch_size` rows, so that all of one width share a compilation. A greedy continuation depends on its prompt
    alone; a sampled one on the key and its place among all prompts in the order of their lengths.

    Args:
        ended: asked now and then with a prompt's index and its new tokens so far whether they are enough. A row may go on for 15
            tokens more.

    Yields:
        (index of a prompt, its new tokens), as batches are done.

    Raises:
        ValueError: as `generate`.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    model, params = for_decoding(model, params, batch=batch_size)
    for place in range(0, len(order), batch_size):
        chosen = order[place : place + batch_size]
        rows = [prompts[i] for i in chosen]
        rows += [rows[-1]] * (batch_size - len(rows))
        own = None if key is None else jax.random.fold_in(key, place)
        job = prepared(model, params, rows, max_new_tokens, temperature, top_k, top_p, own, None)
        state, new, step = job.begin(None), [], max_new_tokens if ended is None else _LOOK_EVERY
        for limit in range(step, max_new_tokens + step, step):
            state = job.advance(state, min(limit, max_new_tokens))
            if not state.sound:
                raise NotFinite("The logits are", math.nan, job.params)
            new = [row[:n].tolist() for row, n in zip(np.asarray(state.out), np.asarray(state.counts), strict=True)]
            over = np.asarray(state.ended).tolist()
            if all(over[row] or (ended is not None and ended(i, new[row])) for row, i in enumerate(chosen)):
                break
        yield from zip(chosen, new, strict=False)
