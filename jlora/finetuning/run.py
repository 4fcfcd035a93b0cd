"""The directory of a run: its config, its log, and the rules of resuming."""

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from jlora._numbers import json_text
from jlora.finetuning.config import FinetuneConfig
from jlora.formats.files import whole_file

# Where a run is, how it is started and how much it says do not change its result.
_FREE_TO_CHANGE = ("output", "resume", "quiet")


class Run:
    """`OUTPUT/`: config.yaml (resolved), run.json (what it ran on), metrics.jsonl, checkpoints/, data/, adapter/.

    Raises:
        FileExistsError: when the directory holds something and `config.resume` is off.
        FileNotFoundError: when there is nothing to resume.
        ValueError: when a resumed run's config differs from the one it started with.
    """

    def __init__(self, config: FinetuneConfig):
        self.directory = Path(config.output)
        self.checkpoints = self.directory / "checkpoints"
        self.data = self.directory / "data"
        self.adapter = self.directory / "adapter"
        self._log_path = self.directory / "metrics.jsonl"
        self._config_path = self.directory / "config.yaml"
        fields = _plain(dataclasses.asdict(config))
        if config.resume:
            if not self._config_path.is_file():
                raise FileNotFoundError(f"There is no run to resume in {config.output!r}. Start it without --resume.")
            _refuse_changes(yaml.safe_load(self._config_path.read_text()), fields, "the configuration", _FREE_TO_CHANGE)
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise FileExistsError(
                f"{config.output!r} exists and is not empty. Choose another --output, or continue that run with --resume."
            )
        else:
            self._made = not self.directory.exists()
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(self._config_path, yaml.safe_dump(fields, sort_keys=False))
        self._resumed = config.resume

    def check_origin(self, origin: Mapping[str, Any]) -> None:
        """Records what the run is made from, or, on resuming, compares it with what it was.

        Raises:
            ValueError: when the data, the base model or the number of steps changed, with the difference.
        """
        path = self.directory / "run.json"
        if self._resumed and path.is_file():
            _refuse_changes(json.loads(path.read_text())["origin"], _plain(origin), "what the run was made from")
            return
        versions = {name: version(name) for name in ("jax", "flax", "optax", "numpy")} | {
            "python": platform.python_version()
        }
        _write(path, json.dumps({"origin": origin, "versions": versions}, indent=2) + "\n")

    def abandon(self) -> None:
        """Takes back what a start that failed has written, so that the corrected command finds the directory as it was."""
        if self._resumed or (self.directory / "run.json").is_file():
            return
        shutil.rmtree(self.data, ignore_errors=True)
        self._config_path.unlink(missing_ok=True)
        if self._made and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def rewind_log(self, step: int) -> list[dict[str, Any]]:
        """Drops the log's entries after `step` (all of them for -1), and a line that was cut off; returns the rest."""
        kept = []
        if self._log_path.is_file():
            for line in self._log_path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the process died within this line; nothing comes after it
                if entry["step"] <= step:
                    kept.append(entry)
        _write(self._log_path, "".join(json_text(entry) + "\n" for entry in kept))
        return kept

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends an object to metrics.jsonl, on disk when this returns."""
        with self._log_path.open("a") as file:
            file.write(json_text(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON and YAML give it back: tuples as lists."""
    return json.loads(json.dumps(fields))


def _refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], what: str, free: tuple[str, ...] = ()) -> None:
    names = [n for n in {**now, **before} if n not in free and before.get(n) != now.get(n)]
    if names:
        listed = "\n  ".join(f"{n}: was {before.get(n)!r}, is {now.get(n)!r}" for n in names)
        raise ValueError(
            f"A resumed run ends as if it had not stopped, so {what} must not change:\n  {listed}\n"
            "Resume with what it was, or start another run with a new --output."
        )


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)
