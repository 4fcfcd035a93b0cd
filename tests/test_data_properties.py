"""What holds for any data: nothing is counted that is not learned, no form of batches changes the loss, no cut loses a token."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jlora
from jlora.data import (
    IGNORED,
    InstructDataset,
    TextDataset,
    batch,
    eval_batches,
    lay_out,
    prepare_text,
    steps_per_epoch,
)
from jlora.data.row_files import WORD, RowFiles, write_rows
from jlora.data.rows import Row
from jlora.data.shards import written

TOKENIZER = tiny.tokenizer(tiny.CHATML)
WORDS = st.text(st.sampled_from("the keep é灯\n<|im_end|>"), min_size=1, max_size=30).filter(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=3)
RECORDS = st.lists(
    st.builds(lambda asked, said: {"instruction": asked, "output": said}, WORDS, WORDS)
    | st.builds(lambda text: {"text": text}, WORDS)
    | st.builds(
        lambda turns: {
            "messages": [
                message
                for asked, said, trained in [*turns[:-1], (*turns[-1][:2], True)]
                for message in (
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": said, "train": trained},
                )
            ]
        },
        TURNS,
    ),
    min_size=1,
    max_size=8,
)


def dataset(records, **settings):
    placed = [(f"r:{number}", record) for number, record in enumerate(records, 1)]
    try:
        return InstructDataset(placed, TOKENIZER, template="chat", **{"max_length": 512} | settings)
    except ValueError as error:  # of all records nothing is left within the length
        assume("needs at least one supervised token" not in str(error))
        raise


def counted(batches):
    """Labels that have a predecessor in their own segment."""
    total = 0
    for arrays in batches:
        labels, segments = arrays["labels"], arrays.get("segment_ids", np.ones_like(arrays["labels"]))
        total += int(((labels[:, 1:] != IGNORED) & (segments[:, 1:] == segments[:, :-1])).sum())
    return total


@settings(max_examples=25, deadline=None)
@given(
    records=RECORDS,
    pack=st.booleans(),
    supervise=st.sampled_from(["assistant", "response", "last", "all"]),
    max_length=st.integers(8, 80),
    batch_size=st.integers(1, 4),
)
def test_what_is_counted_is_what_is_learned(records, pack, supervise, max_length, batch_size):
    data = dataset(records, pack=pack, supervise=supervise, max_length=max_length)
    order = {"batch_size": batch_size, "seed": 0, "layout": lay_out(data, batch_size=batch_size)}
    every = (batch(data, step, **order) for step in range(steps_per_epoch(data, batch_size=batch_size)))
    assert counted(every) == counted(eval_batches(data, batch_size=batch_size)) == data.stats.supervised_tokens


def losses_agree(directory, records, batch_size):
    """Of rows apart, of rows that short records share, and of packed rows; whether any rows were shared."""
    model, params = jlora.load(directory)
    apart, packed = (dataset(records, max_length=tiny.POSITIONS, pack=pack) for pack in (False, True))
    laid = lay_out(apart, batch_size=batch_size, widest=tiny.POSITIONS)
    found = [
        jlora.evaluate(model, params, eval_batches(data, batch_size=batch_size, layout=layout))
        for data, layout in ((apart, None), (apart, laid), (packed, None))
    ]
    assert len({result.supervised_tokens for result in found}) == 1
    assert [result.loss for result in found] == pytest.approx([found[0].loss] * 3, rel=1e-5)
    return laid.shares


@pytest.mark.slow
def test_the_loss_is_the_same_however_rows_are_laid(llama_dir):
    words = ["the keeper", "é", "lit a lamp and wrote of wind"]
    records = [{"instruction": words[i % 2], "output": words[i % 3]} for i in range(7)]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert losses_agree(llama_dir, [*records, {"messages": turns * 2}], 4)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(records=RECORDS, batch_size=st.integers(1, 4))
def test_the_loss_of_any_records_is_the_same_however_rows_are_laid(llama_dir, records, batch_size):
    losses_agree(llama_dir, records, batch_size)


def read_back(directory, length):
    """The tokens of both splits, of which each window but the first repeats one."""
    found = []
    for split in ("train", "validation"):
        data = TextDataset(directory, split, length=length, pad_id=0)
        rows = [data.row(index).input_ids.tolist() for index in range(len(data))]
        found += [*rows[0], *(token for row in rows[1:] for token in row[1:])]
    return found


@settings(max_examples=15, deadline=None)
@given(
    text=st.text(st.sampled_from("the keep é灯🙂\n  "), min_size=40, max_size=400),
    block=st.integers(1, 64),
    shard=st.integers(1, 50),
    length=st.integers(2, 9),
    share=st.floats(0.1, 0.6),
)
def test_a_stream_that_is_cut_anywhere_loses_no_token(tmp_path_factory, text, block, shard, length, share):
    """Blocks cut characters in two, chunks end where they may, shards and windows anywhere."""
    place = tmp_path_factory.mktemp("stream")
    (place / "t.txt").write_bytes(text.encode())
    expected = TOKENIZER(text, add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlora.data.text._BLOCK_BYTES", block)
        prepare_text(place / "t.txt", TOKENIZER, directory=place / "d", eval_fraction=share, shard_tokens=shard)
    assert read_back(place / "d", length) == expected


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2**30 - 1), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=6
    ),
    shard=st.integers(1, 20),
)
def test_rows_in_files_are_the_rows(tmp_path_factory, rows, shard):
    place = tmp_path_factory.mktemp("rows")
    made = []
    for tokens in rows:
        ids = np.array([token for token, _ in tokens], np.int32)
        labels = np.where([flag and index > 0 for index, (_, flag) in enumerate(tokens)], ids, IGNORED).astype(np.int32)
        made.append(Row(ids, labels))
    write_rows(made, place / "rows.bin")
    meta = written(place, {"train": np.fromfile(place / "rows.bin", WORD)}, shard)
    files = RowFiles(place, "train", meta)
    assert len(files) == len(made)
    for row, again in zip(made, files, strict=True):
        assert np.array_equal(row.input_ids, again.input_ids) and np.array_equal(row.labels, again.labels)


PEAK = """
import sys, threading, time
import tiny
from jlora.data import lay_out, load_data, trained_too

