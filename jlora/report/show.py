"""Pictures and tables of finished runs and comparisons."""

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jlora._terminal import console as make_console
from jlora._terminal import visible
from jlora.report.comparison import Comparison
from jlora.storage.history import read_history


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Base and adapted samples side by side, with the distances of the next-token distributions."""
    console = console or make_console()
    if comparison.held_out:
        table = Table(title="held-out", title_justify="left", box=None, pad_edge=False, header_style="dim")
        for column in ("", "loss", "perplexity"):
            table.add_column(column)
        for name, e in comparison.held_out.items():
            table.add_row(Text(name), f"{e.loss:.4f}", f"{e.perplexity:.2f}")
        console.print(table)
    for row in comparison.prompts:
        # As `Text`, not strings: the caller's console may read square brackets as markup.
        columns = row.columns(comparison.names)
        prompt, base, *texts = (Text(visible(t.strip())) for t in (row.prompt, row.base, *(t for _, t, *_ in columns)))
        table = Table(title=prompt, title_style="bold", title_justify="left", expand=True, show_lines=False)
        table.add_column("base", ratio=1, style="dim")
        for name, _, kl, l2 in columns:
            table.add_column(Text(f"{visible(name)} (KL {kl:.3f} nats, L2 {l2:.1f})"), ratio=1)
        table.add_row(base, *texts)
        console.print(table)


def plot_history(metrics: str | os.PathLike, output: str | os.PathLike) -> None:
    """Draws a run's metrics.jsonl: training loss by step, evaluation loss over it, learning rate below. PNG or SVG.

    Raises:
        ValueError: when the log holds no step, or a line that is no entry.
    """
    from matplotlib.figure import Figure

    entries = read_history(metrics)
    steps = [e for e in entries if "loss" in e]
    if not steps:
        raise ValueError(f"{os.fspath(metrics)!r} holds no training step.")
    evaluations = [e for e in entries if "eval_loss" in e]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    loss.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="#9db4c0", linewidth=1, label="training")
    if evaluations:
        loss.plot(
            [e["step"] for e in evaluations], [e["eval_loss"] for e in evaluations],
            color="#c2410c", marker="o", markersize=3, label="evaluation",
        )  # fmt: skip
    loss.set_ylabel("loss (nats a token)")
    loss.legend(frameon=False)
    rates = [e for e in steps if "learning_rate" in e]
    rate.plot([e["step"] for e in rates], [e["learning_rate"] for e in rates], color="#5c6b73", linewidth=1)
    rate.set_ylabel("rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=120)
