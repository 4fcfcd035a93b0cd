"""`--profile`: a trace of a few steps."""

from collections.abc import Mapping

import jax

from jlora._typing import Json
from jlora.runs.callbacks import Callback, View
from jlora.runs.display import Display

_BEFORE = 2  # steps: the first ones are not like the others


class Profile(Callback):
    """Traces `steps` steps of this process, from the third on, with what lies between them, into OUTPUT/profile."""

    def __init__(self, steps: int, *, display: Display):
        self._steps, self._display = steps, display
        self._seen = 0
        self._traces = False

    def on_step(self, view: View, entry: Mapping[str, Json]) -> None:
        self._seen += 1
        if self._seen == _BEFORE:
            jax.profiler.start_trace(view.directory / "profile", create_perfetto_trace=True)
            self._traces = True
        elif self._seen == _BEFORE + self._steps:
            self.on_end(view)

    def on_end(self, view: View) -> None:
        if not self._traces:
            return
        self._traces = False
        jax.profiler.stop_trace()
        place = view.directory / "profile"
        trace = max(place.rglob("perfetto_trace.json.gz"), default=None)
        self._display.say("profile: ", (str(place), "bold"), " for `xprof --logdir` (pip install xprof)")
        if trace is not None:
            self._display.say("  or at https://ui.perfetto.dev: ", (str(trace), "bold"))
