"""Batches: pure, complete, and padded without supervising the padding."""

import numpy as np
import pytest
from rows import PAD, Rows, counted

from jlora.data import IGNORED, Row, batch, eval_batches, preview, steps_per_epoch, supervised_tokens
from jlora.data.packing import first_fit_decreasing, packed


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_an_epoch_is_every_row_once_and_every_supervised_token_once(n, pack):
    rows = Rows(n, pack=pack, seed=n)
    steps = steps_per_epoch(rows, batch_size=4)
    expected = sum(map(supervised_tokens, rows.rows))
    for epoch in range(3):
        arrays = [batch(rows, epoch * steps + i, batch_size=4, seed=3) for i in range(steps)]
        firsts = np.concatenate([a["input_ids"][:, 0] for a in arrays])
        assert sorted(firsts[firsts >= 1000]) == [1000 + i for i in range(n)]
        assert sum(map(counted, arrays)) == expected
    assert sum(map(counted, eval_batches(rows, batch_size=4))) == expected


def test_supervised_tokens_leaves_out_position_zero_and_borders():
    ids = np.arange(6, dtype=np.int32)
    assert supervised_tokens(Row(ids, ids)) == 5
    assert supervised_tokens(Row(ids, ids, np.array([1, 1, 2, 2, 2, 3], np.int32))) == 3


def test_batch_is_a_pure_function_of_seed_and_step():
    first = [batch(Rows(9), step, batch_size=4, seed=1) for step in range(6)]
    again = [batch(Rows(9), step, batch_size=4, seed=1) for step in reversed(range(6))][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.keys() == b.keys() == {"input_ids", "labels"}
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    other = [batch(Rows(9), step, batch_size=4, seed=2) for step in range(3)]
    order = [np.concatenate([a["input_ids"][:, 0] for a in part]).tolist() for part in (first[:3], first[3:], other)]
    assert order[0] != order[1] and order[0] != order[2]


def test_writing_into_a_batch_changes_no_later_one():
    rows = Rows(4)
    before = batch(rows, 0, batch_size=4, seed=0)
    kept = before["input_ids"].copy()
    before["input_ids"][:] = 0
    assert (batch(rows, 0, batch_size=4, seed=0)["input_ids"] == kept).all()


def test_large_seed_does_not_collide_with_a_small_one():
    def order(seed, step):
        return batch(Rows(9), step, batch_size=9, seed=seed)["input_ids"][:, 0].tolist()

    assert order(2**32 + 1, 0) != order(1, 1)


def test_shapes_padding_and_file_order():
    rows = Rows(5, pack=True)
    arrays = list(eval_batches(rows, batch_size=3))
    assert [a["input_ids"][:, 0].tolist() for a in arrays] == [[1000, 1001, 1002], [1003, 1004, PAD]]
    for part, start in zip(arrays, (0, 3), strict=True):
        for name, fill in (("input_ids", PAD), ("labels", IGNORED), ("segment_ids", 0)):
            assert part[name].shape == (3, 12) and part[name].dtype == np.int32
            for place in range(3):
                given = getattr(rows.row(start + place), name) if start + place < 5 else np.zeros(0, np.int32)
                assert (part[name][place, : len(given)] == given).all()
                assert (part[name][place, len(given) :] == fill).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` must be >= 1; got 0"),
        ({"step": -1}, r"`step` must be >= 0; got -1"),
        ({"seed": -5}, r"`seed` must be >= 0; got -5"),
        ({"dataset": Rows(0)}, r"at least one row to make a batch; got 0"),
    ],
)
def test_bad_arguments_of_batch(arguments, message):
    arguments = {"dataset": Rows(3), "step": 0, "batch_size": 2, "seed": 0} | arguments
    with pytest.raises(ValueError, match=message):
        batch(**arguments)


def test_a_row_longer_than_the_data_set_says():
    rows = Rows(1)
    rows.rows[0] = Row(np.zeros(13, np.int32), np.zeros(13, np.int32))
    with pytest.raises(ValueError, match=r"must fit the data set's `length` = 12; row 0 has 13 tokens"):
        batch(rows, 0, batch_size=1, seed=0)


def test_first_fit_decreasing_fills_bins():
    """As a plain loop puts them, and in at most 11/9 of the least number of bins, which is known of full ones cut up."""
    rng = np.random.default_rng(0)
    for full in range(1, 21):
        cuts = [np.sort(rng.choice(np.arange(1, 32), rng.integers(0, 12), replace=False)) for _ in range(full)]
        sizes = rng.permutation(np.concatenate([np.diff([0, *cut, 32]) for cut in cuts])).tolist()
        bins = first_fit_decreasing(sizes, capacity=32)
        plain: list[list[int]] = []
        for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
            room = (items for items in plain if sum(sizes[i] for i in items) + sizes[item] <= 32)
            if (place := next(room, None)) is None:
                plain.append(place := [])
            place.append(item)
        assert bins == [sorted(items) for items in plain]
        assert full <= len(bins) <= 11 / 9 * full + 6 / 9
    assert first_fit_decreasing([6, 3, 5, 2, 4], capacity=10) == [[0, 4], [1, 2, 3]]
    assert first_fit_decreasing([5, 5, 5], capacity=10) == [[0, 1], [2]]


def test_packed_rows_supervise_what_the_rows_do():
    rows = Rows(5).rows
    row = packed(rows)
    assert supervised_tokens(row) == sum(map(supervised_tokens, rows))
    # The first label of a segment is masked itself, so even a loss that ignores segments does not cross a border.
    assert supervised_tokens(row._replace(segment_ids=None)) == supervised_tokens(row)
    assert set(row.segment_ids.tolist()) == {1, 2, 3, 4, 5}


def test_preview_needs_a_row():
    with pytest.raises(ValueError, match=r"`rows` must be >= 1; got 0"):
        preview(Rows(2), None, rows=0)
