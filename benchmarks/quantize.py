"""Throughput of quantizing to NF4 and back, against bitsandbytes, in one process, call by call in turns.

    python benchmarks/quantize.py --output benchmarks/results/quantize_cpu.json

Elements a second of a float32 or bfloat16 weight; the ratio is taken within each turn. Both sides get the weight as
PyTorch stores it, [out, in], and give the same bytes, which is checked first.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from bench import alternate, machine, median, pin, quartiles, ratio, write
from rich.console import Console
from rich.table import Table

SHAPES = {"GPT-2 c_fc": (3072, 768), "Llama-3.2-1B down_proj": (2048, 8192), "Llama-3.1-8B q_proj": (4096, 4096)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compare quantize and dequantize with bitsandbytes'."""

    seconds: float = 3.0
    """Time for each operation of each side."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weight, and of the result of dequantizing."""
    threads: int = 0
    """Cores to pin both sides to; 0: all."""
    output: Path | None = None
    """JSON file for everything measured."""


def jlora_side(w: np.ndarray, args: Args) -> tuple[dict[str, Any], np.ndarray]:
    import jax
    import jax.numpy as jnp

    import jlora
    from jlora.quant import quantize_rows

    x = jnp.asarray(w).astype(args.dtype)
    calls = {}
    for name, spec in {"nf4": jlora.NF4(double_quant=False), "nf4 double": jlora.NF4()}.items():
        q = quantize_rows(x, spec)
        decode = jax.jit(lambda q: q.rows(q.dtype))
        calls["quantize", name] = lambda spec=spec: jax.block_until_ready(quantize_rows(x, spec))
        calls["dequantize", name] = lambda q=q, decode=decode: jax.block_until_ready(decode(q))
    return calls, np.asarray(quantize_rows(x, jlora.NF4()).codes).reshape(-1)


def peer_side(w: np.ndarray, args: Args, threads: int) -> tuple[dict[str, Any], np.ndarray]:
    import bitsandbytes.functional as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    x = torch.from_numpy(w).to(getattr(torch, args.dtype)).to(device)

    def done(call):
        def run():
            result = call()
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    calls = {}
    for name, double in {"nf4": False, "nf4 double": True}.items():
        packed, state = bnb.quantize_4bit(x, compress_statistics=double, quant_type="nf4")
        calls["quantize", name] = done(lambda d=double: bnb.quantize_4bit(x, compress_statistics=d, quant_type="nf4"))
        calls["dequantize", name] = done(lambda p=packed, s=state: bnb.dequantize_4bit(p, s))
    return calls, packed.cpu().numpy().reshape(-1)


def main(args: Args) -> None:
    console = Console(width=140)
    threads = pin(args.threads)
    peer = importlib.util.find_spec("bitsandbytes") is not None
    if not peer:
        console.print("[yellow]bitsandbytes is not installed: measuring jlora alone.")
    import jax

    table = Table("weight [out, in]", "operation", "format", "jlora G/s", "bitsandbytes G/s", "ratio (quartiles)")
    results = []
    for label, shape in SHAPES.items():
        w = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        ours, our_bytes = jlora_side(w, args)
        theirs, their_bytes = peer_side(w, args, threads) if peer else ({}, our_bytes)
        assert np.array_equal(our_bytes, their_bytes), "the sides pack different bytes"
        for case in ours:
            sides = {"jlora": ours[case]} | ({"bitsandbytes": theirs[case]} if peer else {})
            times = alternate(sides, seconds=args.seconds)
            speed = {side: w.size / median(seconds) / 1e9 for side, seconds in times.items()}
            row = {"weight": label, "shape": shape, "operation": case[0], "format": case[1], "elements_per_s": speed}
            cells = [f"{label} {list(shape)}", *case, f"{speed['jlora']:.2f}"]
            if peer:
                row["ratio"] = ratio(times["jlora"], times["bitsandbytes"])
                q = row["ratio"]
                cells += [f"{speed['bitsandbytes']:.2f}", f"{q['median']:.2f} ({q['q25']:.2f}–{q['q75']:.2f})"]
            row["ms"] = {side: quartiles([1e3 * s for s in seconds]) for side, seconds in times.items()}
            results.append(row)
            table.add_row(*cells)
    console.print(table)
    write(
        args.output,
        {"machine": machine(threads), "device": jax.devices()[0].device_kind, "dtype": args.dtype, "results": results},
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
