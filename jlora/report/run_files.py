"""The directory of a run as it is found, whole or not: what can be read of it, and in words what cannot."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jlora._typing import Json, JsonObject
from jlora.report.norms import Update, update_norms
from jlora.report.record import CONFIG, METRICS, RunRecord, read_config
from jlora.storage.fields import is_integer, is_number
from jlora.storage.history import readable_history
from jlora.storage.structured import parse_json, read_json, read_text
from jlora.weight import Inseparable

HTML, MARKDOWN = REPORT = ("report.html", "report.md")
"""What is written of it, here or elsewhere."""
ORIGIN, SAMPLES, ADAPTER, MODEL = "run.json", "samples.jsonl", "adapter", "model"
_SHOWN_WRONG = 3  # of the damaged lines of a file

Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a run left, as far as it can be read."""

    record: RunRecord
    """Empty where its files are not there."""
    origin: Mapping[str, Json]
    """run.json."""
    samples: Sequence[Mapping[str, Json]]
    """samples.jsonl: objects of step, prompt and text."""
    updates: Sequence[Update]
    """Of the adapter, where it has them."""
    files: Sequence[tuple[str, int]]
    """(name, bytes) of what is in the directory; a directory's name ends with a slash, and its bytes are of all that is in it."""
    wrong: Sequence[str]
    """What is missing or damaged, a sentence each."""

    @classmethod
    def look(cls, directory: str | os.PathLike) -> "RunFiles":
        """
        Raises:
            FileNotFoundError: for what is no directory of `jlora finetune`.
        """
        directory = Path(directory)
        if not any((directory / name).is_file() for name in (CONFIG, METRICS)):
            raise FileNotFoundError(
                f"{str(directory)!r} is no run of `jlora finetune`: there is neither {CONFIG} nor {METRICS} in it."
            )
        wrong: list[str] = []

        def read(function: Callable[[], Read], otherwise: Read) -> Read:
            try:
                return function()
            except (OSError, ValueError, Inseparable) as error:
                wrong.append(f"{str(error).rstrip('.')}.")
                return otherwise

        def lines(found: tuple[list[JsonObject], list[str]]) -> list[JsonObject]:
            entries, said = found
            wrong.extend(said[:_SHOWN_WRONG])
            wrong.extend([f"So are {len(said) - _SHOWN_WRONG} more of its lines."] if len(said) > _SHOWN_WRONG else [])
            return entries

        config = read(lambda: read_config(directory), {})
        history = lines(read(lambda: readable_history(directory / METRICS), ([], [])))
        samples = directory / SAMPLES
        adapter = directory / ADAPTER
        made = cls(
            record=RunRecord(directory, config, _each_step_once(history)),
            origin=read(lambda: read_json(directory / ORIGIN), {}),
            samples=lines(read(lambda: _samples(samples), ([], []))) if samples.exists() else [],
            updates=read(lambda: update_norms(adapter), []) if adapter.exists() else [],
            files=read(lambda: _files(directory), []),
            wrong=wrong,
        )
        if (said := made.unfinished) is not None:
            wrong.insert(0, said)
        return made

    @property
    def directory(self) -> Path:
        return self.record.directory

    @property
    def name(self) -> str:
        given = self.record.config.get("run_name")
        return given if isinstance(given, str) and given else self.directory.absolute().name

    @property
    def steps(self) -> int:
        """That were made, by the log."""
        return max((entry["step"] for entry in self.record.history), default=0)

    @property
    def planned(self) -> int | None:
        """Steps of the whole run; None: it does not say."""
        steps = self.figure("origin", "steps")
        return steps if is_integer(steps) else None

    @property
    def ended_by(self) -> str | None:
        """Why it ended before its planned steps, where a rule ended it."""
        said = self.origin.get("ended_by")
        return said if isinstance(said, str) and self.origin.get("ended_after") == self.steps else None

    @property
    def unfinished(self) -> str | None:
        """What it lacks to its end, in words; None: it is finished."""
        if any((self.directory / name).is_dir() for name in (ADAPTER, MODEL)):
            return None
        of = f" of {self.planned:,}" if self.planned else ""
        return f"The run is not finished: its log ends with step {self.steps:,}{of}, and there is no adapter yet."

    def figure(self, *names: str) -> Json:
        """A value of run.json, by the names that lead to it; None: it is not there."""
        value: Json = self.origin
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def number(self, *names: str) -> float | None:
        """As `figure`, where it is a number."""
        value = self.figure(*names)
        return value if is_number(value) else None


def _each_step_once(history: Sequence[JsonObject]) -> list[JsonObject]:
    """By rising steps; of two entries of a step the first, as `--resume` has it."""
    found: dict[int, JsonObject] = {}
    for entry in history:
        found.setdefault(entry["step"], entry)
    return [found[step] for step in sorted(found)]


def _samples(path: Path) -> tuple[list[JsonObject], list[str]]:
    """The samples of a file, and what is wrong with its other lines."""
    found, wrong = [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path.name} line {number}"
        try:
            sample = parse_json(line, where=where)
        except ValueError as error:
            wrong.append(str(error))
            continue
        texts = isinstance(sample, dict) and all(isinstance(sample.get(name), str) for name in ("prompt", "text"))
        if texts and is_integer(sample.get("step")):
            found.append(sample)
        else:
            wrong.append(f"{where} is no sample: it must have a `step`, a `prompt` and a `text`.")
    return found, wrong


def _files(directory: Path) -> list[tuple[str, int]]:
    return [
        (path.name + "/" * path.is_dir(), _bytes(path))
        for path in sorted(directory.iterdir(), key=lambda path: (path.is_dir(), path.name))
        if not path.name.startswith(".") and path.name not in REPORT
    ]


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(_bytes(inner) for inner in path.iterdir() if not inner.is_symlink())
    return path.lstat().st_size
