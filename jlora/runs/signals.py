"""SIGINT and SIGTERM during a run: at once where nothing is lost by it, else at the next chance to save."""

import signal
import threading
from types import FrameType


class StopSignals:
    """What was asked for by signals, while the block runs. Handlers only live in the main thread; elsewhere nothing is asked.

    Until `defer` is called, a signal raises KeyboardInterrupt where the program is. From then on the first one only sets
    `asked`, and a second one raises.
    """

    def __init__(self):
        self.asked = False
        self._deferred = False
        self._previous = {}

    def defer(self) -> None:
        """From here on a run has something to save."""
        self._deferred = True

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        at_once = self.asked or not self._deferred
        self.asked = True
        if at_once:
            raise KeyboardInterrupt
