"""The files that runs leave: metrics.jsonl, read strictly, since what is drawn or published of it is what was measured."""

import os
from pathlib import Path

from jlora._typing import JsonObject
from jlora.storage.fields import Kind, integer, is_number, optional, wrong_fields
from jlora.storage.structured import parse_json, read_text

EXPERIMENTS = "experiments_log.csv"
"""The table of all runs, beside their directories. No data, in a folder of data."""

_NUMBER = Kind("a finite number", is_number)
_FIELDS = {
    "step": integer(0, (1 << 31) - 1),
    **dict.fromkeys(("loss", "eval_loss", "learning_rate"), _NUMBER),
    "perplexity": optional(_NUMBER),  # of a loss beyond 709 it is infinite, which JSON does not have
}


def read_history(path: str | os.PathLike) -> list[JsonObject]:
    """The entries of a metrics.jsonl.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: with the file and the line of the first one that is no entry.
    """
    path = Path(path)
    lines = read_text(path).splitlines()
    return [_entry(line, f"{path.name} line {number}") for number, line in enumerate(lines, start=1)]


def _entry(line: str, where: str) -> JsonObject:
    entry = parse_json(line, where=where)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must hold an object; got {line[:40]!r}.")
    for wrong in wrong_fields(entry, _FIELDS, required=("step",)):
        raise ValueError(f"{where}: {wrong}")
    return entry
