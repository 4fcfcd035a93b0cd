"""The directory of a run: its config, what it was made from, and the rules of starting, resuming and giving up."""

import dataclasses
import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import yaml

from jlora._typing import Json, JsonObject
from jlora.data.shards import holds_only_shards
from jlora.runs.config import FinetuneConfig
from jlora.runs.flags.optimization import resolved
from jlora.runs.log import Log
from jlora.storage.lock import LOCK, only_writer
from jlora.storage.structured import read_json, read_yaml
from jlora.storage.whole import full_disk_said, is_partial, remove_all_partial, whole_file
from jlora.train.checkpoints import saved_steps

CONFIG, ORIGIN, METRICS, DATA, CHECKPOINTS, ADAPTER, MODEL, BAD_RECORDS = (
    "config.yaml", "run.json", "metrics.jsonl", "data", "checkpoints", "adapter", "model", "bad_records.jsonl",
)  # fmt: skip
_STARTED = {CONFIG, ORIGIN, METRICS, DATA, CHECKPOINTS, BAD_RECORDS, LOCK}
"""What a run may have that has saved no state. config.yaml is written first and taken back last."""

# Where a run is, how it is started and how much it says do not change its result.
_FREE_TO_CHANGE = ("output", "resume", "quiet")


class Run:
    """`OUTPUT/`: config.yaml (resolved), run.json (what it ran on), metrics.jsonl, checkpoints/, data/, adapter/ or model/.

    A context manager: this process alone writes to the directory within it.

    Raises, on entering:
        FileExistsError: when the directory holds something else than a run that saved nothing, and `config.resume` is off.
        FileNotFoundError: when there is nothing to resume.
        InUse: when another process writes to it.
        ValueError: when a resumed run's config cannot be read or differs from the one it started with.
    """

    def __init__(self, config: FinetuneConfig):
        self.directory = Path(config.output)
        self.checkpoints = self.directory / CHECKPOINTS
        self.data = self.directory / DATA
        self.bad_records = self.directory / BAD_RECORDS
        self.adapter = self.directory / ADAPTER
        self.model = self.directory / MODEL
        self.log = Log(self.directory / METRICS)
        self.replaces = False
        """Whether a run that had saved nothing was there."""
        self._config = config
        self._made = False
        self._held = False
        self._exit = ExitStack()

    def __enter__(self) -> "Run":
        fields = _plain(dataclasses.asdict(self._config))
        try:
            if self._config.resume:
                self._resume(fields)
            else:
                self._start(fields)
        except BaseException:
            if self._held:
                self.abandon()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._exit.close()
        if self._made and self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _resume(self, fields: Mapping[str, Json]) -> None:
        path = self.directory / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"There is no run to resume in {str(self.directory)!r}. Start it without --resume.")
        self._hold()
        try:
            before = read_yaml(path)
        except ValueError as error:
            raise ValueError(f"{error} {self._repair('the settings of the run')}") from error
        before = resolved(_DEFAULTS | before)
        _refuse_changes(before, resolved(fields), path, "the configuration", self._instead(), _FREE_TO_CHANGE)
        remove_all_partial(self.directory)

    def _start(self, fields: Mapping[str, Json]) -> None:
        # Twice: a directory that is somebody's gets no lock, and one that is free now may be another's when it is locked.
        if not (self.directory / LOCK).exists():
            self._refuse_what_is_there()
        self._made = not self.directory.exists()
        with full_disk_said(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._refuse_what_is_there()
            self.replaces = (self.directory / CONFIG).exists()
            self._clear()
            _write(self.directory / CONFIG, yaml.safe_dump(dict(fields), sort_keys=False))

    def _hold(self) -> None:
        self._exit.enter_context(only_writer(self.directory, "trained"))
        self._held = True

    def _refuse_what_is_there(self) -> None:
        if self.directory.exists() and not self._saved_nothing():
            raise FileExistsError(
                f"{str(self.directory)!r} exists and is not empty. Choose another --output, or continue that run with --resume."
            )

    def _saved_nothing(self) -> bool:
        """Whether nothing is there but what a run writes before its first checkpoint."""
        if not self.directory.is_dir():
            return False
        # Older versions wrote to config.yaml.partial.
        names = {p.name for p in self.directory.iterdir() if not is_partial(p.name)} - {LOCK, f"{CONFIG}.partial"}
        if not names:
            return True
        return (
            CONFIG in names
            and names <= _STARTED
            and (DATA not in names or holds_only_shards(self.data))
            and not self._has_checkpoints()
        )

    def _has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(
            not is_partial(p.name) and not (p.is_dir() and p.name.isdecimal() and not any(p.iterdir()))
            for p in self.checkpoints.iterdir()
        )

    def _clear(self) -> None:
        """Takes away what a run has that has saved no state."""
        for directory in (self.checkpoints, self.data):
            shutil.rmtree(directory, ignore_errors=True)
        for name in (METRICS, ORIGIN, BAD_RECORDS, f"{CONFIG}.partial", CONFIG):
            (self.directory / name).unlink(missing_ok=True)
        remove_all_partial(self.directory)

    @property
    def saved(self) -> int | None:
        """The step of the last checkpoint."""
        return max(saved_steps(self.checkpoints), default=None)

    def abandon(self) -> None:
        """Takes back what a start that failed or was stopped has written: the same or a corrected command finds it as it was."""
        if not self._config.resume and self._saved_nothing():
            self._clear()

    def check_origin(self, origin: Mapping[str, Json]) -> str | None:
        """Records what the run is made from, or, on resuming, compares it with what it was.

        Returns:
            What is to be said of libraries that are of another version than when the run began.

        Raises:
            ValueError: when the data, the base model or the number of steps changed, with the difference; or when the record
                is lost.
        """
        path = self.directory / ORIGIN
        if self._config.resume and (path.exists() or saved_steps(self.checkpoints)):
            what = "the record of what the run was made from"
            try:
                record = read_json(path)
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(f"{error} {self._repair(what)}") from error
            before = record.get("origin")
            if not isinstance(before, dict):
                raise ValueError(f"{str(path)!r} must have the object `origin`; got {before!r}. {self._repair(what)}")
            _refuse_changes(before, _plain(origin), path, "what the run was made from", self._instead())
            return _other_versions(record.get("versions"))
        _write(path, json.dumps({"origin": origin, "versions": _versions()}, indent=2) + "\n")
        return None

    def _repair(self, what: str) -> str:
        return f"It is {what}: put a copy of it back, or {self._instead()}."

    def _instead(self) -> str:
        if self._has_checkpoints():
            return "start another run with a new --output"
        return "start again without --resume (this run has saved no state yet)"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "flax", "optax", "numpy")} | {"python": platform.python_version()}


