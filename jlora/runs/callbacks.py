"""What watches a run from within it: writes of it elsewhere, or ends it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jlora._typing import Json, JsonObject, Params, PretrainedTokenizer
from jlora.lora import combine
from jlora.models import Model
from jlora.runs.config import FinetuneConfig
from jlora.runs.endings import CallbackFailed
from jlora.train import TrainState, evaluated
from jlora.train.memory import is_out_of_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A run as a callback sees it, during the call: the next step takes the memory of its state."""

    config: FinetuneConfig
    directory: Path
    """OUTPUT."""
    id: str
    """Of this run and no other; the same after --resume."""
    step: int
    """Steps done."""
    steps: int
    """Of the whole run, if nothing ends it before."""
    history: Sequence[JsonObject]
    """The log up to this step, whose own entry is the last. To read, not to change."""
    model: Model
    tokenizer: PretrainedTokenizer
    template: str | None
    """How records became text; None: they were raw text."""
    state: TrainState
    base: Params | None
    """None: all is trained."""

    @property
    def name(self) -> str:
        return self.config.run_name or self.directory.absolute().name

    @property
    def adapter(self) -> Params:
        """As it is evaluated and saved."""
        return evaluated(self.state)

    @property
    def params(self) -> Params:
        """The base with the adapter on it."""
        return combine(self.adapter, self.base)


class Callback:
    """Methods that a run calls; each does nothing until it is overridden.

    `on_step` and `on_evaluation` may ask the run to end after this step, by returning True or a reason in words; it then ends as
    a run of all its steps does, with its adapter written. A rule that is a function of `view.history` decides the same after
    --resume. An error in a callback saves the state and ends the run with the callback's name.

    Example:
        class Enough(jlora.Callback):
            def on_evaluation(self, view, entry):
                return entry["eval_loss"] < 1.5

        jlora.finetune(config, callbacks=[Enough()])
    """

    def on_start(self, view: View) -> None:
        """Before the first step; on resuming, with the log up to the state that is gone on from."""

    def on_step(self, view: View, entry: Mapping[str, Json]) -> bool | str | None:
        """After a step, before its evaluation."""

    def on_evaluation(self, view: View, entry: Mapping[str, Json]) -> bool | str | None:
        """After an evaluation (that before the first step is step 0), with `eval_loss` and `perplexity` in the entry."""

    def on_log(self, view: View, entry: Mapping[str, Json]) -> None:
        """When the entry of a step stands in metrics.jsonl."""

    def on_end(self, view: View) -> None:
        """Once, however the run ends."""


class Callbacks:
    """Several of them, called in their order."""

    def __init__(self, callbacks: Sequence[Callback]):
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    f"`callbacks` takes objects of classes derived from jlora.Callback; got {callback!r}. Derive a class, and "
                    "pass an object of it."
                )
        self._callbacks = tuple(callbacks)
        self._started: list[Callback] = []

    def start(self, view: View) -> None:
        for callback in self._callbacks:
            self._started.append(callback)
            callback.on_start(view)

    def step(self, view: View, entry: Mapping[str, Json]) -> str | None:
        """Why the run is to end after this step; None: nobody asks for it."""
        return self._asked("on_step", view, entry)

    def evaluation(self, view: View, entry: Mapping[str, Json]) -> str | None:
        """As `step`."""
        return self._asked("on_evaluation", view, entry)

    def log(self, view: View, entry: Mapping[str, Json]) -> None:
        self._asked("on_log", view, entry)

    def end(self, view: View) -> None:
        """Of those that were started; each, whatever becomes of the others."""
        failed: list[Exception] = []
        while self._started:
            callback = self._started.pop()
            try:
                callback.on_end(view)
            except Exception as error:
                failed.append(_failed(callback, "on_end", view, error))
        if failed:
            raise failed[0]

    def _asked(self, name: str, view: View, entry: Mapping[str, Json]) -> str | None:
        reasons: list[str] = []
        for callback in self._callbacks:
            try:
                answer = getattr(callback, name)(view, entry)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise _failed(callback, name, view, error) from error
            if answer:
                who = type(callback).__name__
                reasons.append(f"{who}: {answer}" if isinstance(answer, str) else f"{who} asked for it")
        return "; ".join(reasons) or None


def _failed(callback: Callback, method: str, view: View, error: Exception) -> CallbackFailed:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    failed = CallbackFailed(f"The callback {type(callback).__name__} failed in {method} of step {view.step} ({text})")
    failed.__cause__ = error
    return failed
