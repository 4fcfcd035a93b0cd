"""The pictures of the documentation, drawn from what the code computes: docs/pictures/*.svg.

    python tools/pictures.py                 # all of them, in half a minute
    python tools/pictures.py house nf4       # these

Nothing in them is drawn by hand: codes, errors and sizes are those of `jlora.quant`, memory is what `jlora memory` predicts, and
the house is the import graph of the package on the floors of tests/test_floors.py.
"""

import argparse
import ast
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

import jlora
from jlora.quant import SPECS
from jlora.quant.codes import NF4_CODE
from jlora.train import make_optimizer
from jlora.train.memory import abstract_tree, halves, predict

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "docs" / "pictures"
sys.path.append(str(ROOT / "benchmarks"))
import gpu_models  # noqa: E402 (the shapes of Llama 3, without a download)

PAPER, INK, MUTED, RULE = "#fcfbf8", "#1d1c1a", "#5f5b53", "#d9d4c8"
SERIES = ("#0b5c8a", "#b3470b", "#2f6b3a", "#7a4a9c", "#7d6300", "#5a5f66")
STYLE = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES), "font.size": 10, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "jlora",
}  # fmt: skip
"""Text stays text, and the same picture has the same bytes."""

DRAWN: dict[str, Callable[[], Figure]] = {}
"""File name -> what draws it."""


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    DRAWN[draw.__name__.replace("_", "-")] = draw
    return draw


def panels(count: int, height: float = 3.1, **options) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6 if count > 1 else 7.2, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(1, count, **options)))


@functools.cache
def normal_weights(d_in: int = 1024, d_out: int = 1024) -> jax.Array:
    """As linear kernels are distributed, nearly."""
    return jax.random.normal(jax.random.key(0), (d_in, d_out)) * 0.02


def bits(q) -> float:
    return 8 * q.nbytes / q.size


def relative_error(w, q) -> float:
    """Root mean square of the error over that of the weights."""
    return float(jnp.linalg.norm(jlora.dequantize(q, jnp.float32) - w) / jnp.linalg.norm(w))


# ---- quantization ----------------------------------------------------------------------------------------------------


def code_shares(spec) -> np.ndarray:
    """How often each of sixteen codes occurs in normal weights."""
    codes = np.asarray(jlora.quantize(normal_weights(), spec).codes)
    return np.bincount(np.concatenate([codes.ravel() >> 4, codes.ravel() & 15]), minlength=16) / (2 * codes.size)


@picture
def nf4() -> Figure:
    """Sixteen values, close where weights are many; beside sixteen at equal distances."""
    figure, (levels, shares) = panels(2)
    blocks = np.asarray(normal_weights()).reshape(-1, 64)
    scaled = (blocks / np.abs(blocks).max(axis=1, keepdims=True)).ravel()
    levels.hist(scaled, bins=201, density=True, color=RULE)
    for name, code, row in (("NF4", NF4_CODE, 0), ("int4", np.arange(-7, 8) / 7, 1)):
        levels.plot(
            code, np.full(code.size, -0.12 - 0.16 * row), "|", markersize=12, markeredgewidth=1.6, color=SERIES[row]
        )
        levels.text(1.06, -0.12 - 0.16 * row, name, va="center", color=SERIES[row])
        share = code_shares(SPECS[name.lower()]())
        shares.bar(np.arange(16) + 0.4 * row - 0.2, 100 * share, width=0.4, color=SERIES[row], label=name)
    levels.set(title="Weights over the largest of their block, and codes", yticks=[], xlim=(-1.05, 1.25))
    levels.spines["left"].set_visible(False)
    shares.set(title="How often each code is used", xlabel="code", ylabel="% of weights")
    shares.legend()
    return figure


@picture
def block() -> Figure:
    """Sixty-four weights on their way through NF4."""
    figure, (axes,) = panels(1)
    w = normal_weights()[:64, :1]
    q = jlora.quantize(w, jlora.NF4(double_quant=False))
    before, after, absmax = np.ravel(w), np.ravel(jlora.dequantize(q, jnp.float32)), float(np.ravel(q.absmax)[0])
    axes.hlines(NF4_CODE * absmax, -0.5, 63.5, color=RULE, linewidth=0.8)
    axes.vlines(np.arange(64), before, after, color=SERIES[1], linewidth=1.5)
    axes.plot(before, "o", markersize=3.5, color=SERIES[0], label="weight")
    axes.plot(after, "_", markersize=7, markeredgewidth=1.6, color=SERIES[1], label="after NF4")
    error = np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))
    axes.set(
        title=f"One block: absmax {absmax:.4f}, error {100 * error:.1f} % of the weights' size",
        xlabel="element of the block", xlim=(-1, 64),
    )  # fmt: skip
    axes.legend(loc="upper right", ncols=2)
    return figure


