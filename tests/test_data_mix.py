"""Several sources, weights, held-out records, bad records and streaming: what an epoch is made of."""

import json

import numpy as np
import pytest
import tiny

from jlora.data import IGNORED, batch, lay_out, load_data, preview, reading, split_records
from jlora.data.mix import shares, times
from jlora.data.records import BadRecords, Records


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(tiny.CHATML)


def named(tmp_path, **sizes):
    """A file for each name, of so many records whose answers are "name 0", "name 1" …."""
    records = {name: [{"question": "?", "answer": f"{name} {i}"} for i in range(n)] for name, n in sizes.items()}
    return [tiny.write_records(tmp_path / f"{name}.jsonl", rows) for name, rows in records.items()]


def loaded(data, tokenizer, tmp_path, **changes):
    return load_data(data, tokenizer, **{"max_length": 128, "seed": 0, "directory": tmp_path / "data"} | changes)


def answers(dataset, tokenizer):
    rows = preview(dataset, tokenizer, rows=999)
    return [text.removesuffix(tiny.EOT) for row in rows for text, flag in row if flag]


# ---- mixing


def test_shares_are_powers_of_weights():
    assert shares([30, 10], None, 1.0) == [30, 10]
    assert shares([30, 10], [1, 3], 1.0) == [10, 30]
    assert shares([30, 10], [0.1, 0.3], 1.0) == [10, 30], "only their proportion counts"
    # XLM's exponent 0.5 over 90 and 10: sqrt(90) : sqrt(10) is 3 : 1.
    assert shares([90, 10], None, 2.0) == [75, 25]
    assert shares([90, 10], None, 1e9) == [50, 50] and shares([90, 10], None, 1e-9) == [100, 0]
    assert shares([1, 1, 1], [1, 1, 1], 1.0) == [1, 1, 1]
    assert sum(shares([7, 5, 3], [0.2, 0.3, 0.5], 1.7)) == 15


def test_records_of_a_source_come_alike_often():
    drawn = times([4, 3], [6, 1], seed=0)
    assert sorted(drawn[:4]) == [1, 1, 2, 2] and sorted(drawn[4:]) == [0, 0, 1]
    assert np.array_equal(drawn, times([4, 3], [6, 1], seed=0))
    assert any(not np.array_equal(drawn, times([4, 3], [6, 1], seed=seed)) for seed in range(1, 5))


def test_several_files_are_one_after_the_other(tmp_path, tokenizer):
    files = named(tmp_path, a=6, b=3)
    train, held_out = loaded(files, tokenizer, tmp_path)
    every = [f"a {i}" for i in range(6)] + [f"b {i}" for i in range(3)]
    assert len(held_out) == 1 and train.stats.sources == ()
    assert answers(train, tokenizer) == [text for text in every if text not in answers(held_out, tokenizer)]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_mix_what_is_trained_and_are_said(tmp_path, tokenizer, streaming):
    files = named(tmp_path, a=20, b=4)
    train, held_out = loaded(files, tokenizer, tmp_path, weights=[1, 3], eval_fraction=0.25, streaming=streaming)
    plain, same = loaded(files, tokenizer, tmp_path, eval_fraction=0.25)
    assert held_out.digest() == same.digest(), "what is held out is not mixed"
    found = answers(train, tokenizer)
    assert len(found) == len(answers(plain, tokenizer)) == 18 and set(found) <= set(answers(plain, tokenizer))
    of_a, of_b = ([text for text in found if text[0] == name] for name in "ab")
    assert (len(of_a), len(of_b)) == (5, 13) and len(set(of_a)) == 5  # 18 in the proportion 1 : 3, rounded
    n = len(set(of_b))
    assert train.stats.sources == (f"{files[0]}: 5 of {18 - n}", f"{files[1]}: 13 of {n}, each {13 / n:.3g} times")
    counts = [of_b.count(text) for text in set(of_b)]
    assert max(counts) - min(counts) <= 1


def test_the_first_records_of_each_source(tmp_path, tokenizer):
    files = named(tmp_path, a=6, b=3)
    train, _ = loaded(files, tokenizer, tmp_path, max_examples=2, eval_fraction=0)
    assert answers(train, tokenizer) == ["a 0", "a 1", "b 0", "b 1"]


