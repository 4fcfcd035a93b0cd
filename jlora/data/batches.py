"""Batches as a pure function of (data set, step, batch size, seed): nothing to save, nothing to skip on resume."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from jlora.data.layout import ENOUGH, Layout, plain, shared
from jlora.data.packing import packed
from jlora.data.rows import IGNORED, CountedDataset, Dataset


def lay_out(
    dataset: Dataset,
    *,
    batch_size: int,
    accumulate: int = 1,
    widest: int | None = None,
    batches_of: Layout | None = None,
) -> Layout:
    """How to lay the records of each batch, for `batch` and `eval_batches`, so that few positions are padding.

    Where a row for each record, as wide as the longest, is 85 % tokens, it stays at that; so it does for raw text and packed
    rows, which fill theirs. Otherwise the records of a batch share its rows as segments, which do not see each other,
    and the rows of a batch are of one of at most four widths, as few as make 85 %.

    To that end long records are put together with short ones: every batch has about as many tokens as any other. Which
    lengths meet is the same in every epoch; which records of these lengths (to a sixteenth) is drawn from the whole
    data set, and so is the order of the batches. Lost is that any two records are as likely to meet as any others: two
    that share their lengths with none meet in every epoch. What is learned from is not lost: an epoch is still every
    record once, `batch_size` of them a step, with the same loss; and as a step divides by its tokens, those of each
    record count nearly alike, which in batches drawn at random, or sorted by length, they do not.

    Batches of four records or more have been found to reach 85 % wherever the longest is at most six times the shortest
    (of 16 tokens or more, in 16 batches or more), and where a few are much longer too. With one or two in a batch there
    is little to share: a row for each, and four widths, are sure of 85 % only where no record is longer than 1.9 times
    the shortest (1 / 0.85 ** 4), and reach 80 % for lengths evenly spread from 0.

    Args:
        dataset: the rows; their lengths are looked at once.
        batch_size: records in a batch, all its micro-batches together, as `batch` gets it.
        accumulate: micro-batches in a batch, into which its rows must be cut.
        widest: the most tokens in a row that records share, such as the model's positions; None: `dataset.length`.
        batches_of: a layout of the same data set and batch size, whose batches are kept: each has the same records, in rows
            that may be others.
    Raises:
        ValueError: an argument out of range, an empty data set, or a row longer than `dataset.length`.
    """
    steps_per_epoch(dataset, batch_size=batch_size)
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(f"`accumulate` must divide `batch_size`; got {accumulate} and {batch_size}.")
    n = len(dataset)
    if getattr(dataset, "fills_rows", False):
        assert isinstance(dataset, CountedDataset)
        return plain(n, dataset.stats.padding_efficiency, length=dataset.length, batch_size=batch_size)
    lengths = np.array([len(dataset.row(index).input_ids) for index in range(n)])
    if lengths.max() > dataset.length:
        raise _too_long(dataset, int(lengths.argmax()), int(lengths.max()))
    filled = float(lengths.mean()) / dataset.length
    if dataset.row(0).segment_ids is not None or filled >= ENOUGH:
        return plain(n, filled, length=dataset.length, batch_size=batch_size)
    widest = max(dataset.length, widest or 0)
    kept = None if batches_of is None or batches_of.slots is None else batches_of.slots.batch
    return shared(
        lengths,
        length=dataset.length,
        widest=widest,
        batch_size=batch_size,
        accumulate=accumulate,
        batches=kept,
    )


def batch(
    dataset: Dataset, step: int, *, batch_size: int, seed: int, layout: Layout | None = None
) -> dict[str, np.ndarray]:
    """The batch of one optimizer step; the same arguments give the same bytes.

    Epoch `step // steps_per_epoch` visits every record once, in an order drawn from (seed, epoch). What is left of the
    last batch of an epoch is filled with rows of padding, none of it supervised.

    Args:
        dataset: the rows.
        step: >= 0, counted over all epochs.
        batch_size: records in the batch, >= 1.
        seed: >= 0.
        layout: of `lay_out`, for the same data set and batch size; None: a row for each record, all of one width.
    Returns:
        int32 arrays `input_ids`, `labels` and, for packed and shared rows, `segment_ids`: [batch_size, dataset.length], or
        with a layout [layout.rows, one of layout.widths].
    Raises:
        ValueError: an argument out of range, an empty data set, a row longer than `dataset.length`, or a layout of
            another data set.
    """
    if step < 0:
        raise ValueError(f"`step` must be >= 0; got {step}. Steps count from 0 over all epochs.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0; got {seed}. Give a non-negative integer.")
    rows, width = _chosen(dataset, step, batch_size, seed, layout)
    return _padded(dataset, rows, batch_size if layout is None else layout.rows, width, layout)


def batch_tokens(dataset: Dataset, step: int, *, batch_size: int, seed: int, layout: Layout | None = None) -> int:
    """Tokens in the batch of a step, padding not counted: what throughput is made of."""
    rows, _ = _chosen(dataset, step, batch_size, seed, layout)
    return sum(len(dataset.row(index).input_ids) for row in rows for index in row)


def widths_of(
    dataset: Dataset, steps: Sequence[int] | range, *, batch_size: int, seed: int, layout: Layout
) -> tuple[int, ...]:
    """The widths, ascending, of the batches of some steps: what is to be compiled for them."""
    found: set[int] = set()
    for step in steps:
        if len(found) == len(layout.widths):
            break
        found.add(_chosen(dataset, step, batch_size, seed, layout)[1])
    return tuple(sorted(found))


def eval_batches(dataset: Dataset, *, batch_size: int, layout: Layout | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Every record once, as batches like those of `batch`: in the order of the file and the last one padded, or as a layout
    has them.

    Raises:
        ValueError: as `batch`.
    """
    batches = steps_per_epoch(dataset, batch_size=batch_size)
    if not _is_laid(dataset, batch_size, layout):
        for place in range(batches):
            indices = range(place * batch_size, min((place + 1) * batch_size, len(dataset)))
            yield _padded(dataset, [[index] for index in indices], batch_size, dataset.length, layout)
        return
    assert layout is not None and layout.slots is not None
    taken = layout.taken(np.arange(len(dataset)))
    for place in range(batches):
        width = int(layout.slots.width[place])
        yield _padded(dataset, layout.records(taken, place), layout.rows, width, layout)


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


