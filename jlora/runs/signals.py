"""SIGINT, SIGTERM and SIGUSR1 during a run, and its time limit: what is to be saved, and when a run is to stop."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType


class TimeLimit:
    """When a run must begin to end, so that it has ended after `seconds`."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._until = clock() + seconds
        self._longest: dict[str, float] = {}

    def note(self, what: str, seconds: float) -> None:
        """That something which may be needed once more before the end ("step", "save") took so long, or may take."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))

    @property
    def is_near(self) -> bool:
        """Whether what was noted, the longest of each, would take longer than is left."""
        return self._clock() + sum(self._longest.values()) >= self._until


class StopSignals:
    """What was asked for by signals, or by a time limit, while the block runs. Handlers only live in the main thread.

    Until `defer` is called, SIGINT and SIGTERM raise KeyboardInterrupt where the program is. From then on the first one only sets
    `asked`, and a second one raises; and from then on the time limit counts. SIGUSR1 asks for a save, and never stops.
    """

    def __init__(self, limit: TimeLimit | None = None):
        self.limit = limit
        self.signalled = False
        self._save = False
        self._deferred = False
        self._previous = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to stop."""
        return self.signalled or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        return self._deferred and self.limit is not None and self.limit.is_near

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def note(self, what: str, seconds: float) -> None:
        """For the time limit, if there is one."""
        if self.limit is not None:
            self.limit.note(what, seconds)

    def defer(self) -> None:
        """From here on a run has something to save."""
        self._deferred = True

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._on_stop, signal.SIGTERM: self._on_stop}
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                handlers[signal.SIGUSR1] = self._on_save
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        at_once = self.signalled or not self._deferred
        self.signalled = True
        if at_once:
            raise KeyboardInterrupt

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
