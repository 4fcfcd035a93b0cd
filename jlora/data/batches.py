"""Batches as a pure function of (data set, step, batch size, seed): nothing to save, nothing to skip on resume."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
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

    largest_token: the largest id in any row.
    """

    stats: Stats

    @property
    def largest_token(self) -> int: ...

    def tokens(self) -> tuple[set[int], set[int]]:
        """The ids in the rows, and those of them that are supervised."""
        ...


def batch(dataset: Dataset, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of one optimizer step; the same arguments give the same bytes.

    Epoch `step // steps_per_epoch` visits every row once, in an order drawn from (seed, epoch). What is left of the
    last batch of an epoch is filled with rows of padding, none of it supervised.

    Args:
        dataset: the rows.
        step: >= 0, counted over all epochs.
        batch_size: rows in the batch, >= 1.
        seed: >= 0.
    Returns:
        int32 [batch_size, dataset.length] arrays `input_ids`, `labels` and, for packed rows, `segment_ids`.
    Raises:
        ValueError: an argument out of range, an empty data set, or a row longer than `dataset.length`.
    """
    if step < 0:
        raise ValueError(f"`step` must be >= 0; got {step}. Steps count from 0 over all epochs.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0; got {seed}. Give a non-negative integer.")
    return _padded(dataset, _chosen(dataset, step, batch_size, seed), batch_size)


def batch_tokens(dataset: Dataset, step: int, *, batch_size: int, seed: int) -> int:
    """Tokens in the batch of a step, padding not counted: what throughput is made of."""
    return sum(len(dataset.row(int(index)).input_ids) for index in _chosen(dataset, step, batch_size, seed))


def eval_batches(dataset: Dataset, *, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in the order of the file, as batches like those of `batch`; the last one is padded.

    Raises:
        ValueError: as `batch`.
    """
    for place in range(steps_per_epoch(dataset, batch_size=batch_size)):
        yield _padded(dataset, range(place * batch_size, min((place + 1) * batch_size, len(dataset))), batch_size)


def steps_per_epoch(dataset: Dataset, *, batch_size: int) -> int:
    """Batches in which every row appears once, the short last one included.

    Raises:
        ValueError: `batch_size` < 1 or an empty data set.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be >= 1; got {batch_size}. Set the number of rows in a batch.")
    if len(dataset) == 0:
        raise ValueError("a data set needs at least one row to make a batch; got 0. Check the file it was read from.")
    return -(-len(dataset) // batch_size)


def supervised_tokens(row: Row) -> int:
    """How many labels of a row count in the loss: not at position 0, and not across a segment's border."""
    counted = row.labels[1:] != IGNORED
    if row.segment_ids is not None:
        counted &= row.segment_ids[1:] == row.segment_ids[:-1]
    return int(counted.sum())


# Two entries: a run that evaluates between steps, or straddles two epochs, still draws each order once.
@lru_cache(maxsize=2)
def _order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    # spawn_key, not [seed, epoch]: entropy words are concatenated, so (2**32 + 1, 0) would be the stream of (1, 1).
    source = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.random.Generator(source).permutation(n_rows)
    order.setflags(write=False)  # shared by every caller through the cache
    return order


def _chosen(dataset: Dataset, step: int, batch_size: int, seed: int) -> np.ndarray:
    epoch, place = divmod(step, steps_per_epoch(dataset, batch_size=batch_size))
    return _order(len(dataset), seed, epoch)[place * batch_size : (place + 1) * batch_size]


def _padded(dataset: Dataset, indices: Sequence[int] | np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    rows = [dataset.row(int(index)) for index in indices]
    shape = (batch_size, dataset.length)
    arrays = {
        "input_ids": np.full(shape, dataset.pad_id, np.int32),
        "labels": np.full(shape, IGNORED, np.int32),
    }
    if rows[0].segment_ids is not None:
        arrays["segment_ids"] = np.zeros(shape, np.int32)
    for place, row in enumerate(rows):
        n = len(row.input_ids)
        if n > dataset.length:
            raise ValueError(
                f"a row must fit the data set's `length` = {dataset.length}; row {int(indices[place])} has {n} tokens. "
                f"Truncate the row or raise `length`."
            )
        for name, padded in arrays.items():
            padded[place, :n] = getattr(row, name)
    return arrays