def test_a_source_of_which_all_is_held_out(tmp_path, tokenizer):
    """Without weights it has no share; with one, there is nothing to have it."""
    files = named(tmp_path, a=3, b=1)
    for seed in range(9):
        train, held_out = loaded(files, tokenizer, tmp_path, seed=seed)
        if answers(held_out, tokenizer) == ["b 0"]:
            break
    assert answers(train, tokenizer) == ["a 0", "a 1", "a 2"]
    with pytest.raises(ValueError, match=r"needs a record to train on; all of .*b\.jsonl are held out"):
        loaded(files, tokenizer, tmp_path, seed=seed, weights=[1, 1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": [1.0]}, "each source has one weight; got 1 weights for 2 sources"),
        ({"weights": [1.0, 0.0]}, r"weights and temperature must be positive; got \[1.0, 0.0\]"),
        ({"temperature": 0.0}, "must be positive"),
        ({"max_examples": 0}, "`max_examples` must be at least 1; got 0"),
    ],
)
def test_mixes_that_are_refused(tmp_path, tokenizer, changes, says):
    with pytest.raises(ValueError, match=says):
        loaded(named(tmp_path, a=3, b=3), tokenizer, tmp_path, **changes)


def test_raw_text_is_taken_whole(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(tiny.text())
    with pytest.raises(ValueError, match="raw text is learned whole, as it is; got `weights` and `max_examples`"):
        loaded([tmp_path / "a.txt"], tokenizer, tmp_path, weights=[2.0], max_examples=3)
    with pytest.raises(ValueError, match="raw text is learned whole, as it is; got `system` and `supervise`"):
        loaded(tmp_path / "a.txt", tokenizer, tmp_path, how=reading(system="Be brief."), supervise="last")
    (asked,) = named(tmp_path, a=3)
    _, evaluation = loaded(tmp_path / "a.txt", tokenizer, tmp_path, eval_data=asked, supervise="all")
    assert evaluation.stats.records == 3


# ---- templates that are chosen


def test_auto_takes_the_chat_template_where_there_are_conversations(tmp_path, tokenizer):
    asked = {"instruction": "Who?", "output": "me"}
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "me"}]}
    for rows, template in (([asked, asked], "alpaca"), ([asked, chat], "chat"), ([chat, asked], "chat")):
        file = tiny.write_records(tmp_path / "r.jsonl", rows)
        train, _ = loaded(file, tokenizer, tmp_path, template="auto", eval_fraction=0)
        said, _ = loaded(file, tokenizer, tmp_path, template=template, eval_fraction=0)
        assert train.template == template and train.digest() == said.digest()
    # What is evaluated on is rendered as what is trained on.
    _, evaluation = loaded(
        tiny.write_records(tmp_path / "c.jsonl", [chat]),
        tokenizer,
        tmp_path,
        template="auto",
        eval_data=tiny.write_records(tmp_path / "e.jsonl", [asked]),
    )
    assert evaluation.template == "chat"


# ---- bad records

GOOD = {"instruction": "Who?", "output": "me"}
ODD = {
    "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "me"}]
}  # alpaca has no place for it


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_records_are_left_out_counted_and_kept(tmp_path, tokenizer, streaming):
    file, bad = tmp_path / "r.jsonl", tmp_path / "bad.jsonl"
    lines = [json.dumps(GOOD), "{oops", json.dumps({"q": 1}), json.dumps(ODD), *[json.dumps(GOOD)] * 3]
    file.write_text("\n".join(lines) + "\n")
    bad.write_text("of the run before\n")
    train, _ = loaded(file, tokenizer, tmp_path, eval_fraction=0, bad_records=bad, streaming=streaming)
    assert train.stats.records == 4 and train.stats.bad == 3
    kept = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [(entry["where"], entry["record"]) for entry in kept] == [
        (f"{file}:2", None),
        (f"{file}:3", {"q": 1}),
        (f"{file}:4", ODD),
    ]
    assert "one JSON object" in kept[0]["error"] and "needs the columns" in kept[1]["error"]
    assert "alpaca template needs" in kept[2]["error"]
    assert f"3 bad records left out (first: {file}:2: a line must be" in "; ".join(train.stats.odd())
    for line in (1, 2, 3):  # nothing is skipped without being asked for
        file.write_text("\n".join([lines[0], lines[line]]) + "\n")
        with pytest.raises(ValueError, match=r"r\.jsonl:2: "):
            loaded(file, tokenizer, tmp_path, eval_fraction=0, streaming=streaming)


def test_data_that_are_all_bad_are_refused(tmp_path, tokenizer):
    file, bad = tmp_path / "r.jsonl", tmp_path / "bad.jsonl"
    file.write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"all 2 records in .*r\.jsonl are bad:\n  .*r\.jsonl:1: .*\n  .*r\.jsonl:2"):
        loaded(file, tokenizer, tmp_path, bad_records=bad)
    tiny.write_records(file, [ODD, ODD])
    with pytest.raises(ValueError, match="all 2 records in the data are bad"):
        loaded(file, tokenizer, tmp_path, bad_records=bad, eval_fraction=0)
    with pytest.raises(ValueError, match="at least one record"):
        Records([tiny.write_records(file, [])], bad=BadRecords(bad))


