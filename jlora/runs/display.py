"""What a run prints: what is trained on what, a progress bar, and what came of it."""

import time
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jlora._typing import Json, PyTree
from jlora.lora import AdaptedWeight, adapted_leaves
from jlora.train import perplexity
from jlora.tree.paths import count, module_path

_PLAIN_LINE_SECONDS = 10.0
"""Without a terminal there is no bar: a line this often."""


def trained_table(params: PyTree) -> Table:
    """What is trained, the layers of each folded into one row."""
    groups: dict[tuple[str, str, str], list[AdaptedWeight]] = {}
    for path, weight in jax.eval_shape(adapted_leaves, params).items():
        module = module_path(path) + (".bias" if path.endswith("/bias") else "")
        name = ".".join(part for part in module.split(".")[-2:] if not part.isdigit())
        rank = "whole" if weight.WHOLE else str(weight.settings.get("rank", ""))
        groups.setdefault((name, rank, " x ".join(map(str, weight.shape))), []).append(weight)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("trained")
    for title in ("kernel", "layers", "rank", "parameters"):
        table.add_column(title, justify="right")
    for (name, rank, shape), weights in groups.items():
        table.add_row(Text(name), shape, str(len(weights)), rank, f"{sum(w.trained_size for w in weights):,}")
    return table


def device_name() -> str:
    """The device that runs, such as "cpu" or "NVIDIA H200"."""
    devices = jax.devices()
    return devices[0].device_kind + (f" ({len(devices)} visible, one used)" if len(devices) > 1 else "")


class Display:
    """Prints to a rich console; `quiet` prints nothing but warnings, which go to the standard error."""

    def __init__(self, *, quiet: bool):
        self.console = Console(quiet=quiet, highlight=False)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def facts(self, rows: Mapping[str, str]) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(value))
        self.console.print(table)

    def trained(self, params: PyTree, adapter: PyTree) -> None:
        self.console.print()
        if adapter is not params:
            self.console.print(trained_table(params))
        trained, total = count(adapter), count(params)
        self.say((f"{trained:,}", "bold"), f" of {total:,} parameters are trained ({trained / total:.2%})\n")

    def start(self, total: int, done: int) -> None:
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total, completed=done, text="compiling")
        self._progress.start()

    def step(self, entry: Mapping[str, Json], total: int) -> None:
        text = (
            f"loss {_finite(entry['loss'], '.3f')}  lr {entry['learning_rate']:.1e}  grad {_finite(entry['grad_norm'], '.2f')}  "
            f"{entry['tokens_per_second']:,.0f} tok/s"
        )
        if entry.get("skipped"):
            text += f"  {entry['skipped']} skipped"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=entry["step"], text=text)
        elif time.monotonic() - self._last_line > _PLAIN_LINE_SECONDS or entry["step"] in (1, total):
            self._last_line = time.monotonic()
            self.say(f"step {entry['step']}/{total}  {text}")

    def evaluated(self, step: int, loss: float) -> None:
        where = "before training" if step == 0 else f"step {step}"
        self.say(
            f"{where}: evaluation loss ", (f"{loss:.4f}", "bold"), ", perplexity ", (f"{perplexity(loss):.2f}", "bold")
        )

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Prints a line of texts and (text, style): as they are, since a path may look like markup."""
        self.console.print(Text.assemble(*parts))

    def warn(self, text: str) -> None:
        """What a user must hear of: something that was damaged, and what is made of it."""
        self._errors.print(Text.assemble(("warning: ", "bold yellow"), text))


def _finite(value: float | None, form: str) -> str:
    """A number of the log, where None stands for one that is not finite."""
    return "inf" if value is None else format(value, form)
