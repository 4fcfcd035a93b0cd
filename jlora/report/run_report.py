"""`report.html` and `report.md`: what a run, or several, came to, from the files that they left."""

import dataclasses
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jlora._typing import Json
from jlora.report.markdown import cell, code, one_line, table
from jlora.report.norms import Update
from jlora.report.record import in_words, loss_said, perplexity_said
from jlora.report.run_files import HTML, MARKDOWN, RunFiles
from jlora.storage.fields import is_number
from jlora.storage.whole import size_said, whole_files, write_text

_METRICS = (
    ("loss", "Training loss", "nats a token", False),
    ("eval_loss", "Evaluation loss", "nats a token", False),
    ("learning_rate", "Learning rate", "", True),
    ("grad_norm", "Gradient norm", "before clipping", True),
    ("tokens_per_second", "Speed", "tokens a second, padding left out", True),
)
"""Field of metrics.jsonl, its name, its unit, and whether its axis begins at zero."""


class Fact(NamedTuple):
    name: str
    value: str
    more: str = ""


class Sampled(NamedTuple):
    prompt: str
    texts: Sequence[tuple[int, str]]
    """(step, what the model wrote)."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """One run, as both files tell it."""

    run: RunFiles
    key: str
    """Its own among those of the page, for anchors."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def status(self) -> str:
        run = self.run
        if run.unfinished is not None:
            return "not finished"
        why = f": {run.ended_by}" if run.ended_by else ""
        of = f" of {run.planned:,}" if run.planned and run.planned != run.steps else ""
        return f"finished after {run.steps:,}{of} steps{why}"

    @property
    def readings(self) -> list[Fact]:
        """What one looks at first."""
        found, before, chosen = [], self.run.record.before, self.run.record.chosen
        if chosen is not None:
            for name, said in (("Evaluation loss", loss_said), ("Perplexity", perplexity_said)):
                found.append(Fact(name, said(chosen[1]), "" if before is None else f"{said(before)} before"))
        if losses := self.run.record.losses:
            found.append(
                Fact("Training loss", loss_said(losses[-1][1]), f"{loss_said(losses[0][1])} at step {losses[0][0]}")
            )
        found += [self.trained_share, self.speed, self.memory, self.time]
        return [fact for fact in found if fact.value != _UNKNOWN]

    @property
    def trained_share(self) -> Fact:
        trained, total = (self.run.number("figures", "model", name) for name in ("trained", "parameters"))
        if not trained or not total:
            return Fact("Trained", _UNKNOWN)
        return Fact("Trained", f"{trained / total:.2%}", f"{trained:,} of {total:,} parameters")

    @property
    def speed(self) -> Fact:
        speeds = [e["tokens_per_second"] for e in self.run.record.history if "tokens_per_second" in e]
        if not speeds:
            return Fact("Speed", _UNKNOWN)
        return Fact("Speed", f"{statistics.median(speeds):,.1f}", "tokens a second, the median of the steps")

    @property
    def memory(self) -> Fact:
        """Of a step, at its peak."""
        compiled, predicted = (self.run.number("memory", name) for name in ("compiled", "predicted"))
        measured = self.run.number("measured_memory")
        if predicted is None or compiled is None:
            return Fact("Memory of a step", _UNKNOWN)
        said = f"{size_said(int(predicted))} predicted"
        if measured is None:
            return Fact("Memory of a step", size_said(int(compiled)), f"planned by the compiler; {said}")
        return Fact(
            "Memory of a step", size_said(int(measured)), f"measured; {said}, {size_said(int(compiled))} planned"
        )

    @property
    def time(self) -> Fact:
        seconds = self.run.number("seconds")
        return Fact("Time", _UNKNOWN if seconds is None else _duration(seconds))

    @property
    def sections(self) -> list[tuple[str, list[Fact]]]:
        """(title, facts) of what it was made from."""
        return [
            (title, [fact for fact in facts if fact.value])
            for title, facts in (
                ("Model", [*self._model()]),
                ("Data", [*self._data()]),
                (
                    "Adapter and training",
                    [Fact(name, in_words(value)) for name, value in self.run.record.hyperparameters],
                ),
                ("Memory and time", [*self._cost()]),
            )
        ]

    def _model(self) -> Iterator[Fact]:
        config, figure = self.run.record.config, self.run.figure
        yield Fact("base model", in_words(config.get("model") or _UNKNOWN))
        yield Fact("family", in_words(figure("figures", "model", "type") or _UNKNOWN))
        yield Fact("layers", _count(figure("figures", "model", "layers")))
        yield Fact("parameters", _count(figure("figures", "model", "parameters")))
        yield Fact("stored as", in_words(figure("figures", "model", "stored") or _UNKNOWN))
        size = self.run.number("figures", "model", "bytes")
        yield Fact("size in memory", _UNKNOWN if size is None else size_said(int(size)))
        yield Fact("quantization", in_words(config.get("quantize") or "none") if config else _UNKNOWN)
        yield self.trained_share._replace(name="trained share")
        yield Fact("device", in_words(figure("figures", "device") or _UNKNOWN))

    def _data(self) -> Iterator[Fact]:
        config, figure = self.run.record.config, self.run.figure
        yield Fact("data", in_words(config.get("data") or _UNKNOWN))
        yield Fact("evaluation data", in_words(config.get("eval_data") or ""))
        yield Fact("template", in_words(figure("figures", "data", "template") or config.get("template") or _UNKNOWN))
        for name in (
            "records",
            "tokens",
            "supervised_tokens",
            "truncated",
            "dropped",
            "evaluation_tokens",
            "max_length",
        ):
            yield Fact(name.replace("_", " "), _count(figure("figures", "data", name)))
        efficiency = self.run.number("figures", "data", "efficiency")
        efficiency = self.run.number("origin", "layout", "efficiency") if efficiency is None else efficiency
        said = _UNKNOWN if efficiency is None else f"{efficiency:.1%}"
        yield Fact("padding efficiency", said, "of the positions of a batch hold a token" if efficiency else "")

    def _cost(self) -> Iterator[Fact]:
        for name, value in (
            ("predicted", self.run.number("memory", "predicted")),
            ("planned by the compiler", self.run.number("memory", "compiled")),
            ("measured", self.run.number("measured_memory")),
        ):
            missing = "not counted on this device" if name == "measured" and self.run.figure("memory") else _UNKNOWN
            yield Fact(f"memory of a step, {name}", missing if value is None else size_said(int(value)))
        yield self.time._replace(name="time", more="of all its processes, from the start to the adapter")
        yield self.speed._replace(name="speed")
        versions = self.run.figure("versions")
        if isinstance(versions, dict):
            yield Fact("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))

    @property
    def losses(self) -> list[tuple[str, str, str, str]]:
        """(what, step, loss, perplexity)."""
        return list(self.run.record.loss_table)

    @property
    def evaluations(self) -> list[tuple[str, str, str]]:
        """(step, loss, perplexity) of every evaluation."""
        return [(str(step), loss_said(loss), perplexity_said(loss)) for step, loss in self.run.record.evaluations]

    @property
    def samples(self) -> list[Sampled]:
        texts: dict[str, dict[int, str]] = {}
        for sample in self.run.samples:
            texts.setdefault(sample["prompt"], {})[sample["step"]] = sample["text"]
        return [Sampled(prompt, sorted(by_step.items())) for prompt, by_step in texts.items()]

    @property
    def files(self) -> list[tuple[str, str]]:
        return [(name, size_said(size)) for name, size in self.run.files]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Every field of config.yaml."""
        return [(name, in_words(value)) for name, value in self.run.record.config.items()]

    @cached_property
    def learned(self) -> "Learned | None":
        return Learned(self.run.updates) if self.run.updates else None

    @property
    def is_dora(self) -> bool:
        return bool(self.run.record.config.get("use_dora"))


@dataclasses.dataclass(frozen=True)
class Learned:
    """Norms of the updates, a row a layer and a column a module."""

    updates: Sequence[Update]

    @property
    def modules(self) -> list[str]:
        return sorted({update.kind for update in self.updates})

    @property
    def between(self) -> tuple[str, str]:
        """The least and the largest, which the heat is between."""
        return _norm(self._least), _norm(self._most)

    @property
    def _least(self) -> float:
        return min(update.norm for update in self.updates)

    @property
    def _most(self) -> float:
        return max(update.norm for update in self.updates)

    @property
    def rows(self) -> list[tuple[str, list[tuple[str, int] | None], str]]:
        """(layer, (norm, heat) of each module or None where it is not adapted, the norm of the whole layer)."""
        room = (self._most - self._least) or 1.0
        found = []
        for layer in sorted({update.layer for update in self.updates}, key=lambda n: (n is None, n or 0)):
            norms = {update.kind: update.norm for update in self.updates if update.layer == layer}
            cells = [
                (_norm(norms[module]), heat((norms[module] - self._least) / room)) if module in norms else None
                for module in self.modules
            ]
            found.append(("no layer" if layer is None else str(layer), cells, _norm(math.hypot(*norms.values()))))
        return found

    @property
    def totals(self) -> list[str]:
        """Of each module over all layers, and of everything."""
        by_module = [[update.norm for update in self.updates if update.kind == module] for module in self.modules]
        return [_norm(math.hypot(*norms)) for norms in (*by_module, [update.norm for update in self.updates])]

    @property
    def most(self) -> str:
        """The largest, in words."""
        largest = max(self.updates, key=lambda update: update.norm)
        return f"{largest.module}, {_norm(largest.norm)}"


def heat(share: float) -> int:
    """One of the ten grounds of the style, for a share of the way from the least to the most.

    >>> [heat(share) for share in (0.0, 0.09, 0.5, 0.99, 1.0)]
    [0, 0, 5, 9, 9]
    """
    return min(9, int(10 * share))


_UNKNOWN = "not recorded"


def report_on(runs: Sequence[str | os.PathLike]) -> list[RunReport]:
    """
    Raises:
        FileNotFoundError: for what is no run.
    """
    return [RunReport(RunFiles.look(run), key=f"run-{number}") for number, run in enumerate(runs, start=1)]


def write_report(runs: Sequence[str | os.PathLike], directory: str | os.PathLike) -> tuple[Path, Path]:
    """Writes `report.html` and `report.md` of one run or of several into a directory, in place of those that are there.

    Raises:
        FileNotFoundError: for what is no run.
    """
    reports = report_on(runs)
    with whole_files(Path(directory), last=HTML, replace=True) as partial:
        write_text(partial / MARKDOWN, to_markdown(reports))
        write_text(partial / HTML, to_html(reports))
    return Path(directory) / HTML, Path(directory) / MARKDOWN


# Several runs beside each other


def names_of(reports: Sequence[RunReport]) -> list[str]:
    """Of the runs, each its own: their directories where two have one name."""
    names = [report.name for report in reports]
    return [str(r.run.directory) if names.count(name) > 1 else name for r, name in zip(reports, names, strict=True)]


def comparison(reports: Sequence[RunReport]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table of several runs: the settings in which they differ, and their results."""
    settings = [_settings(report) for report in reports]
    names = dict.fromkeys(name for fields in settings for name in fields)
    differing = [name for name in names if len({fields.get(name) for fields in settings}) > 1]
    results = [_results(report) for report in reports]
    rows = [
        [name, *(fields.get(field, "") for field in differing), *result.values()]
        for name, fields, result in zip(names_of(reports), settings, results, strict=True)
    ]
    return ["run", *differing, *results[0]], rows


def _settings(report: RunReport) -> dict[str, str]:
    config = report.run.record.config
    fields = {name: config.get(name) for name in ("model", "data")} | dict(report.run.record.hyperparameters)
    return {name: in_words(value) for name, value in fields.items() if value is not None and name != "steps"}


def _results(report: RunReport) -> dict[str, str]:
    record = report.run.record
    chosen = None if record.chosen is None else record.chosen[1]
    return {
        "steps": f"{report.run.steps:,}" + " (not finished)" * (report.run.unfinished is not None),
        "training loss": loss_said(record.losses[-1][1] if record.losses else None),
        "evaluation loss": loss_said(chosen),
        "perplexity": perplexity_said(chosen),
        "before": perplexity_said(record.before),
        "trained": report.trained_share.value,
        "tokens/s": report.speed.value,
        "memory of a step": report.memory.value,
        "time": report.time.value,
    }


# The two files


def to_html(reports: Sequence[RunReport]) -> str:
    from jlora.report.page import CHART, HERE, page

    several = len(reports) > 1
    return page(
        HERE / "run.html",
        scripts=[CHART],
        reports=reports,
        title=f"{len(reports)} runs" if several else reports[0].name,
        comparison=comparison(reports) if several else None,
        overlaid=_charts(reports, "all") if several else [],
        charts={report.key: _charts([report], report.key) for report in reports},
    )


def _charts(reports: Sequence[RunReport], key: str) -> list:
    """Of each metric that there is; of one run both losses are in one, of several each has a line of its own."""
    from jlora.report.page.chart import Chart, Series

    def lines(field: str, named: Iterable[tuple[RunReport, str]]) -> list[Series]:
        found = []
        for report, name in named:
            points = [(e["step"], e[field]) for e in report.run.record.history if field in e]
            if any(y is not None for _, y in points):
                found.append(Series(name, points, marked=field == "eval_loss"))
        return found

    charts = []
    if len(reports) == 1:
        both = [*lines("loss", [(reports[0], "training")]), *lines("eval_loss", [(reports[0], "evaluation")])]
        charts += [Chart(f"{key}-loss", "Loss", "nats a token", both)] if both else []
    for field, title, unit, from_zero in _METRICS[2 if len(reports) == 1 else 0 :]:
        named = zip(reports, names_of(reports) if len(reports) > 1 else [title], strict=True)
        if found := lines(field, named):
            charts.append(Chart(f"{key}-{field.replace('_', '-')}", title, unit, found, from_zero=from_zero))
    return charts


def to_markdown(reports: Sequence[RunReport]) -> str:
    lines = []
    if len(reports) > 1:
        header, rows = comparison(reports)
        lines += [f"# {len(reports)} runs", "", *table(header, [[cell(value) for value in row] for row in rows])]
    for report in reports:
        lines += _markdown(report, "#" if len(reports) == 1 else "##")
    return "\n".join(lines).rstrip() + "\n"


def _markdown(report: RunReport, level: str) -> Iterator[str]:
    yield from (f"{level} {one_line(report.name)}", "", f"{_sentence(one_line(report.status))}", "")
    if report.run.wrong:
        yield from ("What is missing or damaged:", "", *(f"- {one_line(said)}" for said in report.run.wrong), "")
    if report.readings:
        yield from table(("", "", ""), [[cell(part) for part in fact] for fact in report.readings])
    if report.losses:
        yield from (
            f"{level}# Losses",
            "",
            *table(("loss (nats a token)", "step", "loss", "perplexity"), report.losses),
        )
    if len(report.evaluations) > 2:
        yield from table(("evaluation at step", "loss", "perplexity"), report.evaluations)
    if report.learned is not None:
        learned = report.learned
        yield from (f"{level}# Where it learned", "", f"{_NORMS} The largest: {code(learned.most)}.", "")
        header = ("layer", *map(code, learned.modules), "all")
        rows = [(name, *("" if c is None else c[0] for c in cells), whole) for name, cells, whole in learned.rows]
        yield from table(header, [*rows, ("all", *learned.totals)])
    for sampled in report.samples:
        yield from (f"{level}# Sample: {one_line(sampled.prompt)}", "")
        yield from table(("step", "text"), [(str(step), cell(text)) for step, text in sampled.texts])
    for title, facts in report.sections:
        yield from (f"{level}# {title}", "")
        yield from table(("", ""), [(cell(f.name), cell(f"{f.value} {f.more}".strip())) for f in facts])
    yield from (f"{level}# Files", "", *table(("file", "size"), [(code(name), size) for name, size in report.files]))


_NORMS = "Frobenius norms of each update, scaling * A @ B, computed from its factors."


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _norm(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def _count(value: Json) -> str:
    return f"{value:,}" if is_number(value) else ""


def _duration(seconds: float) -> str:
    """
    >>> _duration(45.2), _duration(200), _duration(7384)
    ('45 s', '3 min 20 s', '2 h 3 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
