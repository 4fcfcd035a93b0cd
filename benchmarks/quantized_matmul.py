"""How fast each quantized matrix product is, and how far from the limit of the machine.

    python benchmarks/quantized_matmul.py --output benchmarks/results/quantized_matmul_cpu.json          # short, minutes
    python benchmarks/quantized_matmul.py --full --output …                                             # all shapes and rows

x [rows, in] times the kernels of GPT-2, Llama 3 and Qwen2.5, dense and packed, by every implementation, forward and
forward with the gradient of x. The implementations of a case are called in turns. The roofline is measured in the same
run: the rate of copying a large array, and of a large matrix product. The share of it is the time that the larger of the
two would take (bytes stored, read once, and x and y moved once; 2 operations a weight and row) over the time taken.
bitsandbytes and qwix have columns where they are installed.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench import KERNELS, alternate, machine, median, pin, roofline, write
from rich.console import Console
from rich.table import Table

import jlora
from jlora.quant.matmul import IMPLEMENTATIONS, implementation, quantized_matmul
from jlora.weight import dense_matmul

ROWS = (1, 4, 16, 128, 512, 2048, 8192)
SHORT = {"kernels": (("GPT-2", "c_fc"), ("Llama-3.2-1B", "up_proj")), "rows": (1, 16, 512)}
PASSES = ("forward", "forward+backward")
DENSE = "dense bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Microbenchmark of quantized matrix products."""

    full: bool = False
    """Every kernel and number of rows; otherwise two kernels and three."""
    seconds: float = 0.5
    """Time for each implementation of each case."""
    threads: int = 0
    """Cores to pin to; 0: all."""
    output: Path | None = None
    """JSON file for everything measured; the plot goes beside it as .png."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation: `product(x, weight)` gives y, in bfloat16 unless its name says otherwise."""

    weight: Any
    """An argument, never closed over: XLA would unpack a constant when it compiles."""
    product: Callable[[Any, Any], Any]
    dtype: Any = jnp.bfloat16

    @property
    def stored_bytes(self) -> int:
        # Of qwix's 4-bit dtype an element is half a byte, whatever its `itemsize` says.
        bits = (
            x.size * (4 if x.dtype.name in ("int4", "uint4") else 8 * x.dtype.itemsize)
            for x in jax.tree.leaves(self.weight)
        )
        return sum(bits) // 8


def candidates(w: jax.Array, rows: int) -> dict[str, Candidate]:
    """jlora's: dense, and each format by each implementation; "*" marks the one that `linear` chooses."""
    found = {}
    for dtype, name in ((jnp.bfloat16, DENSE), (jnp.float32, "dense f32")):
        dense = w.astype(dtype)
        found[name] = Candidate(dense, lambda x, w: dense_matmul(x, w, transpose=False, out_dtype=x.dtype), dtype)
    specs = {"NF4-DQ": jlora.NF4(), "NF4": jlora.NF4(double_quant=False)}
    specs |= {name: spec() for name, spec in jlora.quant.SPECS.items() if name != "nf4"}
    chosen = implementation(rows, jax.default_backend())
    for label, spec in specs.items():
        q = jlora.quantize(w.astype(jnp.bfloat16), spec)
        for name in IMPLEMENTATIONS:
            if name == "reduce" and rows > 16:
                continue  # meant for a few rows: its work grows with rows times kernel
            product = lambda x, q, name=name: quantized_matmul(name, False, x.dtype, x.dtype, x, q)  # noqa: E731
            found[f"{label} {name}{'*' if name == chosen else ''}"] = Candidate(q, product)
    if importlib.util.find_spec("qwix") is not None:
        found["qwix nf4"] = qwix_candidate(w)
    return found


def qwix_candidate(w: jax.Array) -> Candidate:
    import qwix

    packed = qwix.quantize(w.astype(jnp.bfloat16), "nf4", channelwise_axes=(1,), tiled_axes={0: 64})
    dims = (((1,), (0,)), ((), ()))
    return Candidate(packed, lambda x, w: qwix.dot_general(x, w, dims))


def jax_call(candidate: Candidate, x: jax.Array, direction: str) -> Callable[[], Any]:
    x = x.astype(candidate.dtype)

    def both(x, weight):
        y, pull = jax.vjp(lambda x: candidate.product(x, weight), x)
        return y, pull(jnp.ones_like(y))

    run = jax.jit(candidate.product if direction == "forward" else both)
    return lambda: jax.block_until_ready(run(x, candidate.weight))


