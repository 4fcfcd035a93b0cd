"""Formats of records: told by their columns or said, under all their names; and where records come from."""

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from jlora.data import FORMATS, FormatName, is_hub_data, kind_of, read_records, reading
from jlora.data.prompts import prompts_of
from jlora.data.readers import HubName
from jlora.data.sources import hub_id

ASKED, ANSWERED = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
CHAT = {"messages": [ASKED, ANSWERED]}
SAID = {"instruction": "What?", "input": "", "output": "That."}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}


def read(tmp_path, *records, **how):
    file = tiny.write_records(tmp_path / "r.jsonl", records)
    return [record for _, record in read_records(file, how=reading(**how))]


# ---- formats

OF_FORMATS = {
    "messages": (CHAT, CHAT),
    "sharegpt": ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}, CHAT),
    "alpaca": (SAID, SAID),
    "prompt-completion": ({"prompt": "What?", "completion": "That."}, SAID),
    "question-answer": ({"question": "What?", "answer": "That."}, SAID),
    "text": ({"text": "What? That."}, {"text": "What? That."}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_told_by_its_columns(tmp_path, name):
    value, expected = OF_FORMATS[name]
    (record,) = read(tmp_path, value | {"id": 3})
    assert record == expected and record.format == name and record.left_out == ("id",)
    assert read(tmp_path, value, format=name) == [expected]


def test_the_names_of_formats_are_those_of_the_flag():
    assert set(FORMATS) == set(FormatName.__args__) == set(OF_FORMATS)


def test_turns_of_a_prompt_are_context(tmp_path):
    """TRL's conversational prompts and completions: only the completion is trained."""
    value = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]}
    (record,) = read(tmp_path, value)
    assert record == {"messages": [ASKED, ANSWERED | {"train": False}, ASKED, ANSWERED]}
    with pytest.raises(ValueError, match="must both be texts or both be turns; got a string and a list"):
        read(tmp_path, value | {"prompt": "What?"})


ROLES = {
    "system": ["system", "System"],
    "user": ["user", "human", "Human", "prompter", "input"],
    "assistant": ["assistant", "gpt", "chatgpt", "bing", "bard", "model", "output"],
    "tool": ["tool", "function", "observation", "tool_response", "function_response"],
}


@pytest.mark.parametrize(("role", "spelling"), [(role, s) for role, spellings in ROLES.items() for s in spellings])
def test_every_spelling_of_a_role(tmp_path, role, spelling):
    turn = {"from": spelling, "value": "x"}
    turns = [{"from": "human", "value": "a"}, turn, {"from": "gpt", "value": "b"}]
    (record,) = read(tmp_path, {"conversations": turns})
    assert record["messages"][1] == {"role": role, "content": "x"}
    (record,) = read(tmp_path, {"conversations": [ASKED, ANSWERED]})  # OpenAI's keys in ShareGPT's column
    assert record == CHAT