def test_a_bad_record_that_comes_several_times_counts_once(tmp_path, tokenizer):
    many, few = (
        tiny.write_records(tmp_path / "a.jsonl", [GOOD] * 6),
        tiny.write_records(tmp_path / "b.jsonl", [GOOD, ODD]),
    )
    settings = {"weights": [1, 9], "eval_fraction": 0, "bad_records": tmp_path / "bad.jsonl"}
    train, _ = loaded([many, few], tokenizer, tmp_path, **settings)
    assert train.stats.sources[1].endswith("7 of 2, each 3.5 times") and train.stats.bad == 1
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


# ---- streaming


@pytest.mark.parametrize("pack", [False, True])
def test_streamed_data_are_the_same(tmp_path, tokenizer, pack, monkeypatch):
    """The very batches, though the rows lie in several files."""
    monkeypatch.setattr("jlora.data.record_data._SHARD_WORDS", 50)
    files = [tiny.write_records(tmp_path / f"{seed}.jsonl", tiny.records(20, seed)) for seed in range(2)]
    settings = {"weights": [1, 2], "pack": pack, "vocab_size": len(tokenizer)}
    kept = loaded(files, tokenizer, tmp_path, **settings)
    streamed = loaded(files, tokenizer, tmp_path, streaming=True, **settings)
    assert len(list((tmp_path / "data").glob("train-*.npy"))) > 5
    for a, b in zip(kept, streamed, strict=True):
        assert a.digest() == b.digest() and a.stats == b.stats and a.length == b.length and a.tokens() == b.tokens()
        assert list(a.items()) == list(b.items()) and a.largest_token == b.largest_token
        layouts = [lay_out(part, batch_size=4) for part in (a, b)]
        for step in range(3):
            ours, theirs = (
                batch(part, step, batch_size=4, seed=1, layout=layout)
                for part, layout in zip((a, b), layouts, strict=True)
            )
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_streamed_rows_are_made_once(tmp_path, tokenizer, monkeypatch):
    file = tiny.write_records(tmp_path / "r.jsonl", tiny.records(20))
    made, _ = loaded(file, tokenizer, tmp_path, streaming=True)
    monkeypatch.setattr("jlora.data.record_data.rows_of", None)
    again, _ = loaded(file, tokenizer, tmp_path, streaming=True)
    assert again.digest() == made.digest() and again.stats == made.stats
    for changes in ({"seed": 1}, {"max_length": 127}, {"supervise": "all"}, {"max_examples": 9}, {"temperature": 2.0}):
        with pytest.raises(TypeError):  # made anew, by what is None here
            loaded(file, tokenizer, tmp_path, streaming=True, **changes)


def test_a_json_list_cannot_be_streamed(tmp_path, tokenizer):
    (tmp_path / "r.json").write_text(json.dumps([GOOD] * 3))
    with pytest.raises(ValueError, match=r"read whole and cannot be streamed; got .*r\.json\. Write it as `\.jsonl`"):
        loaded(tmp_path / "r.json", tokenizer, tmp_path, streaming=True)


def test_what_is_held_out_is_what_it_was():
    """The split of runs of older versions, which evaluation looks for."""
    kept, held_out = split_records(list(range(20)), eval_fraction=0.2, seed=3)
    drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3, spawn_key=(0, 0)))).permutation(20)[:4]
    assert held_out == sorted(drawn.tolist()) and sorted(kept + held_out) == list(range(20))


# ---- raw text among records


def test_texts_are_supervised_whole(tmp_path, tokenizer):
    file = tiny.write_records(
        tmp_path / "r.jsonl", [{"text": "the keeper lit a lamp"}, {"text": f"and slept{tiny.EOT}"}]
    )
    for template in ("alpaca", "chat", "auto"):
        train, _ = loaded(file, tokenizer, tmp_path, template=template, eval_fraction=0)
        rows = [train.row(index) for index in range(2)]
        texts = [tokenizer.decode(row.input_ids) for row in rows]
        assert texts == [f"the keeper lit a lamp{tiny.EOT}", f"and slept{tiny.EOT}"]
        assert all((row.labels[1:] == row.input_ids[1:]).all() and row.labels[0] == IGNORED for row in rows)