def bitsandbytes_call(w: np.ndarray, x: np.ndarray, direction: str, threads: int) -> Callable[[], Any]:
    """`bnb.matmul_4bit` with double quantization, in bfloat16."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    weight = torch.from_numpy(np.ascontiguousarray(w.T)).to(torch.bfloat16).to(device)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    rows = torch.from_numpy(x).to(torch.bfloat16).to(device)

    def run():
        if direction == "forward":
            with torch.no_grad():
                out = bitsandbytes.matmul_4bit(rows, packed.t(), quant_state=state)
        else:
            leaf = rows.detach().requires_grad_()
            out = bitsandbytes.matmul_4bit(leaf, packed.t(), quant_state=state)
            out.backward(torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return run


def measure(
    label: str, shape: tuple[int, int], rows: int, direction: str, args: Args, limit, threads: int
) -> list[dict]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0]))
    x = rng.standard_normal((rows, shape[0]), dtype=np.float32)
    found = candidates(jnp.asarray(w), rows)
    calls = {name: jax_call(candidate, jnp.asarray(x), direction) for name, candidate in found.items()}
    stored = {name: candidate.stored_bytes for name, candidate in found.items()}
    if importlib.util.find_spec("bitsandbytes") is not None:
        name = "bitsandbytes NF4-DQ"
        calls[name] = bitsandbytes_call(w, x, direction, threads)
        stored[name] = stored[next(n for n in stored if n.startswith("NF4-DQ"))]
    times = alternate(calls, seconds=args.seconds, least=3)
    twice = 1 if direction == "forward" else 2
    results = []
    for name, seconds in times.items():
        taken = median(seconds)
        moved = twice * (stored[name] + (rows * sum(shape)) * (4 if name == "dense f32" else 2))
        operations = twice * 2 * rows * shape[0] * shape[1]
        ideal = max(moved / limit["bytes_per_s"], operations / limit["flop_per_s"])
        results.append(
            {
                "kernel": label, "shape": list(shape), "rows": rows, "pass": direction, "implementation": name,
                "ms": 1e3 * taken, "GB_per_s": moved / taken / 1e9, "TFLOP_per_s": operations / taken / 1e12,
                "roofline_share": ideal / taken, "speed_of_dense_bf16": median(times[DENSE]) / taken,
            }
        )  # fmt: skip
    return results


def table(results: list[dict], limit: dict[str, float]) -> Table:
    title = (
        f"limit measured in this run: {limit['bytes_per_s'] / 1e9:.0f} GB/s, {limit['flop_per_s'] / 1e12:.2f} TFLOP/s"
    )
    out = Table("kernel", "rows", "pass", "implementation", title=title)
    for column in ("ms", "GB/s", "TFLOP/s", "of the limit", "x dense bf16"):
        out.add_column(column, justify="right")
    for last, r in zip([*results[1:], None], results, strict=True):
        cells = (
            f"{r['ms']:.3f}", f"{r['GB_per_s']:.1f}", f"{r['TFLOP_per_s']:.3f}", f"{r['roofline_share']:.0%}",
            f"{r['speed_of_dense_bf16']:.2f}",
        )  # fmt: skip
        case = lambda r: (r["kernel"], r["rows"], r["pass"])  # noqa: E731
        out.add_row(
            f"{r['kernel']} {r['shape'][0]}x{r['shape'][1]}", str(r["rows"]), r["pass"], r["implementation"], *cells,
            end_section=last is None or case(last) != case(r),
        )  # fmt: skip
    return out


def plot(results: list[dict], path: Path, device: str) -> None:
    """Speed relative to the dense bfloat16 product by rows, a panel for each kernel and pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kernels = list(dict.fromkeys(r["kernel"] for r in results))
    names = [n for n in dict.fromkeys(r["implementation"].rstrip("*") for r in results) if n != DENSE]
    figure, axes = plt.subplots(
        len(kernels),
        len(PASSES),
        figsize=(10, 1 + 2.6 * len(kernels)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for row, kernel in enumerate(kernels):
        for column, direction in enumerate(PASSES):
            axis = axes[row][column]
            for i, name in enumerate(names):
                chosen = [
                    (r["rows"], r["speed_of_dense_bf16"])
                    for r in results
                    if (r["kernel"], r["pass"], r["implementation"].rstrip("*")) == (kernel, direction, name)
                ]
                axis.plot(*zip(*sorted(chosen), strict=True), marker="o", markersize=3, color=f"C{i}", label=name)
            axis.axhline(1, color="0.6", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_title(f"{kernel}, {direction}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            if row == len(kernels) - 1:
                axis.set_xlabel("rows of x")
            if column == 0:
                axis.set_ylabel("speed of dense bf16")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.suptitle(f"Quantized matrix products on {device}", fontsize=11)
    figure.savefig(path, dpi=130)


def main(args: Args) -> None:
    console = Console(width=150)
    threads = pin(args.threads)
    every = [(model, name) for model, kernels in KERNELS.items() for name in kernels]
    rows = ROWS if args.full else SHORT["rows"]
    limit = roofline()
    results: list[dict] = []
    for model, name in every if args.full else SHORT["kernels"]:
        for count in rows:
            for direction in PASSES:
                case = f"{model} {name}", KERNELS[model][name]
                results += measure(*case, count, direction, args, limit, threads)
    console.print(table(results, limit))
    device = jax.devices()[0].device_kind
    write(args.output, {"machine": machine(threads), "device": device, "roofline": limit, "results": results})
    if args.output is not None:
        plot(results, args.output.with_suffix(".png"), device)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
