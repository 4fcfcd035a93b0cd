"""Throughput of quantizing and dequantizing, against bitsandbytes where it has the format, in one process.

    python benchmarks/quantize.py --output benchmarks/results/quantize_cpu.json        # three weights
    python benchmarks/quantize.py --full --output …                                    # every kernel of five models

Elements a second of a weight [out, in] as PyTorch stores it, and the share of the copying rate measured in the same run
(bytes read and written, each once). The sides are called in turns and the ratio is taken within each turn. Both must pack
the same NF4 bytes, which is checked first.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench import KERNELS, alternate, machine, median, pin, quartiles, ratio, roofline, write
from rich.console import Console
from rich.table import Table

import jlora
from jlora.quant import quantize_rows

SHORT = (("GPT-2", "c_fc"), ("Llama-3.2-1B", "down_proj"), ("Llama-3.1-8B", "q_proj"))
SPECS = {"NF4-DQ": jlora.NF4(), "NF4": jlora.NF4(double_quant=False)} | {
    name: spec() for name, spec in jlora.quant.SPECS.items() if name != "nf4"
}
OPERATIONS = ("quantize", "dequantize")
PEER_FORMATS = {"NF4-DQ": True, "NF4": False}
"""Format -> bitsandbytes' `compress_statistics`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compare quantize and dequantize with bitsandbytes'."""

    full: bool = False
    """Every kernel; otherwise three."""
    seconds: float = 2.0
    """Time for each operation of each side."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weight, and of the result of dequantizing."""
    threads: int = 0
    """Cores to pin both sides to; 0: all."""
    output: Path | None = None
    """JSON file for everything measured; the plot goes beside it as .png."""


def jlora_calls(w: np.ndarray, args: Args) -> tuple[dict[tuple[str, str], Callable[[], Any]], dict[str, int]]:
    """(operation, format) -> call; format -> bytes stored."""
    x = jnp.asarray(w).astype(args.dtype)
    decode = jax.jit(lambda q: q.rows(q.dtype))
    calls, stored = {}, {}
    for name, spec in SPECS.items():
        q = quantize_rows(x, spec)
        stored[name] = q.nbytes
        calls["quantize", name] = lambda spec=spec: jax.block_until_ready(quantize_rows(x, spec))
        calls["dequantize", name] = lambda q=q: jax.block_until_ready(decode(q))
    return calls, stored


def peer_calls(w: np.ndarray, args: Args, threads: int) -> dict[tuple[str, str], Callable[[], Any]]:
    import bitsandbytes.functional as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    x = torch.from_numpy(w).to(getattr(torch, args.dtype)).to(device)

    def done(call):
        def run():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {}
    for name, double in PEER_FORMATS.items():
        packed, state = bnb.quantize_4bit(x, compress_statistics=double, quant_type="nf4")
        ours = quantize_rows(jnp.asarray(w).astype(args.dtype), SPECS[name])
        assert np.array_equal(np.asarray(ours.codes).ravel(), packed.cpu().numpy().ravel()), "other bytes are packed"
        calls["quantize", name] = done(lambda d=double: bnb.quantize_4bit(x, compress_statistics=d, quant_type="nf4"))
        calls["dequantize", name] = done(lambda p=packed, s=state: bnb.dequantize_4bit(p, s))
    return calls


