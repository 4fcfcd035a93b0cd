"""Where the records of a step lie: in rows that short ones share, of a few widths, so that there is hardly any padding."""

import heapq
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate as running
from typing import NamedTuple

import numpy as np

from jlora._typing import JsonObject

MULTIPLE = 8  # of which a width is one: matrix units want it, and lengths that nearly agree then share it
ENOUGH = 0.85
"""The share of tokens among the positions that is worth no further compiled shape."""
MOST_WIDTHS = 4
"""Each width is another compiled program, which takes as long as many steps."""
_SHORT = 256  # tokens in a row of which attention is a small part of the work
VERSION = 1
"""Of the order in which records come: another one for every change of what follows from a data set, a seed and a step."""
_CLASSES = (
    4  # bits of a length that tell its class: classes are 1/16 to 1/32 of a length wide, and of one length up to 31
)


class Slots(NamedTuple):
    """The place of each record, the longest first.

    batch, row: int64 [records], the batch of an epoch and the row in it.
    classes: int64 [records], by record: its length, rounded up so that records of a class can change places.
    width: int64 [batches], of each batch's rows.
    """

    batch: np.ndarray
    row: np.ndarray
    classes: np.ndarray
    width: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How the batches of a data set are laid out: so many records a step, in rows of one of a few widths.

    Attributes:
        batch_size: records in a batch, at most.
        rows: rows in a batch.
        widths: of the rows, ascending; those of a batch are of one width.
        efficiency: share of the positions of an epoch that hold a token.
        slots: None: each record has a row of its own, in batches of one width, drawn from all.
    """

    batch_size: int
    rows: int
    widths: tuple[int, ...]
    efficiency: float
    slots: Slots | None = None

    @cached_property
    def shares(self) -> bool:
        """Whether any row holds several records, as segments."""
        if self.slots is None:
            return False
        places = self.slots.batch * self.rows + self.slots.row
        return len(np.unique(places)) < len(places)

    @cached_property
    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.slots is not None
        by_batch = np.lexsort((self.slots.row, self.slots.batch))  # stable: in a row the longest record comes first
        return by_batch, np.searchsorted(self.slots.batch[by_batch], np.arange(len(self.slots.width) + 1))

    def taken(self, order: np.ndarray) -> np.ndarray:
        """The records in the order of the slots: those of a class take its slots in the given order."""
        assert self.slots is not None
        return order[np.argsort(-self.slots.classes[order], kind="stable")]

    def records(self, taken: np.ndarray, batch: int) -> list[list[int]]:
        """Of each row of a batch the records in it."""
        assert self.slots is not None
        by_batch, starts = self._starts
        rows: list[list[int]] = [[] for _ in range(self.rows)]
        for slot in by_batch[starts[batch] : starts[batch + 1]].tolist():
            rows[self.slots.row[slot]].append(int(taken[slot]))
        return rows

    def record(self) -> JsonObject:
        """What a resumed run must find again, for its log; the version is that of the order of records and batches."""
        return {
            "version": VERSION,
            "records": self.batch_size,
            "rows": self.rows,
            "widths": list(self.widths),
            "efficiency": round(self.efficiency, 4),
        }

    def __str__(self) -> str:
        """As in "8 records in 2 rows of 160 or 256 tokens, 93% of them not padding"."""
        widths = " or ".join(map(str, self.widths))
        rows = f"{self.rows} row{'s' if self.rows != 1 else ''}"
        shown = f"{self.batch_size} records in {rows}" if self.shares else rows
        return f"{shown} of {widths} tokens, {self.efficiency:.0%} of them not padding"


def plain(records: int, filled: float, *, length: int, batch_size: int) -> Layout:
    """A row for each record, all of one width, of which a share `filled` are tokens."""
    rows = -(-records // batch_size) * batch_size
    return Layout(batch_size=batch_size, rows=batch_size, widths=(length,), efficiency=filled * records / rows)


def shared(
    lengths: np.ndarray,
    *,
    length: int,
    widest: int,
    batch_size: int,
    accumulate: int = 1,
    batches: np.ndarray | None = None,
) -> Layout:
    """The layout with the fewest widths that is `ENOUGH`, of these the most efficient; or the most efficient of all.

    Tried are as many rows as records, 3/4, 1/2, 3/8, 1/4, … of that (a multiple of `accumulate`, so that they can be cut
    into micro-batches), each with its best widths. A step has `batch_size` records however they lie, all but a few
    steps where that does not divide the records.

    Args:
        lengths: int [records], of each record, >= 1.
        length: what a row for each record would be wide; no record is longer. No batch has more positions than such rows, nor,
            beyond `_SHORT`, more of their squares, which attention takes.
        widest: tokens in a row that several share, at most.
        batch_size: records in a batch; `accumulate` divides it.
        accumulate: micro-batches in a batch.
        batches: int [records], the batch of each record, the longest first; None: they are balanced.
    """
    classes = _classes(lengths, length)
    falling = np.sort(classes)[::-1]
    tokens = int(lengths.sum())
    best: tuple[tuple[int, float], Layout] | None = None
    micro = batch_size // accumulate
    halves = [(part, 2**i) for i in range(micro.bit_length() + 1) for part in (micro, micro * 3 / 4)]
    for rows in sorted({accumulate * math.ceil(part / half) for part, half in halves}, reverse=True):
        full = length * batch_size // rows
        limit = max(length, min(widest, max(math.isqrt(length * full), min(full, _SHORT))))
        batch, row, needed = _balanced(falling, batch_size=batch_size, rows=rows, batches=batches)
        if needed.max() > limit:
            continue
        needed = np.minimum(-(-needed // MULTIPLE) * MULTIPLE, limit)
        for widths in choose_widths(needed, MOST_WIDTHS):
            width = np.asarray(widths)[np.searchsorted(widths, needed)]
            efficiency = tokens / (rows * int(width.sum()))
            rank = (len(widths) if efficiency >= ENOUGH else MOST_WIDTHS + 1, -efficiency)
            if best is None or rank < best[0]:
                slots = Slots(batch, row, classes, width)
                found = Layout(
                    batch_size=batch_size, rows=rows, widths=tuple(widths), efficiency=efficiency, slots=slots
                )
                best = rank, found
    assert best is not None  # one row a record always fits
    return best[1]


def choose_widths(needed: np.ndarray, at_most: int) -> list[list[int]]:
    """The best 1, 2, … widths: their sum over all batches is the least there is, each batch having the first that it fits.

    Exact, by dynamic programming over the distinct widths: the best k widths of which the largest is w are w and the best
    k - 1 of some smaller largest.

    Args:
        needed: int [batches], the least width of each.
        at_most: how many widths, >= 1.
    Returns:
        ascending lists, the last value of each the largest of `needed`; fewer than `at_most` where more would gain nothing.
    """
    candidates, counts = np.unique(needed, return_counts=True)
    below = np.array(list(running(counts.tolist())))
    cost, chosen = candidates * below, [[int(width)] for width in candidates]
    found = [chosen[-1]]
    for _ in range(at_most - 1):
        next_cost, next_chosen = cost.copy(), list(chosen)
        for j in range(1, len(candidates)):
            costs = cost[:j] + candidates[j] * (below[j] - below[:j])
            i = int(costs.argmin())
            if costs[i] < cost[j]:
                next_cost[j], next_chosen[j] = costs[i], [*chosen[i], int(candidates[j])]
        if next_cost[-1] == cost[-1]:
            break
        cost, chosen = next_cost, next_chosen
        found.append(chosen[-1])
    return found


def _classes(lengths: np.ndarray, length: int) -> np.ndarray:
    """Lengths rounded up to their first bits, by at most a sixteenth; at most `length`."""
    lengths = lengths.astype(np.int64)
    unit = 2 ** np.maximum(np.log2(lengths).astype(np.int64) - _CLASSES, 0)
    return np.minimum(-(-lengths // unit) * unit, length)


def _balanced(
    falling: np.ndarray, *, batch_size: int, rows: int, batches: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batches of like weight: the longest record first, each into the emptiest row of a batch with fewer than `batch_size`.

    The rule of the longest processing time (Graham 1969) under a limit of items.

    Args:
        falling: int [records], lengths, the longest first.
        batches: int [records], of each its batch, if that is given.
    Returns:
        of each record its batch and its row in it; of each batch the tokens in its fullest row.
    """
    n = -(-len(falling) // batch_size)
    # One heap of the rows of all batches; or, where the batch is given, one of the rows of each.
    emptiest = [[(0, place) for place in range(n * rows)]]
    if batches is not None:
        emptiest = [[(0, place) for place in range(batch * rows, (batch + 1) * rows)] for batch in range(n)]
    count = [0] * n
    loads = np.zeros(n * rows, np.int64)
    places = np.empty(len(falling), np.int64)
    for item, size in enumerate(falling.tolist()):
        heap = emptiest[0 if batches is None else batches[item]]
        load, place = heapq.heappop(heap)
        while count[place // rows] == batch_size:
            load, place = heapq.heappop(heap)
        count[place // rows] += 1
        places[item] = place
        loads[place] = load + size
        heapq.heappush(heap, (load + size, place))
    return places // rows, places % rows, loads.reshape(n, rows).max(1)
