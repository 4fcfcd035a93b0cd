"""Reading records: three kinds of source, three kinds of columns, and every bad line named."""

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

from jlora.data import kind_of, read_records

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_columns_of_json_lines(tmp_path):
    sharegpt = [{"from": "system", "value": "be"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = write(
        tmp_path / "a.jsonl",
        GOOD | {"text": "left out"},
        {"instruction": "Say é.", "output": ""},
        "",
        {"instruction": "x", "input": None, "output": "y"},
        {"messages": CHAT},
        {"id": 3, "conversations": sharegpt},
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    roles = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert read_records(file) == [
        (f"{file}:1", GOOD),
        (f"{file}:2", {"instruction": "Say é.", "input": "", "output": ""}),
        (f"{file}:4", {"instruction": "x", "input": "", "output": "y"}),
        (f"{file}:5", {"messages": CHAT}),
        (f"{file}:6", {"messages": roles}),
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_knows_its_lines(tmp_path, indent):
    file = tmp_path / "a.json"
    values = [GOOD | {"output": 'a, "b" ]\n'}, GOOD, GOOD]
    file.write_text("\n" + json.dumps(values, indent=indent))
    lines = [2, 2, 2] if indent is None else [3, 8, 13]
    assert read_records(str(file)) == [(f"{file}:{line}", value) for line, value in zip(lines, values, strict=True)]
    values[1] = {"question": "?"}
    file.write_text("\n" + json.dumps(values, indent=indent))
    with pytest.raises(ValueError, match=rf"a\.json:{2 if indent is None else 8}: .* got 'question'"):
        read_records(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"a\.jsonl:2: a line must be one JSON object; Expecting property name .* column 2: \{oops"),
        ([1], r"a\.jsonl:2: a record must be a JSON object; got a list: \[1\]"),
        ("null", r"a\.jsonl:2: a record must be a JSON object; got null"),
        (
            {"prompt": "a", "output": "b"},
            r":2: .*columns `instruction` and `output`.*got 'prompt', 'output', so 'instru",
        ),
        ({}, r":2: .*got none, so 'instruction' and 'output' is missing\. Rename the columns"),
        (GOOD | {"output": 42}, r":2: column 'output' must be a string; got int: 42"),
        (GOOD | {"instruction": None}, r":2: column 'instruction' must be a string; got null"),
        (GOOD | {"input": ["x" * 99]}, r":2: column 'input' must be a string; got a list: .{57}\.\.\.$"),
        ({"messages": []}, r":2: messages must be a list with at least one turn; got a list: \[\]"),
        ({"messages": "hi"}, r":2: messages must be a list with at least one turn; got a string: 'hi'"),
        ({"messages": [{"role": "user"}]}, r":2: turn 0 must be an object with strings 'role' and 'content'; got"),
        ({"conversations": ["hi"]}, r":2: turn 0 must be an object with strings 'from' and 'value'; got"),
        ({"messages": [{"role": "bot", "content": ""}]}, r":2: the role of turn 0 must be one of system.*; got 'bot'"),
        ({"messages": CHAT[1:]}, r":2: a conversation must not start with the assistant"),
        ({"messages": CHAT[:1]}, r":2: a conversation needs a turn of the assistant to learn from; got only user"),
        (
            {"messages": [CHAT[0] | {"weight": 1}]},
            r":2: only turns of the assistant are trained; got 'weight': 1 in turn 0",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / "a.jsonl", GOOD, line))


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a line must be UTF-8; got byte 0xff at its offset 17"):
        read_records(file)
    file = tmp_path / "a.json"
    file.write_bytes(b'[\n"\xff"]')
    with pytest.raises(ValueError, match=r"a\.json:2: JSON must be UTF-8; got byte 0xff at offset 3\..*iconv"):
        read_records(file)


def test_ten_bad_lines_are_collected(tmp_path):
    with pytest.raises(ValueError) as caught:
        read_records(write(tmp_path / "a.jsonl", GOOD, "x", GOOD, "y"))
    assert ".jsonl:2:" in str(caught.value) and ".jsonl:4:" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        read_records(write(tmp_path / "a.jsonl", *["x"] * 30))
    assert str(caught.value).count("a.jsonl:") == 10 and "there may be more" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": }]', r"a\.json:2: a `\.json` file must be one JSON list; Expecting value at column 7\.$"),
        ('{"a": 1}\n{"a": 2}', r"a\.json:2: .*Extra data.* One object a line\? Name the file `\.jsonl`"),
        ('{"data": []}', r"a\.json:1: a `\.json` file must be a list of records; got an object"),
        ("[ ]", r"needs at least one record; .*a\.json has none"),
    ],
)
def test_json_that_is_no_list_of_records(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "a.json")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data file: .*gone.jsonl"):
        read_records(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="needs at least one record"):
        read_records(write(tmp_path / "a.jsonl", "", ""))


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "here.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with (
        contextlib.chdir(tmp_path),
        pytest.raises(ValueError, match="'here.jsonl' is a file, of which there is no ':train'"),
    ):
        kind_of("here.jsonl:train")


def test_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        if name == "own/bad":
            return [GOOD, {"txt": "x"}]
        if name == "own/gone":
            raise ConnectionError("no route")
        return [GOOD, {"messages": CHAT, "instruction": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_records("own/name") == [("own/name[0]", GOOD), ("own/name[1]", {"messages": CHAT})]
    assert asked == [("own/name", "train")]
    with pytest.raises(ValueError, match=r"own/bad\[1\]: a record needs the columns .* got 'txt'"):
        read_records("own/bad")
    with pytest.raises(ValueError, match=r"'own/gone' is no file here, .* \(ConnectionError: no route\)\. Check"):
        read_records("own/gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'own/name' from the hub needs the `datasets` package\. Run `pip install"):
        read_records("own/name")


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 100_000, "nested deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64"),
        ('{"instruction": ' + "9" * 9999 + ', "output": "x"}', "an integer of more than"),
    ],
    ids=["lists", "objects", "whole", "digits"],
)
def test_json_that_python_does_not_read_is_named(name, value, says, tmp_path):
    (tmp_path / name).write_text(f"[{value}]" if name == "r.json" else value)
    with pytest.raises(ValueError, match=rf"(?s){name}.*{says}"):
        read_records(tmp_path / name)
