"""How sure a figure is: percentile intervals of resampled examples."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jlora._typing import Float
from jlora.evaluation.example import Counts

LEVEL = 0.95
_CELLS = 1 << 22
"""Of a block of resamples, so many times an example; the memory is that of 32 MB."""


class Estimate(NamedTuple):
    value: float
    low: float
    high: float
    examples: int
    """That it is of."""


def estimate(counts: Counts, *, resamples: int, seed: int) -> Estimate:
    """The value of what is scored, with its interval: the middle 95 % of the values of `resamples` corpora of as many examples,
    drawn from these with replacement (Efron 1979; of metrics of text, Koehn 2004, https://aclanthology.org/W04-3250)."""
    kept = counts.scored()
    values = _resampled([counts], kept, resamples, seed)[0]
    return _estimate(counts.value(), values, len(kept))


def difference(of: Counts, minus: Counts, *, resamples: int, seed: int) -> Estimate:
    """`of - minus` on the examples that both score, each resample being the same examples of both (paired)."""
    kept = sorted({*of.scored()} & {*minus.scored()})
    values = np.subtract(*_resampled([of, minus], kept, resamples, seed))
    return _estimate(of.value_of(kept) - minus.value_of(kept), values, len(kept))


def _estimate(value: float, values: Float[np.ndarray, " resamples"], examples: int) -> Estimate:
    values = values[~np.isnan(values)]  # of a corpus that the total is not defined for
    if not len(values):
        return Estimate(value, float("nan"), float("nan"), examples)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), examples)


def _resampled(of: list[Counts], kept: list[int], resamples: int, seed: int) -> list[Float[np.ndarray, " resamples"]]:
    """The values of each on the same resamples."""
    if not kept:
        return [np.empty(0) for _ in of]
    found: list[list[np.ndarray]] = [[] for _ in of]
    for weights in _weights(len(kept), resamples, seed):
        for values, counts in zip(found, of, strict=True):
            with np.errstate(invalid="ignore", divide="ignore"):
                values.append(counts.total(weights @ counts.rows[kept]))
    return [np.concatenate(values) if values else np.empty(0) for values in found]


def _weights(examples: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "some examples"]]:
    """How often each example is in each resample, in blocks."""
    draw, block = np.random.default_rng(seed), max(1, _CELLS // examples)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield draw.multinomial(examples, np.full(examples, 1 / examples), size=size).astype(np.float64)
