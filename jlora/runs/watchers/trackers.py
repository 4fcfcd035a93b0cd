"""`--log-to wandb` and `--log-to trackio`: the log at a tracker of runs."""

import abc
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jlora._typing import Json
from jlora.runs.callbacks import Callback, View
from jlora.runs.watchers.tensorboard import required

PROJECT = "jlora"
"""Where the tracker's own variable names no other."""


class _Tracker(Callback, abc.ABC):
    """Sends the entries of metrics.jsonl, by their names, from the first on that the tracker does not have: what was lost with a
    process is sent by the next, and nothing twice."""

    PACKAGE = ""

    def __init__(self):
        self._package: Any = required(self.PACKAGE, self.PACKAGE)
        self._run: Any = None
        self._next = 0

    @abc.abstractmethod
    def begin(self, view: View, config: dict[str, Json]) -> tuple[Any, int]:
        """(the run at the tracker, the first step that it does not have)."""

    def on_start(self, view: View) -> None:
        self._run, self._next = self.begin(view, dataclasses.asdict(view.config))
        for entry in view.history:
            self.on_log(view, entry)

    def on_log(self, view: View, entry: Mapping[str, Json]) -> None:
        if entry["step"] >= self._next:
            self._run.log({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])

    def on_end(self, view: View) -> None:
        if self._run is not None:
            self._run.finish()


class Wandb(_Tracker):
    """Weights & Biases, by its own variables (WANDB_PROJECT, WANDB_MODE, …); its files are in OUTPUT/wandb. Offline a process
    cannot know what another one has written, and writes all: synchronize the last one's."""

    PACKAGE = "wandb"

    def begin(self, view: View, config: dict[str, Json]) -> tuple[Any, int]:
        run = self._package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=view.id, name=view.name, resume="allow",
            dir=str(view.directory), config=config,
        )  # fmt: skip
        return run, run.step


class Trackio(_Tracker):
    """trackio, by its own variables (TRACKIO_DIR, TRACKIO_SPACE_ID, …). Runs are told apart by their names there, which is why
    the run's id is in it."""

    PACKAGE = "trackio"

    def begin(self, view: View, config: dict[str, Json]) -> tuple[Any, int]:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        run = self._package.init(project=project, name=f"{view.name}-{view.id}", resume="allow", config=config)
        return run, run._next_step  # it has no public name, in 0.43 at least
