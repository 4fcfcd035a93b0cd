"""The directory of a run: its config, what it was made from, and the rules of starting, resuming and giving up."""

import dataclasses
import json
import platform
import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import yaml

from jlora._numbers import MAX_COUNT
from jlora._typing import Json, JsonObject
from jlora.data.shards import holds_only_shards
from jlora.report.run_files import REPORT
from jlora.runs import changes
from jlora.runs.config import FinetuneConfig
from jlora.runs.flags.optimization import resolved
from jlora.runs.log import Log
from jlora.storage.fields import anything, integer, list_of, mapping_of, text, wrong_fields
from jlora.storage.lock import LOCK, Held, only_writer
from jlora.storage.structured import read_json, read_yaml
from jlora.storage.whole import full_disk_said, is_partial, remove_all_partial, whole_file
from jlora.train.checkpoints import saved_steps

CONFIG, ORIGIN, METRICS, DATA, CHECKPOINTS, ADAPTER, MODEL, BAD_RECORDS = (
    "config.yaml", "run.json", "metrics.jsonl", "data", "checkpoints", "adapter", "model", "bad_records.jsonl",
)  # fmt: skip
WATCHED = ("metrics.csv", "samples.jsonl", "tensorboard", "wandb", "profile", *REPORT)
"""What is written of a run beside its log."""
_STARTED = {CONFIG, ORIGIN, METRICS, DATA, CHECKPOINTS, BAD_RECORDS, LOCK, *WATCHED}
"""What a run may have that has saved no state. config.yaml is written first and taken back last."""

_RECORD = {
    "id": text(),
    "ended_after": integer(1, MAX_COUNT),
    "ended_by": text(),
    "changes": list_of(mapping_of(anything())),
}
"""What run.json may have beside `origin` and `versions`."""


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
        self.began = changes.plain(dataclasses.asdict(config))
        """The fields that the run began with, as config.yaml has them."""
        self._config = config
        self._record: JsonObject = {}
        self._made = False
        self._held: Held | None = None
        self._exit = ExitStack()

    def __enter__(self) -> "Run":
        try:
            if self._config.resume:
                self._resume()
            else:
                self._start()
        except BaseException:
            if self._held is not None:
                self.abandon()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._exit.close()
        if self._made and self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _resume(self) -> None:
        path = self.directory / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"There is no run to resume in {str(self.directory)!r}. Start it without --resume.")
        self._hold()
        try:
            before = read_yaml(path)
        except ValueError as error:
            raise ValueError(f"{error} {self._repair('the settings of the run')}") from error
        now, self.began = self.began, changes.DEFAULTS | before
        free = (*changes.FREE, *changes.rounded(self.began, now))
        before = resolved(self.began)
        _refuse_changes(before, resolved(now), path, "the configuration", self._instead(), free)
        remove_all_partial(self.directory)

    def _start(self) -> None:
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
            _write(self.directory / CONFIG, yaml.safe_dump(dict(self.began), sort_keys=False))

    def _hold(self) -> None:
        self._held = self._exit.enter_context(only_writer(self.directory, "trained"))

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
        for name in (CHECKPOINTS, DATA, *WATCHED, METRICS, ORIGIN, BAD_RECORDS, f"{CONFIG}.partial", CONFIG):
            path = self.directory / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        remove_all_partial(self.directory)

    def check_alone(self) -> None:
        """
        Raises:
            InUse: when another process has taken the directory over, after a long silence of this one.
        """
        if self._held is not None:
            self._held.check()

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
            _refuse_changes(before, changes.plain(origin), path, "what the run was made from", self._instead())
            if wrong := list(wrong_fields(record, _RECORD)):
                raise ValueError(f"{str(path)!r} is damaged: {' '.join(wrong)} {self._repair(what)}")
            self._record = record
            return _other_versions(record.get("versions"))
        self._update({"origin": origin, "versions": _versions()})
        return None

    @property
    def id(self) -> str:
        """Of this run and no other, in tables and trackers."""
        if "id" not in self._record:
            self._update({"id": uuid.uuid4().hex[:8]})
        return self._record["id"]

    @property
    def ended(self) -> int | None:
        """The step after which a callback ended the run."""
        return self._record.get("ended_after")

    def end_after(self, step: int, why: str) -> None:
        """Records that the run ends there, which holds for every resumption of it. Before the state of that step is saved: one
        that is saved without the record would be gone on from."""
        self._update({"ended_after": step, "ended_by": why})

    def note(self, fields: Mapping[str, Json]) -> None:
        """Puts what was found out of the run into run.json, for those who read it; a resumed run does not."""
        self._update(changes.plain(fields))

    def note_changes(self, step: int) -> str | None:
        """Records how the steps from `step` + 1 on are computed, where that is otherwise than the run began.

        Returns:
            What is to be said of it.
        """
        now = changes.plain(dataclasses.asdict(self._config))
        names = [n for n in changes.differences(resolved(self.began), resolved(now)) if n not in changes.FREE]
        noted = [*self._record.get("changes", ())]
        last = {n: v for n, v in (noted[-1] if noted else {}).items() if n != "after_step"}
        if last != (new := {name: now[name] for name in names}):
            self._update({"changes": [*noted, {"after_step": step, **new}]})
        return changes.said(self.began, now, names) if names else None

    def command(self) -> str:
        """What continues the run, for a shell."""
        return changes.command(self._config, self.began)

    def _update(self, fields: Mapping[str, Json]) -> None:
        """Of run.json."""
        self._record |= fields
        _write(self.directory / ORIGIN, json.dumps(self._record, indent=2) + "\n")

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


def _refuse_changes(
    before: Mapping[str, Json], now: Mapping[str, Json], file: Path, what: str, instead: str, free: tuple[str, ...] = ()
) -> None:
    if names := [name for name in changes.differences(before, now) if name not in free]:
        listed = "\n  ".join(
            f"{n}: was {before[n]!r}, is {now.get(n)!r}"
            if n in before
            else f"{n}: is {now[n]!r}, and missing in {file}"
            for n in names
        )
        raise ValueError(
            f"A resumed run ends as if it had not stopped, so {what} must not change:\n  {listed}\n"
            f"Resume with what it was, which is in {str(file)!r}, or {instead}."
        )


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)
