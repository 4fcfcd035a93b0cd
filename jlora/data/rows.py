"""Rows of tokens, and what a data set of them is."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jlora._numbers import IGNORED as IGNORED
from jlora.data.stats import Stats


class Row(NamedTuple):
    """One unpadded row of tokens.

    input_ids: int32 [n].
    labels: int32 [n], at the positions of `input_ids`; IGNORED = not supervised. The loss shifts inside, so the label
        at position 0 never counts.
    segment_ids: int32 [n], 1.. for the records of a packed row (0 is left for padding), or None for an unpacked row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray | None = None


@runtime_checkable
class Dataset(Protocol):
    """Rows by index. Either every row has `segment_ids` or none has.

    length: the padded width of every batch; no row is longer.
    pad_id: what `input_ids` is padded with. Padding is told by its labels and segment, never by this id, so the
        end-of-text id is as good as any.
    """

    length: int
    pad_id: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...


@runtime_checkable
class CountedDataset(Dataset, Protocol):
    """A data set that knows what is in it.

    fills_rows: its rows are as long as the batch is wide, but for what is left over.
    largest_token: the largest id in any row.
    """

    stats: Stats
    fills_rows: bool

    @property
    def largest_token(self) -> int: ...

    def tokens(self) -> tuple[set[int], set[int]]:
        """The ids in the rows, and those of them that are supervised."""
        ...


def supervised_tokens(row: Row) -> int:
    """How many labels of a row count in the loss: not at position 0, and not across a segment's border."""
    counted = row.labels[1:] != IGNORED
    if row.segment_ids is not None:
        counted &= row.segment_ids[1:] == row.segment_ids[:-1]
    return int(counted.sum())
