"""Prompts read and encoded as training data is."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jlora._typing import Json, PretrainedTokenizer
from jlora.data.formats import unanswered
from jlora.data.records import Record, read_records
from jlora.data.sources import kind_of
from jlora.data.tokens import added_bos, encode, require_text, with_bos

_SUFFIXES = (".txt", ".jsonl", ".json")
_LINE_END = re.compile(r"\r\n|\n|\r")


class Prompt(NamedTuple):
    text: str
    """To show."""
    record: Record
    """With `instruction`, or `messages`."""


def prompts_of(path: str | Path) -> list[Prompt]:
    """The prompts in a file: a `.txt` file has one in each line that is not blank, a `.jsonl` or `.json` file one in each record.

    Read as data is: UTF-8, a byte order mark left out, endings in any case. A record needs no answer, and one that is
    there is not looked at: the last turn of `messages`, if it is the assistant's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, bytes that are not UTF-8, records that `read_records` refuses, or no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompts file {str(path)!r}.")
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"A prompts file must be a {', '.join(_SUFFIXES)} file; got {str(path)!r}. Convert the file.")
    if kind_of(path) == "records":
        return [Prompt(shown(record), record) for _, record in read_records(path, prepare=unanswered)]
    lines = enumerate(_LINE_END.split(_read_text(path)), 1)
    found = [Prompt(check_text(line, f"{path}:{n}"), Record(instruction=line)) for n, line in lines if line.strip()]
    if not found:
        raise ValueError(f"A prompts file needs a prompt; {str(path)!r} has none, only blank lines.")
    return found


def text_ids(tokenizer: PretrainedTokenizer, text: str) -> list[int]:
    """The tokens of raw text to continue: as at the start of a document, which the text need not end.

    Raises:
        ValueError: an empty text, and a tokenizer without a token to start from.
    """
    ids = with_bos(encode(tokenizer, text), added_bos(tokenizer))
    if ids:
        return ids
    # Nothing starts from what stands between documents.
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("An empty prompt needs a beginning-of-text or end-of-text token, and this tokenizer has none.")
    return [start]


def check_text(text: str, where: str) -> str:
    """The text, when it is one: Python puts halves of characters where bytes were not UTF-8.

    Raises:
        ValueError: when it cannot be encoded.
    """
    try:
        require_text(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Check the terminal's encoding, or put the prompt into a file.") from error
    return text


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: prompts must be UTF-8; got byte 0x{raw[error.start]:02x} at offset {error.start}. "
            "Convert the file, for example with `iconv -t utf-8`."
        ) from error


def shown(record: Mapping[str, Json]) -> str:
    """What a record asks, as people read it."""
    if "text" in record:
        return record["text"]
    if "messages" not in record:
        return "\n".join(filter(None, (record["instruction"], record.get("input"))))
    turns = record["messages"]
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)