@pytest.mark.parametrize("spelling", ["function_call", "tool_call"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_call_in_a_turn_of_its_own(tmp_path, spelling, listed):
    call = CALL["function"]
    turns = [
        {"from": "human", "value": "1 + 1?"},
        {"from": spelling, "value": json.dumps([call, call] if listed else call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    (record,) = read(tmp_path, {"conversations": turns})
    assert record["messages"][1] == {"role": "assistant", "tool_calls": [CALL] * (1 + listed)}
    assert record["messages"][2] == {"role": "tool", "content": "2"}
    with pytest.raises(ValueError, match=r"must be JSON with `name` and `arguments`; got 'sum\(1\)' in turn 1"):
        read(tmp_path, {"conversations": [*turns[:1], {"from": spelling, "value": "sum(1)"}, *turns[2:]]})


def test_columns_under_other_names(tmp_path):
    value = {"query": "What?", "reply": "That.", "output": "something else", "hint": "briefly"}
    (record,) = read(tmp_path, value, columns=("instruction=query", "output=reply", "input=hint"))
    assert record == SAID | {"input": "briefly"} and record.left_out == ("output",)
    (record,) = read(tmp_path, {"dialog": CHAT["messages"]}, columns=("messages=dialog",))
    assert record == CHAT
    # What is named leaves one format of two.
    assert read(tmp_path, CHAT | {"q": "What?", "a": "That."}, columns=("question=q", "answer=a")) == [SAID]
    with pytest.raises(ValueError, match=r"r.jsonl:1: there is no column 'a', which `--columns` names; got 'q'"):
        read(tmp_path, {"q": "What?"}, columns=("question=q", "answer=a"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"format": "chat"}, "`format` must be one of messages, sharegpt, .*; got 'chat'"),
        ({"columns": ("instruction",)}, "must be MEANING=COLUMN, with a meaning among .*; got 'instruction'"),
        ({"columns": ("reply=output",)}, "must be MEANING=COLUMN, .*; got 'reply=output'"),
        ({"columns": ("instruction=a", "output=a")}, "must be named once; got 'output=a'"),
    ],
)
def test_flags_that_say_nothing(flags, says):
    with pytest.raises(ValueError, match=says):
        reading(**flags)


def test_columns_of_two_formats_are_refused_with_the_flag(tmp_path):
    both = SAID | {"question": "What?", "answer": "That."}
    message = (
        r"r.jsonl:1: a record must be of one format; the columns are those of 'alpaca' \('instruction', 'output'\) and "
        r"'question-answer' \('question', 'answer'\). Say which one: --format alpaca, or --format question-answer"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path, both)
    assert read(tmp_path, both, format="alpaca") == [SAID]
    for nothing in (None, ""):
        assert read(tmp_path, both | {"question": nothing}) == [SAID], "a column that says nothing is none"
    empty = SAID | {"instruction": ""}
    assert read(tmp_path, empty | {"messages": None, "conversations": []}) == [empty]
    (record,) = read(tmp_path, SAID | {"text": "made of it"})
    assert record == SAID and record.left_out == ("text",)
    with pytest.raises(ValueError, match="--format text needs the columns 'text'; got .*so 'text' is missing"):
        read(tmp_path, both, format="text")


def test_a_system_prompt_for_records_without_one(tmp_path):
    own = {"messages": [{"role": "system", "content": "Own."}, ASKED, ANSWERED]}
    records = read(tmp_path, CHAT, own, SAID, SAID | {"system": "Own."}, system="Be brief.")
    assert [r["messages"][0] for r in records[:2]] == [{"role": "system", "content": "Be brief."}, own["messages"][0]]
    assert [r["system"] for r in records[2:]] == ["Be brief.", "Own."]
    with pytest.raises(ValueError, match="raw text has no place for '--system'"):
        read(tmp_path, {"text": "x"}, system="Be brief.")
    with pytest.raises(ValueError, match="raw text has no place for 'tools'"):
        read(tmp_path, {"text": "x", "tools": [{"name": "sum"}]})


def test_prompts_of_every_format(tmp_path):
    values = [value for value, _ in OF_FORMATS.values()]
    asked = [
        {"messages": [ASKED]},
        {"conversations": [{"from": "human", "value": "What?"}]},
        {"instruction": "What?"},
        {"prompt": "What?"},
        {"question": "What?"},
        {"text": "What?"},
    ]
    file = tiny.write_records(tmp_path / "p.jsonl", [*values[:-1], *asked])
    assert [prompt.text for prompt in prompts_of(file)] == ["What?"] * (len(values) - 1 + len(asked))


# ---- sources

ROWS = [{"instruction": f'Say "{i}",\nplease.', "input": "", "output": f"é {i}"} for i in range(3)]


def write_table(path, delimiter):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_rows(path):
    name = path.name.removesuffix(".gz")
    file = path.with_name(name)
    if name.endswith((".csv", ".tsv")):
        write_table(file, "," if name.endswith(".csv") else "\t")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS))
    else:
        tiny.write_records(file, ROWS)
    if path != file:
        path.write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return path


FILES = ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.json.gz", "r.csv.gz", "R.TSV.gz"]


@pytest.mark.parametrize("name", FILES)
def test_files_of_records(tmp_path, name):
    file = write_rows(tmp_path / name.lower())
    assert kind_of(file) == "records" and [record for _, record in read_records(file)] == ROWS
    first, second = (where for where, _ in read_records(file)[:2])
    lines = {"csv": ("2", "4"), "tsv": ("2", "4"), "json": ("1", "1"), "jsonl": ("1", "2"), "parquet": ("0", "1")}
    for where, at in zip((first, second), lines[name.lower().removesuffix(".gz").rpartition(".")[2]], strict=True):
        assert where == (f"{file}[{at}]" if "parquet" in name else f"{file}:{at}")


def test_folders_of_records(tmp_path):
    folder = tmp_path / "data"
    (folder / "below" / ".hidden").mkdir(parents=True)
    tiny.write_records(folder / "b.jsonl", ROWS[1:2])
    tiny.write_records(folder / "below" / "c.jsonl", ROWS[2:])
    tiny.write_records(folder / "a.jsonl", ROWS[:1])
    tiny.write_records(folder / "below" / ".hidden" / "d.jsonl", ROWS)
    (folder / "README.md").write_text("about them")
    assert kind_of(folder) == "records" and [record for _, record in read_records(folder)] == ROWS
    write_table(folder / "e.csv", ",")
    with pytest.raises(ValueError, match=r"files of one kind; .* has \.csv, \.jsonl\. Name the files"):
        kind_of(folder)
    (folder / "novel.txt").write_text("text")
    assert kind_of(folder) == "text"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.csv", b"instruction,output\na\nb,c\n", r"r\.csv:2: a row must have 2 cells, as the first; got 1"),
        ("r.csv", b"a,a\n1,2\n", r"r\.csv:1: a column must be named once; got 'a' twice"),
        ("r.csv", b'instruction,output\n"a"b,c\n', r"r\.csv:2: no table of cells between ','.*Correct the quotes"),
        ("r.tsv", b"instruction\toutput\n\xff\tb\n", r"r\.tsv: a table must be UTF-8; got byte 0xff"),
        ("r.parquet", b"no such thing", r"r\.parquet must be a Parquet file"),
        ("r.jsonl.gz", b"no such thing", r"r\.jsonl\.gz must be a gzip file"),
        (
            "r.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9],
            r"r\.jsonl\.gz must be a gzip file.*Compress it again",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_records(tmp_path / name)


def test_cells_may_be_long_and_hold_turns(tmp_path):
    """csv's own bound is 128 KiB a cell, and tables have no lists."""
    file = tmp_path / "r.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["messages", "system"], [json.dumps(CHAT["messages"]), "s" * 200_000]])
    limit = csv.field_size_limit()
    ((_, record),) = read_records(file)
    assert record["messages"] == [{"role": "system", "content": "s" * 200_000}, *CHAT["messages"]]
    assert csv.field_size_limit() == limit


def test_saved_data_sets(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "test")
    for name in ("one", "both"):
        assert kind_of(tmp_path / name) == "records"
        assert read_records(tmp_path / name) == [(f"{tmp_path / name}[{i}]", row) for i, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match="must be one, or have the split `train`; .*test has test"):
        read_records(tmp_path / "test")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt", ("gpt", None, "train")),
        ("org/name-v1.0", ("org/name-v1.0", None, "train")),
        ("org/name:main", ("org/name", "main", "train")),
        ("org/name:main:test", ("org/name", "main", "test")),
        ("org/name:main:train[:10000]", ("org/name", "main", "train[:10000]")),
        ("org/name::test[10%:]", ("org/name", None, "test[10%:]")),
        ("org/name:train[:5]", ("org/name", None, "train[:5]")),
        ("org/name:a.b:train+test[:5]", ("org/name", "a.b", "train+test[:5]")),
        ("org/na/me", None),
        ("C:\\data\\set", None),
        ("org/name:a:b:c", None),
    ],
)
def test_names_of_hub_data_sets(name, parts):
    assert HubName.of(name) == parts
    assert is_hub_data(name) == (parts is not None) and hub_id(name) == (parts and parts[0])


def test_configuration_and_split_of_a_hub_data_set(monkeypatch, tmp_path):
    """`load_dataset` itself, on a file of its own, behind the names that reach it."""
    file = tiny.write_records(tmp_path / "r.jsonl", ROWS)
    load, asked = datasets.load_dataset, []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return load("json", data_files={"train": file}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_records("org/name:main:train[:2]")
    assert found == [(f"org/name:main:train[:2][{i}]", row) for i, row in enumerate(ROWS[:2])]
    assert asked == [("org/name", "main", "train[:2]")]
    with pytest.raises(ValueError, match=r"its `gone` split did not load \(ValueError"):
        read_records("org/name:main:gone")
