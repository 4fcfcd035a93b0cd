"""The table of an evaluation: a row for each measure, a column for each model and for how far it is from the first."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jlora.evaluation import Estimate, Metric, Results
from jlora.train import Evaluation

_BETTER = {"higher": 1, "lower": -1, "neither": 0}
_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


def print_evaluation(
    console: Console,
    models: Sequence[str],
    losses: Mapping[str, Evaluation],
    results: Results | None,
    *,
    lines: Sequence[str] = (),
) -> None:
    """
    Args:
        models: their names, in order.
        losses: on the split, by model.
        results: of their answers.
        lines: what is to be said below.
    """
    first, *others = models
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in models:
        table.add_column(Text(name), justify="right")
    for name in others:
        table.add_column(Text(f"{name} - {first}"), justify="right")
    if losses:
        for what, digits in (("loss", 4), ("perplexity", 2)):
            values = {name: getattr(found, what) for name, found in losses.items()}
            apart = (_number(values[name] - values[first], digits, sign=True) for name in others)
            table.add_row(f"{what} ↓", *(_number(value, digits) for value in values.values()), *apart)
    marked = False
    for name, metric in results.metrics.items() if results else ():
        assert results is not None
        estimates = [_cell(results.estimates[model][name], metric) for model in models]
        apart = [results.differences[other, first][name] for other in others]
        marked |= any(map(_is_apart, apart))
        table.add_row(name + _ARROWS[metric.better], *estimates, *(_cell(e, metric, sign=True) for e in apart))
    console.print(table)
    said = [*lines, *(["* The interval of the difference does not hold 0."] if marked else [])]
    for line in said:
        console.print(Text(line, style="dim"))


def _cell(estimate: Estimate, metric: Metric, *, sign: bool = False) -> Text:
    """The value, and the interval below it."""
    apart = sign and _is_apart(estimate)
    text = Text("* " * apart + _number(estimate.value, metric.digits, sign=sign))
    if apart:
        good = estimate.value * _BETTER[metric.better]
        text.stylize("bold green" if good > 0 else "bold red" if good < 0 else "bold")
    low, high = (_number(end, metric.digits - 1, sign=sign) for end in (estimate.low, estimate.high))
    return text.append(f"\n{low}…{high}", style="dim not bold")


def _is_apart(estimate: Estimate) -> bool:
    return estimate.low > 0 or estimate.high < 0


def _number(value: float, digits: int, *, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
