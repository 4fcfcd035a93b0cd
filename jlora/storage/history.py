"""The files that runs leave: metrics.jsonl, read strictly, since what is drawn or published of it is what was measured."""

import os
from collections.abc import Iterator
from pathlib import Path

from jlora._typing import JsonObject
from jlora.storage.fields import Kind, integer, is_number, optional, wrong_fields
from jlora.storage.structured import parse_json, read_text

EXPERIMENTS = "experiments_log.csv"
"""The table of all runs, beside their directories. No data, in a folder of data."""

_NUMBER = Kind("a finite number", is_number)
_FIELDS = {
    "step": integer(0, (1 << 31) - 1),
    **dict.fromkeys(("loss", "eval_loss", "learning_rate", "tokens_per_second"), _NUMBER),
    "grad_norm": optional(_NUMBER),  # as `_OVERFLOWED` has it
    "perplexity": optional(_NUMBER),  # of a loss beyond 709 it is infinite, which JSON does not have
}
_OVERFLOWED = _FIELDS | {"loss": optional(_NUMBER)}
"""Of a step that float16 left out, whose loss or gradient is not finite."""


def read_history(path: str | os.PathLike) -> list[JsonObject]:
    """The entries of a metrics.jsonl.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: with the file and the line of the first one that is no entry.
    """
    return [_entry(line, where) for line, where in _lines(path)]


def readable_history(path: str | os.PathLike) -> tuple[list[JsonObject], list[str]]:
    """The entries of a metrics.jsonl that may be damaged, and what is wrong with its other lines, each in words.

    Raises:
        FileNotFoundError, ValueError: when it cannot be read at all.
    """
    entries, wrong = [], []
    for line, where in _lines(path):
        try:
            entries.append(_entry(line, where))
        except ValueError as error:
            wrong.append(str(error))
    return entries, wrong


def _lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(line, its place in words)."""
    path = Path(path)
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        yield line, f"{path.name} line {number}"


def _entry(line: str, where: str) -> JsonObject:
    entry = parse_json(line, where=where)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must hold an object; got {line[:40]!r}.")
    for wrong in wrong_fields(entry, _OVERFLOWED if "skipped" in entry else _FIELDS, required=("step",)):
        raise ValueError(f"{where}: {wrong}")
    return entry
