"""Rows that records share: every record once, hardly any padding, at most four widths, and the loss of a row for each."""

import dataclasses
import json
import signal
from itertools import combinations

import jax
import numpy as np
import optax
import pytest
import steps as small
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import Rows, counted

import jlora
from jlora.data import IGNORED, Row, batch, batch_tokens, eval_batches, lay_out, steps_per_epoch, widths_of
from jlora.data.layout import ENOUGH, MOST_WIDTHS, choose_widths, shared
from jlora.runs import steps
from jlora.train import causal_lm_loss, init_state, make_step


def answers(n=520, seed=0):
    """Lengths like those of questions and answers: median 30 tokens, the longest about 250."""
    drawn = np.random.default_rng(seed).lognormal(np.log(30), 0.73, n)
    return np.clip(drawn, 8, 250).astype(int)


LENGTHS = {
    "answers": answers(),
    "uniform": np.random.default_rng(1).integers(8, 251, 520),
    "two sorts": np.random.default_rng(2).permutation(np.repeat([30, 200], [364, 156]) + np.arange(520) % 12),
    "long tail": 35 + np.random.default_rng(3).lognormal(np.log(30), 0.9, 520).astype(int).clip(1, 440),
    "all equal": np.full(520, 77),
    "fewer records than a batch": np.array([9, 40, 33]),
}


class Data:
    """Records of given lengths; record i begins with token i, and all of it but the first is learned."""

    def __init__(self, lengths, *, vocab=113, wide=None):
        rng = np.random.default_rng(0)
        self.pad_id = 0
        self.length = wide or int(-(-max(lengths) // 8) * 8)
        self.rows = []
        for i, n in enumerate(lengths):
            ids = rng.integers(1, vocab, n).astype(np.int32)
            ids[0] = i % vocab
            self.rows.append(Row(ids, np.where(np.arange(n) > 0, ids, IGNORED).astype(np.int32)))

    def __len__(self):
        return len(self.rows)

    def row(self, index):
        return self.rows[index]


def records_in(arrays):
    """The token sequences of a batch, found by their segments."""
    found = []
    for place, segments in enumerate(arrays["segment_ids"]):
        found += [
            tuple(arrays["input_ids"][place, segments == s].tolist()) for s in sorted(set(segments[segments > 0]))
        ]
    return found


def efficiency(batches):
    return sum(int((b["segment_ids"] > 0).sum()) for b in batches) / sum(b["input_ids"].size for b in batches)


def epoch(data, layout, size, number=0, seed=5):
    steps = steps_per_epoch(data, batch_size=size)
    return [batch(data, number * steps + i, batch_size=size, seed=seed, layout=layout) for i in range(steps)]


@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (8, 2), (7, 1)])
@pytest.mark.parametrize("name", ["answers", "two sorts", "fewer records than a batch"])
def test_an_epoch_is_every_record_once(name, size, accumulate):
    data = Data(LENGTHS[name], vocab=50_000)
    layout = lay_out(data, batch_size=size, accumulate=accumulate, widest=512)
    assert layout.shares
    expected = sorted(tuple(row.input_ids.tolist()) for row in data.rows)
    orders = []
    for number in range(2):
        batches = epoch(data, layout, size, number)
        found = [records_in(b) for b in batches]
        orders.append(found)
        assert sorted(sum(found, [])) == expected
        assert max(map(len, found)) <= size
        assert {b["input_ids"].shape for b in batches} == {(layout.rows, width) for width in layout.widths}
        assert layout.rows % accumulate == 0
        assert sum(map(counted, batches)) == sum(len(row.input_ids) - 1 for row in data.rows)
        assert layout.efficiency == pytest.approx(efficiency(batches))
        first = number * len(batches)
        tokens = [batch_tokens(data, first + i, batch_size=size, seed=5, layout=layout) for i in range(len(batches))]
        assert tokens == [int((b["segment_ids"] > 0).sum()) for b in batches]
    assert len(data) == 3 or orders[0] != orders[1]
    laid = list(eval_batches(data, batch_size=size, layout=layout))
    assert sorted(sum(map(records_in, laid), [])) == expected


