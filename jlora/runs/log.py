"""`metrics.jsonl`: one JSON object a logged step, read line by line."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jlora._numbers import json_number
from jlora._typing import Json, JsonObject
from jlora.storage.structured import parse_json
from jlora.storage.whole import full_disk_said, whole_file

_TRAINED = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
_EVALUATED = ("eval_loss",)
_OVERFLOWED = ("loss", "grad_norm")  # not finite in a step that float16 left out
_SHOWN = 40  # characters of a damaged line


class Log:
    """The log of a run."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, entry: Mapping[str, Json]) -> JsonObject:
        """Appends an entry, on disk when this returns, and returns it as it was written: numbers that are not finite, which JSON
        does not have, as None."""
        entry = strict(entry)
        with full_disk_said(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        return entry

    def rewind(self, last: int, *, first: int) -> tuple[list[JsonObject], list[str]]:
        """Drops the entries after the step `last`, and a line that was cut off at the end.

        Args:
            last: the step to go on after; -1: drop all.
            first: the step that a log begins with.
        Returns:
            The entries that stay, each step once and in order; and what was found wrong with them, in words: lines that are no
            entries, steps that stand twice (the first stays) or are missing.
        """
        before = self.path.read_bytes() if self.path.is_file() else b""
        lines = before.split(b"\n")
        kept: dict[int, JsonObject] = {}
        wrong = []
        for number, line in enumerate(lines, 1):
            try:
                entry = _entry(line)
            except ValueError as error:
                if number < len(lines):  # behind the last newline is nothing, or what a process wrote when it died
                    shown = line[:_SHOWN].decode(errors="backslashreplace") + ("…" if len(line) > _SHOWN else "")
                    wrong.append(f"line {number} is left out: {error} ({shown!r})")
                continue
            if entry["step"] > last:
                continue
            if entry["step"] in kept:
                wrong.append(f"line {number} is left out: step {entry['step']} stands above already")
            else:
                kept[entry["step"]] = entry
        if missing := [step for step in range(first, last + 1) if step not in kept]:
            wrong.append(f"no entry for step {_ranges(missing)}")
        entries = [kept[step] for step in sorted(kept)]
        after = "".join(map(_line, entries)).encode()
        if after != before:
            with whole_file(self.path) as partial:
                partial.write_bytes(after)
        return entries, wrong


def strict(entry: Mapping[str, Json]) -> JsonObject:
    """The entry with None for numbers that are not finite."""
    return {name: json_number(value) if isinstance(value, float) else value for name, value in entry.items()}


def _line(entry: Mapping[str, Json]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def _entry(line: bytes) -> JsonObject:
    """The entry of a line.

    Raises:
        ValueError: when it is none, with the reason in a few words.
    """
    if not line.strip():
        raise ValueError("it is empty")
    try:
        entry = parse_json(line.decode(), where="it")
    except ValueError as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    entry = strict(entry)
    step = entry.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError("its `step` is no whole number")
    for name in _TRAINED if step else _EVALUATED:
        if name not in entry:
            raise ValueError(f"it has no `{name}`")
    unbounded = ("perplexity", *(_OVERFLOWED if "skipped" in entry else ()))
    for name, value in entry.items():
        if isinstance(value, bool) or not (isinstance(value, int | float) or (value is None and name in unbounded)):
            raise ValueError(f"its `{name}` is no number")
    return entry


def _ranges(steps: Sequence[int]) -> str:
    """3, 5-7."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts)


def lowest(entries: Iterable[Mapping[str, Json]]) -> float:
    """The lowest evaluation loss after the first step; infinite without one."""
    return min((entry["eval_loss"] for entry in entries if entry["step"] and "eval_loss" in entry), default=math.inf)
