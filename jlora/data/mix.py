"""How often the records of several sources come in an epoch."""

from collections.abc import Sequence

import numpy as np

_OF_SOURCES = (0, 0, 0)  # with the source four words in all: a spawn key that nothing else is drawn with


def shares(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float) -> list[int]:
    """How many records of each source an epoch has; together as many as there are records.

    The share of a source is proportional to weight ** (1 / temperature); without weights, the weight is its number of records
    (Conneau et al., XLM, 2019, sec. 3.1, with alpha = 1 / temperature). So 1 without weights takes every record once, and a high
    temperature all sources alike. What is left by rounding goes to the largest remainders.

    Args:
        sizes: records of each source.
        weights: of each source, > 0; None: `sizes`.
        temperature: > 0.
    """
    weighed = np.asarray(sizes if weights is None else weights, np.float64)
    powers = (weighed / weighed.max()) ** (1 / temperature)  # at most 1, at any temperature
    exact = powers / powers.sum() * sum(sizes)
    whole = np.floor(exact + 1e-9).astype(np.int64)
    left = np.argsort(whole - exact, kind="stable")[: sum(sizes) - int(whole.sum())]
    whole[left] += 1
    return whole.tolist()


def times(sizes: Sequence[int], wanted: Sequence[int], *, seed: int) -> np.ndarray:
    """How often each record comes in an epoch: int64 [sum of sizes].

    The records of a source come alike often, but for a rest that is drawn with the seed, once for all epochs.
    """
    parts = []
    for source, (size, want) in enumerate(zip(sizes, wanted, strict=True)):
        often, rest = divmod(want, size) if size else (0, 0)
        part = np.full(size, often, np.int64)
        drawn = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(*_OF_SOURCES, source)))
        part[np.random.Generator(drawn).permutation(size)[:rest]] += 1
        parts.append(part)
    return np.concatenate(parts)