def measure(label: str, shape: tuple[int, int], args: Args, copy_rate: float, peer: bool, threads: int) -> list[dict]:
    w = np.random.default_rng(0).standard_normal(shape[::-1], dtype=np.float32)
    ours, stored = jlora_calls(w, args)
    theirs = peer_calls(w, args, threads) if peer else {}
    results = []
    for operation, name in ours:
        sides = {"jlora": ours[operation, name]}
        if (operation, name) in theirs:
            sides["bitsandbytes"] = theirs[operation, name]
        times = alternate(sides, seconds=args.seconds)
        moved = stored[name] + w.size * np.dtype(jnp.dtype(args.dtype)).itemsize
        row = {
            "weight": label,
            "shape": list(shape[::-1]),
            "operation": operation,
            "format": name,
            "ms": {side: quartiles([1e3 * s for s in seconds]) for side, seconds in times.items()},
            "elements_per_s": {side: w.size / median(seconds) for side, seconds in times.items()},
            "GB_per_s": moved / median(times["jlora"]) / 1e9,
            "share_of_copy": moved / median(times["jlora"]) / copy_rate,
        }
        if len(times) == 2:
            row["ratio"] = ratio(times["jlora"], times["bitsandbytes"])
        results.append(row)
    return results


def table(results: list[dict], copy_rate: float) -> Table:
    out = Table(r"weight \[out, in]", "operation", "format", title=f"copying in this run: {copy_rate / 1e9:.1f} GB/s")
    for column in ("jlora G/s", "GB/s", "of copying", "bitsandbytes G/s", "ratio (quartiles)"):
        out.add_column(column, justify="right")
    for r in results:
        speed, q = r["elements_per_s"], r.get("ratio")
        out.add_row(
            f"{r['weight']} {r['shape']}",
            r["operation"],
            r["format"],
            f"{speed['jlora'] / 1e9:.2f}",
            f"{r['GB_per_s']:.1f}",
            f"{r['share_of_copy']:.0%}",
            f"{speed['bitsandbytes'] / 1e9:.2f}" if q else "",
            f"{q['median']:.2f} ({q['q25']:.2f}–{q['q75']:.2f})" if q else "",
        )
    return out


def plot(results: list[dict], path: Path, device: str) -> None:
    """Elements a second by weight, a panel for each operation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weights = list(dict.fromkeys(r["weight"] for r in results))
    series = [(name, "jlora") for name in SPECS] + [(name, "bitsandbytes") for name in PEER_FORMATS]
    figure, axes = plt.subplots(1, 2, figsize=(4 + 2 * len(weights), 4), layout="constrained", sharex=True)
    for axis, operation in zip(axes, OPERATIONS, strict=True):
        for i, (name, side) in enumerate(series):
            chosen = [r for r in results if (r["operation"], r["format"]) == (operation, name)]
            found = {r["weight"]: r["elements_per_s"][side] / 1e9 for r in chosen if side in r["elements_per_s"]}
            at = [weights.index(w) + 0.8 * (i / len(series) - 0.4) for w in found]
            axis.bar(at, list(found.values()), 0.8 / len(series), label=f"{side} {name}", color=f"C{i}")
        axis.set_xticks(range(len(weights)), weights, fontsize=8, rotation=0 if len(weights) < 5 else 90)
        axis.set_title(operation, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("G elements/s")
    axes[1].legend(fontsize=8, frameon=False, loc="upper right")
    figure.suptitle(f"Quantizing and dequantizing on {device}", fontsize=11)
    figure.savefig(path, dpi=130)


def main(args: Args) -> None:
    console = Console(width=150)
    threads = pin(args.threads)
    peer = importlib.util.find_spec("bitsandbytes") is not None
    if not peer:
        console.print("[yellow]bitsandbytes is not installed: measuring jlora alone.")
    copy_rate = roofline()["bytes_per_s"]
    every = [(model, name) for model, kernels in KERNELS.items() for name in kernels]
    results: list[dict] = []
    for model, name in every if args.full else SHORT:
        results += measure(f"{model} {name}", KERNELS[model][name], args, copy_rate, peer, threads)
    console.print(table(results, copy_rate))
    device = jax.devices()[0].device_kind
    report = {"machine": machine(threads), "device": device, "dtype": args.dtype, "copy_bytes_per_s": copy_rate}
    write(args.output, report | {"results": results})
    if args.output is not None:
        plot(results, args.output.with_suffix(".png"), device)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