# A few entries: a run that evaluates between steps, or straddles two epochs, still draws each order once.
@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int, *stream: int) -> np.ndarray:
    # spawn_key, not [seed, epoch]: entropy words are concatenated, so (2**32 + 1, 0) would be the stream of (1, 1).
    source = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, *stream)))
    order = np.random.Generator(source).permutation(n)
    order.setflags(write=False)  # shared by every caller through the cache
    return order


_OF_BATCHES = (1, 1)  # three words in all: one draws records, and two what is held out


@lru_cache(maxsize=2)
def _taken(layout: Layout, n: int, seed: int, epoch: int) -> np.ndarray:
    return layout.taken(_order(n, seed, epoch))


def _chosen(
    dataset: Dataset, step: int, batch_size: int, seed: int, layout: Layout | None
) -> tuple[list[list[int]], int]:
    """(of each row the records in it, the width of the rows) of the batch of a step."""
    batches = steps_per_epoch(dataset, batch_size=batch_size)
    epoch, place = divmod(step, batches)
    n = len(dataset)
    if not _is_laid(dataset, batch_size, layout):
        chosen = _order(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]
        return [[index] for index in chosen.tolist()], dataset.length
    assert layout is not None and layout.slots is not None
    which = int(_order(batches, seed, epoch, *_OF_BATCHES)[place])
    return layout.records(_taken(layout, n, seed, epoch), which), int(layout.slots.width[which])


def _is_laid(dataset: Dataset, batch_size: int, layout: Layout | None) -> bool:
    """Whether a layout says where the records lie.

    Raises:
        ValueError: it is another data set's.
    """
    if layout is None:
        return False
    n = len(dataset) if layout.slots is None else len(layout.slots.classes)
    if (layout.batch_size, n) != (batch_size, len(dataset)):
        raise ValueError(
            f"a layout is of one data set and batch size: this is of {n} records in batches of {layout.batch_size}; got "
            f"{len(dataset)} in batches of {batch_size}. Call `lay_out` again."
        )
    return layout.slots is not None


def _too_long(dataset: Dataset, index: int, n: int) -> ValueError:
    return ValueError(
        f"a row must fit the data set's `length` = {dataset.length}; row {index} has {n} tokens. "
        f"Truncate the row or raise `length`."
    )


def _padded(
    dataset: Dataset, rows: Sequence[Sequence[int]], n_rows: int, width: int, layout: Layout | None
) -> dict[str, np.ndarray]:
    arrays = {
        "input_ids": np.full((n_rows, width), dataset.pad_id, np.int32),
        "labels": np.full((n_rows, width), IGNORED, np.int32),
    }
    shares = layout is not None and layout.shares
    for place, records in enumerate(rows):
        parts = [dataset.row(index) for index in records]
        for index, part in zip(records, parts, strict=True):
            if len(part.input_ids) > dataset.length:
                raise _too_long(dataset, index, len(part.input_ids))
        if not parts:
            continue
        row = packed(parts) if shares else parts[0]
        for name in ("input_ids", "labels", "segment_ids"):
            values = getattr(row, name)
            if values is not None:
                arrays.setdefault(name, np.zeros((n_rows, width), np.int32))[place, : len(values)] = values
    return arrays