@picture
def formats() -> Figure:
    """What each format costs, and what it loses, of normal weights."""
    figure, (axes,) = panels(1, 3.6)
    w = normal_weights()
    packed = {name: jlora.quantize(w, spec()) for name, spec in SPECS.items()}
    names = sorted(packed, key=lambda name: bits(packed[name]))
    for row, name in enumerate(names):
        error = 100 * relative_error(w, packed[name])
        axes.barh(row, error, color=SERIES[name != "nf4"], height=0.6)
        axes.text(error + 0.1, row, f"{error:.2f} %", va="center")
    axes.set_yticks(range(len(names)), [f"{name}, {bits(packed[name]):.3f} bits" for name in names])
    axes.invert_yaxis()
    axes.set(title="Error of normal weights (RMS), by format and bits a parameter", xlabel="% of the weights' size")
    return figure


@picture
def double_quantization() -> Figure:
    """The scales of the blocks are numbers too: quantized again, they nearly vanish."""
    figure, (sizes, scales) = panels(2)
    w = normal_weights()
    once, twice = (jlora.quantize(w, jlora.NF4(double_quant=double)) for double in (False, True))
    for row, (name, q) in enumerate({"absmax as float32": once, "absmax as 8 bits": twice}.items()):
        left = 0.0
        for part, color in ((q.codes, SERIES[0]), *((x, SERIES[1]) for x in jax.tree.leaves(q.scales))):
            width = 8 * part.nbytes / q.size
            sizes.barh(row, width, left=left, color=color, height=0.5)
            left += width
        sizes.text(left + 0.05, row, f"{bits(q):.3f}", va="center")
        sizes.text(0.1, row, name, va="center", color=PAPER)
    sizes.set(title="Bits a parameter", yticks=[], xlim=(0, 5.2))
    sizes.spines["left"].set_visible(False)
    exact, decoded = np.ravel(once.absmax), np.ravel(twice.scales.without_rows().decode(1.0))
    scales.plot(exact, decoded - exact, ".", markersize=1.5, color=SERIES[1], rasterized=True)
    share = np.sqrt(np.mean((decoded - exact) ** 2)) / np.mean(exact)
    scales.set(title=f"What the scales lose: {100 * share:.2f} %", xlabel="absmax of a block", ylabel="error")
    scales.locator_params(nbins=5)
    return figure


# ---- adapters and memory ---------------------------------------------------------------------------------------------


@picture
def factors() -> Figure:
    """A kernel and its update to scale: rank 16 of a 2048 x 2048 kernel."""
    figure, (axes,) = panels(1, 3.2)
    config, side = gpu_models.LORA, gpu_models.SHAPES["1B"]["hidden_size"]
    rank = config.rank
    base = Rectangle((0, 0), side, side, facecolor=RULE, edgecolor=MUTED)
    lora_a = Rectangle((side + 900, 0), rank, side, facecolor=SERIES[1])
    lora_b = Rectangle((side + 900 + 700, side - rank), side, rank, facecolor=SERIES[1])
    for patch in (base, lora_a, lora_b):
        axes.add_patch(patch)
    share = 100 * 2 * rank * side / side**2
    axes.text(side / 2, side / 2, f"W, frozen\n{side} x {side}\n{side**2:,} numbers", ha="center", va="center")
    axes.text(side + 450, side / 2, f"+  {config.alpha / rank:g} x", ha="center", va="center", fontsize=13)
    axes.text(side + 1000, side / 2, f"A\n{side} x {rank}", va="center", color=SERIES[1])
    axes.text(side + 1650, side - 330, f"B, {rank} x {side}", color=SERIES[1])
    axes.text(side + 1650, side / 4, f"{2 * rank * side:,} numbers are trained:\n{share:.2f} % of W", color=INK)
    axes.set(xlim=(-50, 2 * side + 1750), ylim=(-50, side + 50), aspect="equal")
    axes.axis("off")
    return figure


TRAININGS = {
    "every parameter": {"lora": None, "dtype": jnp.float32},
    "LoRA": {},
    "QLoRA": {"quantize": jlora.NF4()},
    "QLoRA, remat dots": {"quantize": jlora.NF4(), "remat": "dots"},
    "QLoRA, remat layer": {"quantize": jlora.NF4(), "remat": "layer"},
}
"""Title -> how it differs from LoRA of rank 16 on all linear layers in bfloat16."""


