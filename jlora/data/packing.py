"""Several short records in one row."""

from collections.abc import Sequence

import numpy as np

from jlora.data.rows import IGNORED, Row


def first_fit_decreasing(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Put items into bins: the longest item first, each into the first bin with room for it.

    At most 11/9 of the least number of bins, plus one (Johnson 1973). Items of a bin keep their order; equal sizes are
    taken in order, so the result depends on the sizes alone.

    Args:
        sizes: of the items, 1 <= size <= capacity.
        capacity: of a bin.
    Returns:
        the indices of the items in each bin.
    """
    room = np.empty(len(sizes), np.int64)
    bins: list[list[int]] = []
    for item in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():
        fits = room[: len(bins)] >= sizes[item]
        place = int(fits.argmax()) if fits.any() else len(bins)
        if place == len(bins):
            bins.append([])
            room[place] = capacity
        bins[place].append(item)
        room[place] -= sizes[item]
    return [sorted(items) for items in bins]


def packed(rows: Sequence[Row]) -> Row:
    """One row of several: segments 1, 2, …; the first label of each is IGNORED, as it has no predecessor in it."""
    labels = [row.labels.copy() for row in rows]
    for part in labels:
        part[0] = IGNORED
    return Row(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate(labels),
        np.concatenate([np.full(len(row.input_ids), i, np.int32) for i, row in enumerate(rows, 1)]),
    )