def _other_versions(before: Json) -> str | None:
    """They do not make another run, and may change its last digits."""
    before = before if isinstance(before, dict) else {}
    changed = [
        f"{name} {before[name]} (now {now})" for name, now in _versions().items() if before.get(name, now) != now
    ]
    if not changed:
        return None
    return f"this run began with {', '.join(changed)}: it may end with other digits than one that was not stopped"


def _plain(fields: Mapping[str, Json]) -> JsonObject:
    """As JSON and YAML give it back: tuples as lists."""
    return json.loads(json.dumps(fields))


def _refuse_changes(
    before: Mapping[str, Json], now: Mapping[str, Json], file: Path, what: str, instead: str, free: tuple[str, ...] = ()
) -> None:
    names = [n for n in {**now, **before} if n not in free and (n in before, before.get(n)) != (n in now, now.get(n))]
    if names:
        listed = "\n  ".join(
            f"{n}: was {before[n]!r}, is {now.get(n)!r}"
            if n in before
            else f"{n}: is {now[n]!r}, and missing in {file}"
            for n in names
        )
        raise ValueError(
            f"A resumed run ends as if it had not stopped, so {what} must not change:\n  {listed}\n"
            f"Resume with what it was, or {instead}."
        )


_DEFAULTS = _plain(
    {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.default is not dataclasses.MISSING}
)
"""What a field counts as that an older version's config.yaml lacks: options come with defaults that change nothing."""


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)