def predicted(
    shape="1B", *, rows=2, length=1024, lora=gpu_models.LORA, dtype=jnp.bfloat16, quantize=None, remat="none"
):
    """What `jlora memory` says of a step, on a machine that has products of bfloat16 wherever this is drawn."""
    model = gpu_models.model_of(shape, remat=remat)
    params = abstract_tree(model, lora, dtype=dtype, quantize=quantize, stack=True)
    tx = make_optimizer("adamw", gpu_models.LEARNING_RATE, halves(params)[0], max_grad_norm=1.0)
    with mock.patch("jlora._processor._features", lambda: {"avx512_bf16"}):
        return predict(model, params, tx, batch_size=rows, length=length, accumulate=1)


@picture
def memory() -> Figure:
    """What a step at the shape of Llama-3.2-1B holds: 2 rows of 1024 tokens."""
    figure, (axes,) = panels(1, 3.2)
    parts = {
        "weights": "frozen weights", "adapter": "what is trained", "gradients": "gradients", "optimizer": "AdamW's moments",
        "activations": "activations", "working": "working space",
    }  # fmt: skip
    left = np.zeros(len(TRAININGS))
    sizes = [predicted(**changes) for changes in TRAININGS.values()]
    for (part, label), color in zip(parts.items(), SERIES, strict=True):
        width = np.array([getattr(size, part) / 1e9 for size in sizes])
        axes.barh(np.arange(len(sizes)), width, left=left, color=color, label=label, height=0.6)
        left += width
    for row, total in enumerate(left):
        axes.text(total + 0.2, row, f"{total:.1f} GB", va="center")
    axes.axvline(8, color=MUTED, linestyle=":", linewidth=1)
    axes.text(8.1, -0.62, "8 GB", color=MUTED, fontsize=8)
    axes.set_yticks(range(len(TRAININGS)), TRAININGS)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12 * left.max()), xlabel="GB")
    axes.legend(loc="lower right", fontsize=9)
    return figure


# ---- the house -------------------------------------------------------------------------------------------------------


def floors() -> list[set[str]]:
    """Rooms by floor, the lowest first: those that tests/test_floors.py checks."""
    for node in ast.parse((ROOT / "tests" / "test_floors.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_floors.py has no `FLOORS = [...]`: name the rooms by floor there.")


def imported_rooms(room: str) -> set[str]:
    """The other rooms that a room's files import from."""
    found = set()
    place = ROOT / "jlora" / room
    for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "jlora":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jlora."):
                found.add(str(node.module).split(".")[1])
    return found - {room}


def stairs(rooms: set[str]) -> dict[str, set[str]]:
    """Room -> those that it imports from, but for what it reaches through another of them."""
    direct = {room: imported_rooms(room) & rooms for room in rooms}

    def reached(room: str) -> set[str]:
        return direct[room].union(*(reached(other) for other in direct[room]))

    return {room: direct[room].difference(*(reached(other) for other in direct[room])) for room in rooms}


@picture
def house() -> Figure:
    """Rooms on floors, and the stairs between them."""
    storeys = [sorted(room for room in rooms if not room.startswith("_")) for rooms in floors()]
    storeys = [rooms for rooms in storeys if rooms]
    figure = Figure(figsize=(9.6, 0.95 * len(storeys) + 0.4), layout="constrained")
    axes = figure.subplots()
    at: dict[str, tuple[float, float]] = {}
    for level, rooms in enumerate(storeys):
        for i, room in enumerate(rooms):
            at[room] = ((i + 0.5) * 12 / len(rooms) - 6, level)
    for room, below in stairs(set(at)).items():
        for other in sorted(below):
            (x, y), (to_x, to_y) = at[room], at[other]
            start, end = ((x, y - 0.22), (to_x, to_y + 0.22)) if to_y < y else ((x + 0.82, y), (to_x - 0.82, to_y))
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": MUTED, "lw": 0.8})
    for room, (x, y) in at.items():
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.8, y - 0.2), 1.6, 0.4, boxstyle="round,pad=0.02", facecolor="#f4f1ea", edgecolor=MUTED
            )
        )
        axes.text(x, y, room, ha="center", va="center", fontweight="bold")
    for level in range(len(storeys)):
        axes.text(-6.9, level, str(level), ha="center", va="center", color=MUTED)
    axes.set(xlim=(-7.1, 6.2), ylim=(-0.5, len(storeys) - 0.5))
    axes.axis("off")
    return figure


def write(name: str, place: Path = PLACE) -> Path:
    """Draws one picture into a directory."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        DRAWN[name]().savefig(file, metadata={"Date": None, "Creator": None})
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(DRAWN), help=f"of {', '.join(DRAWN)}; default: all")
    for wanted in parser.parse_args().names:
        print(write(wanted).relative_to(ROOT))
