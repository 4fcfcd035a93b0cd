"""Early stopping: a run ends when its evaluation loss has not become better for a while."""

from collections.abc import Iterable, Mapping

from jlora._typing import Json
from jlora.runs.callbacks import Callback, View


class EarlyStopping(Callback):
    """Ends a run after `patience` evaluations in a row that are not better than the best before, by more than `threshold`.

    As transformers' EarlyStoppingCallback counts; the evaluation before the first step is none of them. A function of the log, so
    that a run that was resumed ends where it would have ended.
    """

    def __init__(self, patience: int, *, threshold: float = 0.0):
        self.patience, self.threshold = patience, threshold

    def on_evaluation(self, view: View, entry: Mapping[str, Json]) -> str | None:
        waited = evaluations_without_gain(
            (e["eval_loss"] for e in view.history if e["step"] and "eval_loss" in e), self.threshold
        )
        if waited < self.patience:
            return None
        return f"no better evaluation loss in {waited} evaluation{'s' if waited > 1 else ''}"


def evaluations_without_gain(losses: Iterable[float], threshold: float) -> int:
    """How many evaluations it is since one was better by more than `threshold` than the best before."""
    best, waited = None, 0
    for loss in losses:
        waited = 0 if best is None or best - loss > threshold else waited + 1
        best = loss if best is None else min(best, loss)
    return waited