def test_the_same_arguments_give_the_same_bytes():
    """Of another layout object, in another order of calls: nothing is remembered that decides."""
    one, other = Data(LENGTHS["answers"]), Data(LENGTHS["answers"])
    first = [
        batch(one, step, batch_size=8, seed=1, layout=lay_out(one, batch_size=8, widest=512))
        for step in (0, 64, 65, 200)
    ]
    layout = lay_out(other, batch_size=8, widest=512)
    again = [batch(other, step, batch_size=8, seed=1, layout=layout) for step in (200, 65, 64, 0)][::-1]
    for a, b in zip(first, again, strict=True):
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    assert records_in(batch(one, 0, batch_size=8, seed=2, layout=layout)) != records_in(first[0])


# What is saved


@pytest.mark.parametrize("size", [4, 8, 16, 32])
@pytest.mark.parametrize("name", list(LENGTHS)[:-1])
def test_hardly_any_padding(name, size):
    """With a row for each record, these are 8 to 50 % tokens (not those that are all equal)."""
    layout = lay_out(Data(LENGTHS[name]), batch_size=size, widest=1024)
    assert layout.efficiency >= 0.85
    assert len(layout.widths) <= (2 if size >= 8 else MOST_WIDTHS)


def test_the_best_that_rows_of_one_record_can_do():
    """Four widths alone are not enough for such lengths, however they are chosen: why records share rows."""
    needed = -(-LENGTHS["answers"] // 8) * 8
    best = choose_widths(needed, 4)[-1]
    width = np.asarray(best)[np.searchsorted(best, needed)]
    assert 0.6 < LENGTHS["answers"].sum() / width.sum() < 0.72


LENGTH_LISTS = st.lists(st.integers(1, 200), min_size=1, max_size=60)


@given(LENGTH_LISTS, st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_lengths(lengths, micro, accumulate):
    """Whatever they are: all records, no row too full, at most four widths, never worse than a row for each."""
    size, wide = micro * accumulate, max(max(lengths), -(-max(lengths) // 8) * 8 - max(lengths) % 3)
    layout = shared(np.array(lengths), length=wide, widest=300, batch_size=size, accumulate=accumulate)
    taken = layout.taken(np.random.default_rng(0).permutation(len(lengths)))
    batches = [layout.records(taken, i) for i in range(len(layout.slots.width))]
    assert sorted(i for rows in batches for row in rows for i in row) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    for rows, width in zip(batches, layout.slots.width.tolist(), strict=True):
        assert 1 <= sum(map(len, rows)) <= size
        assert max(sum(lengths[i] for i in row) for row in rows) <= width <= max(wide, 300)
    assert set(layout.slots.width.tolist()) == set(layout.widths) and len(layout.widths) <= MOST_WIDTHS
    assert layout.rows % accumulate == 0 and layout.rows <= size
    assert layout.rows * max(layout.widths) <= size * wide
    assert max(layout.widths) <= 256 or layout.rows * max(layout.widths) ** 2 <= size * wide**2
    positions = layout.rows * int(layout.slots.width.sum())
    assert layout.efficiency == pytest.approx(sum(lengths) / positions)
    if layout.efficiency < ENOUGH:  # else fewer widths are preferred
        assert positions <= len(batches) * size * wide


@pytest.mark.slow
@given(st.lists(st.integers(16, 96), min_size=64, max_size=200), st.sampled_from([4, 8, 16]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_enough_wherever_lengths_are_within_a_factor_of_six(lengths, size):
    """In 16 batches or more of four records or more, none under 16 tokens (widths are multiples of 8): found so, not proven."""
    lengths = (lengths * 16)[: 16 * size + len(lengths) % size]
    assert shared(np.array(lengths), length=96, widest=512, batch_size=size).efficiency >= ENOUGH


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_widths_are_the_best_there_are(needed, at_most):
    needed = np.array(needed)
    values = sorted(set(needed.tolist()))
    for k, widths in enumerate(choose_widths(needed, at_most), 1):
        cost = np.asarray(widths)[np.searchsorted(widths, needed)].sum()
        every = [[*some, values[-1]] for some in combinations(values[:-1], min(k, len(values)) - 1)]
        assert cost == min(np.asarray(some)[np.searchsorted(some, needed)].sum() for some in every)


def test_batches_are_of_like_weight_and_from_everywhere():
    """Tokens of a step vary less than in batches drawn at random; its records come from all over the data."""
    data = Data(LENGTHS["answers"], vocab=50_000)
    layout = lay_out(data, batch_size=8, widest=512)
    batches = epoch(data, layout, 8)
    tokens = [int((b["segment_ids"] > 0).sum()) for b in batches]
    drawn = [batch_tokens(data, i, batch_size=8, seed=5) for i in range(len(batches))]
    assert np.std(tokens) < 0.25 * np.std(drawn)
    firsts = [[ids[0] for ids in records_in(b)] for b in batches]
    spread = np.mean([max(f) - min(f) for f in firsts])
    assert spread > 0.7 * len(data)  # of 8 drawn evenly: 7/9
    # Who meets whom changes from epoch to epoch.
    pairs = [
        {
            frozenset((a, b))
            for f in ([i[0] for i in records_in(x)] for x in epoch(data, layout, 8, number))
            for a in f
            for b in f
        }
        for number in (0, 1)
    ]
    assert len(pairs[0] & pairs[1]) - len(data) < 0.2 * len(pairs[0])


# What stays as it was


@pytest.mark.parametrize("pack", [False, True])
def test_full_rows_stay_as_they_are(pack):
    """Records that nearly fill a row each, and packed ones: the batches of no layout, to the byte."""
    data = Rows(9, pack=pack) if pack else Data([90, 96, 93, 88, 95])
    layout = lay_out(data, batch_size=4)
    assert (layout.rows, layout.widths, layout.slots) == (4, (data.length,), None)
    for step in range(4):
        ours, plain = (batch(data, step, batch_size=4, seed=0, layout=x) for x in (layout, None))
        assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in plain.items()}
    for ours, plain in zip(
        eval_batches(data, batch_size=4, layout=layout), eval_batches(data, batch_size=4), strict=True
    ):
        assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in plain.items()}


def test_a_record_a_batch_has_no_segments():
    """Nothing is shared where a batch is one record: rows of four widths, attended to as they are."""
    data = Data(LENGTHS["answers"])
    layout = lay_out(data, batch_size=1)
    assert not layout.shares and layout.rows == 1 and len(layout.widths) == 4
    assert set(batch(data, 0, batch_size=1, seed=0, layout=layout)) == {"input_ids", "labels"}
    assert set(widths_of(data, range(520), batch_size=1, seed=0, layout=layout)) == set(layout.widths)


@pytest.mark.parametrize("change", ["records", "batch"])
def test_a_layout_of_other_data_is_refused(change):
    data = Data([5, 9, 30, 8])
    layout = lay_out(data, batch_size=2)
    other = Data([5, 9, 30]) if change == "records" else data
    with pytest.raises(ValueError, match="of 4 records in batches of 2; got"):
        batch(other, 0, batch_size=2 if change == "records" else 4, seed=0, layout=layout)


def test_micro_batches_must_divide():
    with pytest.raises(ValueError, match="`accumulate` must divide `batch_size`; got 3 and 4"):
        lay_out(Data([5, 9]), batch_size=4, accumulate=3)


def test_a_record_longer_than_the_data_set_says():
    with pytest.raises(ValueError, match=r"must fit the data set's `length` = 8; row 1 has 9 tokens"):
        lay_out(Data([5, 9], wide=8), batch_size=2)


# The loss


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_of_an_epoch_is_that_of_a_row_for_each(family):
    """Token-weighted, in float32, trained batches and evaluated ones."""
    model, adapter, base = small.build(getattr(small, family.upper()))
    params = jlora.combine(adapter, base)
    data = Data(np.random.default_rng(4).integers(2, 20, 41))
    layout = lay_out(data, batch_size=4)
    assert layout.shares
    expected = jlora.evaluate(model, params, eval_batches(data, batch_size=4))
    for batches in (epoch(data, layout, 4), eval_batches(data, batch_size=4, layout=layout)):
        found = jlora.evaluate(model, params, batches)
        assert found.supervised_tokens == expected.supervised_tokens
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_batch():
    model, adapter, base = small.build(small.LLAMA)
    data = Data(np.random.default_rng(4).integers(2, 20, 24))
    layout = lay_out(data, batch_size=8, accumulate=2)
    assert layout.shares and layout.rows % 2 == 0
    arrays, results = batch(data, 1, batch_size=8, seed=0, layout=layout), []
    for accumulate in (1, 2):
        step = make_step(causal_lm_loss(model), optax.sgd(1.0), accumulate=accumulate)
        results.append(step(init_state(adapter, optax.sgd(1.0)), base, arrays, jax.random.key(0)))
    assert results[0][1]["tokens"] == results[1][1]["tokens"] == counted(arrays)
    for a, b in zip(*(jax.tree.leaves(state.adapter) for state, _ in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# Whole runs


@pytest.fixture(scope="module")
def uneven_records(tmp_path_factory):
    """Most of a word, some of many."""
    rows = tiny.records(40)
    for i, row in enumerate(rows):
        row["output"] = " ".join([row["output"]] * 18) if i % 9 == 0 else "wind"
    return tiny.write_records(tmp_path_factory.mktemp("uneven") / "tasks.jsonl", rows)


@pytest.fixture(scope="module")
def uneven_model(tmp_path_factory):
    fields = tiny.GPT2 | {"n_layer": 1, "n_positions": 256}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("uneven") / "gpt2", fields, chat=tiny.CHATML)


def uneven_run(model, data, output, **changes):
    fields = {
        "steps": 12, "rank": 4, "targets": ("c_attn",), "batch_size": 3, "accumulate": 2, "learning_rate": 1e-2, "dropout": 0.1,
        "eval_every": 4, "checkpoint_every": 5, "template": "chat",
    }  # fmt: skip
    return jlora.FinetuneConfig(model=str(model), data=str(data), output=str(output), **fields | changes)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_says_how_records_lie_and_resumes_to_the_byte(
    uneven_model, uneven_records, tmp_path, capsys, monkeypatch
):
    whole = jlora.finetune(uneven_run(uneven_model, uneven_records, tmp_path / "whole"))
    said = " ".join(capsys.readouterr().out.split())
    layout = json.loads((tmp_path / "whole" / "run.json").read_text())["origin"]["layout"]
    assert layout["records"] == 6 and layout["efficiency"] >= 0.85 and len(layout["widths"]) <= 4
    widths = " or ".join(map(str, layout["widths"]))
    shown = (
        f"3 x 2 = 6 records in {layout['rows']} rows of {widths} tokens, {layout['efficiency']:.0%} of them not padding"
    )
    assert shown in said
    # Stopped in the middle of an epoch, between two checkpoints.
    make = steps.data_lib.batch

    def stopping(data, step, **where):
        if step == 8:
            signal.raise_signal(signal.SIGTERM)
        return make(data, step, **where)

    config = uneven_run(uneven_model, uneven_records, tmp_path / "parts", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(steps.data_lib, "batch", stopping)
        with pytest.raises(KeyboardInterrupt, match="after step 8 of 12"):
            jlora.finetune(config)
    # A run that began before records shared rows has no layout in its record: its order was another.
    path = tmp_path / "parts" / "run.json"
    record = json.loads(path.read_text())
    old = dict(record, origin={k: v for k, v in record["origin"].items() if k != "layout"})
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"layout: is \{'version': 1.*and missing in"):
        jlora.finetune(dataclasses.replace(config, resume=True))
    path.write_text(json.dumps(record))
    resumed = jlora.finetune(dataclasses.replace(config, resume=True))
    files = [(r.adapter_dir / "adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert files[0] == files[1]
    assert [e.get("loss") for e in whole.history] == [e.get("loss") for e in resumed.history]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_one_compilation_a_width(uneven_model, uneven_records, tmp_path, monkeypatch):
    """Training compiles as many steps as there are widths, and no more while it runs."""
    compiled = []
    lower = jlora.train.Step.__getattr__

    def counted_lower(self, name):
        if name == "lower":
            compiled.append(name)
        return lower(self, name)

    monkeypatch.setattr(jlora.train.Step, "__getattr__", counted_lower)
    jlora.finetune(uneven_run(uneven_model, uneven_records, tmp_path / "run", quiet=True, eval_fraction=0.0))
    origin = json.loads((tmp_path / "run" / "run.json").read_text())["origin"]
    assert len(compiled) == len(origin["layout"]["widths"])


@pytest.mark.slow
def test_inspect_shows_the_batches(uneven_model, uneven_records, call):
    said = " ".join(
        call("inspect", "--model", uneven_model, "--data", uneven_records, "--template", "chat").out.split()
    )
    assert "a batch 8 records in" in said and "of them not padding" in said
