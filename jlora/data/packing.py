"""Several short records in one row."""

import heapq
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
    none = len(sizes)
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # of bins with so much room, a heap of their numbers
    first = np.full(capacity + 1, none)  # and the first of them
    for item in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():
        fits = first[sizes[item] :]
        room = int(fits.argmin()) + sizes[item]
        place = int(first[room])
        if place == none:
            place, room = len(bins), capacity
            bins.append([])
        else:
            heapq.heappop(by_room[room])
            first[room] = by_room[room][0] if by_room[room] else none
        bins[place].append(item)
        room -= sizes[item]
        heapq.heappush(by_room[room], place)
        first[room] = by_room[room][0]
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
