"""`jlora report`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jlora._terminal import console, say
from jlora.report.run_files import HTML
from jlora.report.run_report import write_report
from jlora.storage.whole import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One page about a run, or about several beside each other: report.html and report.md."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN")]]
    """Directories of `jlora finetune`, finished or not."""
    output: str | None = None
    """Directory for the two files; default: the run's own, and of several the directory that they all are in."""


def run(options: Report) -> None:
    if not options.runs:
        raise ValueError("Give at least one run: jlora report OUTPUT.")
    output = Path(options.output) if options.output is not None else _place(options.runs)
    check_writable(output / HTML, file=True)
    html, markdown = write_report(options.runs, output)
    say(console(), (str(html), "bold"), f" and {markdown.name}")


def _place(runs: Sequence[str]) -> Path:
    if len(runs) == 1:
        return Path(runs[0])
    return Path(os.path.commonpath([Path(run).absolute().parent for run in runs]))
