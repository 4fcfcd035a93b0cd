"""`--log-to tensorboard`: the log as TensorBoard's events."""

import importlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jlora._typing import Json
from jlora.runs.callbacks import Callback, View

NAME = "tensorboard"
_EVENTS = "events.out.tfevents.*"
_CHECKSUM = 4  # bytes, behind the length of a record and behind the record


class TensorBoard(Callback):
    """OUTPUT/tensorboard: a scalar for each number of metrics.jsonl, by its name. On resuming the events are written anew from the
    log, with the times that they had: no step stands twice, nor one that the log does not have."""

    def __init__(self):
        self._package = required("tensorboardX", "tensorboard")
        self._writer: Any = None

    def on_start(self, view: View) -> None:
        directory = view.directory / NAME
        times = {step: time for step, time, _ in read_events(directory)}
        for old in directory.glob(_EVENTS):
            old.unlink()
        self._writer = self._package.SummaryWriter(str(directory), flush_secs=10)
        for entry in view.history:
            self._add(entry, times.get(entry["step"]))
        self._writer.flush()

    def on_log(self, view: View, entry: Mapping[str, Json]) -> None:
        self._add(entry, None)

    def on_end(self, view: View) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, entry: Mapping[str, Json], time: float | None) -> None:
        for name, value in entry.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, entry["step"], walltime=time)


def required(package: str, extra: str) -> ModuleType:
    """The package.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`--log-to {extra}` needs the package {error.name}: pip install 'jlora[{extra}]', or leave {extra} out."
        ) from error


def read_events(directory: Path) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, seconds since 1970, name -> value) of the scalars in the event files, up to where one was cut off."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf)

    for file in sorted(directory.glob(_EVENTS)):
        content, at = file.read_bytes(), 0
        while len(content) >= at + 8 + _CHECKSUM:
            start = at + 8 + _CHECKSUM
            end = start + struct.unpack_from("<Q", content, at)[0]
            if len(content) < end + _CHECKSUM:
                break
            event = Event.FromString(content[start:end])
            if event.summary.value:
                yield event.step, event.wall_time, {value.tag: value.simple_value for value in event.summary.value}
            at = end + _CHECKSUM