peak = [0]

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) << 10

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

file, directory, streaming = sys.argv[1:]
tokenizer = tiny.tokenizer(tiny.CHATML)

def load(**changes):
    where = {"directory": f"{directory}/{len(changes)}"}
    parts = load_data(file, tokenizer, max_length=512, seed=0, streaming=streaming == "yes", **where, **changes)
    lay_out(parts[0], batch_size=8)
    parts[0].digest(), parts[0].tokens(), trained_too(*parts)

load(max_examples=1500)  # what libraries take once
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
load()
print(peak[0] - before)
"""


def peak_of(tmp_path, records, streaming):
    """Bytes of memory, files that are mapped not counted, that a pass over so many records takes."""
    text = " ".join(tiny.text(1500).split())
    rows = ({"text": text[i % 999 : i % 999 + 2000]} for i in range(records))
    file = tiny.write_records(tmp_path / f"{records}.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, file, str(tmp_path / f"{records}-{streaming}"), streaming],
        env={
            "PYTHONPATH": f"{Path(jlora.__file__).parents[1]}:{Path(__file__).parent}",
            "PATH": "",
            "HOME": str(tmp_path),
        },
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout), Path(file).stat().st_size


@pytest.mark.slow
def test_the_memory_of_streaming_does_not_grow_with_the_data(tmp_path):
    """What grows is eight bytes a row and a few more a record; in memory it is the tokens and the texts."""
    (small, few), (large, many) = (peak_of(tmp_path, records, "yes") for records in (6_000, 18_000))
    kept, _ = peak_of(tmp_path, 18_000, "no")
    print(json.dumps({"bytes of data": [few, many], "streamed": [small, large], "in memory": kept}))
    assert large - small < (many - few) / 2 and kept > 2 * large
