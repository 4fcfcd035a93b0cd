"""Rows of records as shards: each token is one word, which also says whether it is supervised and whether a row begins with it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jlora._typing import Json
from jlora.data.rows import IGNORED, Row
from jlora.data.shards import Shards

_SUPERVISED, _BEGINS, _BITS = 1, 2, 2
WORD = np.dtype(np.uint32)
"""Room for ids up to 2**30."""


def write_rows(rows: Iterable[Row], stream: Path) -> None:
    """The rows one after the other, as raw words."""
    with stream.open("wb") as out:
        for row in rows:
            words = row.input_ids.astype(WORD) << _BITS
            words |= np.where(row.labels != IGNORED, _SUPERVISED, 0).astype(WORD)
            words[0] |= _BEGINS
            out.write(words.tobytes())  # `tofile` loses the error of a full disk


class RowFiles(Sequence[Row]):
    """The rows of one split of a folder. In memory is where each begins, eight bytes a row; the words are memory-mapped."""

    def __init__(self, directory: Path, split: str, meta: Mapping[str, Json]):
        self._words = Shards(directory, split, meta)
        starts, read = [], 0
        for block in self._words.blocks():
            starts.append(np.flatnonzero(block & _BEGINS) + read)
            read += len(block)
        self._starts = np.concatenate([*starts, [read]]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = self._words.part(int(self._starts[index]), int(self._starts[index + 1]))
        input_ids = (words >> _BITS).astype(np.int32)
        return Row(input_ids, np.where(words & _SUPERVISED, input_ids, IGNORED).astype(np.int32))

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))
