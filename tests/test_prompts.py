"""Prompts are read and encoded as training data is."""

import json

import numpy as np
import pytest
import tiny
from tokenizers import processors

from jlora import cli
from jlora.cli.prompts import Prompts, encode_prompts, read_prompts
from jlora.data import prepare_text, prompt_ids
from jlora.data.prompts import prompts_of, text_ids

RECORD = {"instruction": "hi", "input": "there", "output": "x"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]


def with_ends(single):
    """A tokenizer that puts tokens around every text."""
    tokenizer = tiny.tokenizer(tiny.CHATML)
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair="$A $B", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


FILES = {
    "lines.txt": (b"hi\nthe keeper\n", ["hi", "the keeper"]),
    "bom.txt": (b"\xef\xbb\xbfhi\r\nthe keeper\r\n", ["hi", "the keeper"]),
    "UPPER.TXT": (b"hi\rho", ["hi", "ho"]),
    "blank.txt": (b"\n  \nhi\n\n\t\n", ["hi"]),
    "spaces.txt": (b"  hi \n", ["  hi "]),
    # U+2028, U+0085, form feed and file separator end no line: they are in the middle of texts.
    "separators.txt": ("a\u2028b\nc\x85d\ne\x0cf\ng\x1ch\n".encode(), ["a\u2028b", "c\x85d", "e\x0cf", "g\x1ch"]),
    "accents.txt": ("Grüße, 灯台\n".encode(), ["Grüße, 灯台"]),
    "p.jsonl": (json.dumps(RECORD).encode() + b"\n", ["hi\nthere"]),
    "P.JSONL": (b"\xef\xbb\xbf" + json.dumps(RECORD).encode() + b"\r\n\r\n", ["hi\nthere"]),
    "list.json": (json.dumps([RECORD], indent=1).encode(), ["hi\nthere"]),
    "no answer.jsonl": (b'{"instruction": "hi", "input": "there"}\n{"instruction": "ho"}', ["hi\nthere", "ho"]),
    "null answer.jsonl": (b'{"instruction": "hi", "output": null}', ["hi"]),
    "chat.jsonl": (json.dumps({"messages": CHAT}).encode(), ["hi"]),
    "open chat.json": (json.dumps([{"messages": CHAT[:1]}]).encode(), ["hi"]),
    "sharegpt.jsonl": (b'{"conversations": [{"from": "human", "value": "hi"}]}', ["hi"]),
    "turns.jsonl": (
        json.dumps({"messages": [*CHAT, {"role": "user", "content": "ho"}]}).encode(),
        ["user: hi\nassistant: x\nuser: ho"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    content, texts = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert [text for text, _ in prompts_of(tmp_path / name)] == texts


REFUSED = {
    "missing.txt": (None, "no prompts file"),
    "empty.txt": (b"", "has none"),
    "blank.txt": (b" \n\r\n", "has none"),
    "empty.jsonl": (b"", "at least one record"),
    "table.csv": (b"instruction\nhi\n", "Convert the file"),
    "latin.txt": (b"one\nGr\xfc\xdfe\n", "latin.txt:2: prompts must be UTF-8; got byte 0xfc"),
    "half.jsonl": (b'{"instruction": 3}', "'instruction' must be a string"),
    "cut.jsonl": (b'{"instruction": "hi"', "cut.jsonl:1"),
    "text.jsonl": (b'"hi"\n', "must be a JSON object"),
    "object.json": (b'{"instruction": "hi"}', "must be a list of records"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_hold_no_prompts(name, tmp_path):
    content, says = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prompts_of(tmp_path / name)
    assert says in str(error.value)


def test_a_file_does_not_depend_on_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    (tmp_path / "p.txt").write_bytes("Grüße\n".encode())
    assert prompts_of(tmp_path / "p.txt")[0].text == "Grüße"


def test_an_answer_is_not_looked_at(tmp_path):
    """What is generated from is what stood in front of the answer in training."""
    tokenizer = tiny.tokenizer(tiny.CHATML)
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"instruction": "hi"}, {"instruction": "hi", "output": "yes"}]
    found = prompts_of(tiny.write_records(tmp_path / "p.jsonl", rows))
    ids = [prompt_ids(record, tokenizer, template="chat") for _, record in found]
    assert ids == [tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]] * 4


@pytest.mark.parametrize(
    ("single", "bos"),
    [("$A", []), ("<|im_start|> $A", [1]), ("$A <|im_end|>", []), ("<|im_start|> $A <|im_end|>", [1])],
)
@pytest.mark.parametrize("text", ["the keeper", "<|im_start|>the keeper", "the keeper<|im_end|>", " "])
def test_raw_prompts_have_the_tokens_of_a_document(single, bos, text, tmp_path):
    """The same as at the start of a document in training, which is closed by one end of text."""
    tokenizer = with_ends(single)
    (tmp_path / "d.txt").write_text(text)
    prepare_text(tmp_path / "d.txt", tokenizer, directory=tmp_path / "shards", eval_fraction=0.0)
    document = np.load(tmp_path / "shards/train-00000.npy").tolist()
    ids = text_ids(tokenizer, text)
    starts = bool(bos) or text.startswith("<|im_start|>")
    assert (ids[0] == 1) == starts and ids.count(1) == starts, "once, also where the text says it itself"
    assert document == (ids if ids[-1] == 2 else [*ids, 2])


def test_an_empty_prompt_starts_a_document():
    assert text_ids(with_ends("$A"), "") == [1]
    assert text_ids(with_ends("<|im_start|> $A <|im_end|>"), "") == [1]
    bare = tiny.tokenizer()
    bare.bos_token = None
    assert text_ids(bare, "") == [0]
    bare.eos_token = None
    with pytest.raises(ValueError, match="An empty prompt needs"):
        text_ids(bare, "")


def test_the_command_line(capsys):
    tokenizer = with_ends("<|im_start|> $A <|im_end|>")
    options = Prompts(prompts=("hi", "<|im_start|>hi"))
    first, second = encode_prompts(read_prompts(options), options, tokenizer)
    assert first[1] == second[1] and first[1][0] == 1 and 2 not in first[1]
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "m", "--prompts", "ok", "half \udcff"])
    assert (
        "prompt 2: text must be Unicode; got U+DCFF, half of a surrogate pair, at character 5"
        in capsys.readouterr().err
    )


def test_messages_need_a_template(tmp_path):
    options = Prompts(prompts_file=tiny.write_records(tmp_path / "p.jsonl", [{"messages": CHAT}]))
    with pytest.raises(ValueError, match="give --template chat"):
        encode_prompts(read_prompts(options), options, tiny.tokenizer())


def test_a_folder_of_text(tmp_path):
    """Endings in any case, and what else lies there is named."""
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "B.TXT", "sub/c.Txt", "notes.md", "sub/table.csv", ".hidden"):
        (folder / name).write_text("the keeper\n")
    with pytest.warns(UserWarning, match=r"left out: notes\.md, sub/table\.csv$"):
        meta = prepare_text(folder, tiny.tokenizer(), directory=tmp_path / "s", eval_fraction=0.0)
    assert [source["name"] for source in meta["request"]["sources"]] == ["B.TXT", "a.txt", "sub/c.Txt"]
