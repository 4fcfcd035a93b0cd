"""`metrics.csv`: the log as a table."""

import csv
import io
from collections.abc import Mapping, Sequence

from jlora._typing import Json
from jlora.runs.callbacks import Callback, View
from jlora.storage.whole import full_disk_said, whole_file

NAME = "metrics.csv"
_FIRST = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_loss", "perplexity")
"""The columns, in this order; others follow."""


class MetricsTable(Callback):
    """OUTPUT/metrics.csv: metrics.jsonl again, by the same names; what JSON has as null, and what a step has not, is empty."""

    def __init__(self):
        self._columns: tuple[str, ...] = ()

    def on_start(self, view: View) -> None:
        self._write(view)

    def on_log(self, view: View, entry: Mapping[str, Json]) -> None:
        if not set(entry) <= set(self._columns):
            self._write(view)
            return
        path = view.directory / NAME
        with full_disk_said(path), path.open("a", encoding="utf-8") as file:
            file.write(_lines([entry], self._columns))

    def _write(self, view: View) -> None:
        """The whole table, of the whole log."""
        names = dict.fromkeys(name for entry in view.history for name in entry)
        self._columns = (*_FIRST, *(name for name in names if name not in _FIRST))
        with whole_file(view.directory / NAME) as partial:
            partial.write_text(",".join(self._columns) + "\n" + _lines(view.history, self._columns), encoding="utf-8")


def _lines(entries: Sequence[Mapping[str, Json]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(entries)
    return text.getvalue()
