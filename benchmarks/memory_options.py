"""What each option for memory saves and costs: the compiler's plan of a step at the shape of Llama-3.2-1B, 2 rows of 2048 tokens,
beside what `jlora memory` predicts, and the floating point operations of its products.

Rank 16 on all linear layers, stacked, from shapes alone: nothing is allocated or run, and each case compiles in 12 s.

    python benchmarks/memory_options.py --output benchmarks/results/memory_options_cpu.json
    python benchmarks/memory_options.py --table benchmarks/results/memory_options_cpu.json      # that of docs/performance.md
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import bench
import gpu_models
import jax
import jax.numpy as jnp

import jlora
from jlora.train import causal_lm_loss, dynamic_loss_scale, make_optimizer, make_step
from jlora.train.memory import abstract_batch, abstract_state, abstract_tree, halves, planned, predict

ROWS, LENGTH = 2, 2048
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, remat attention": {"remat": "attention"},
    "LoRA, remat dots": {"remat": "dots"},
    "LoRA, remat layer": {"remat": "layer"},
    "LoRA, accumulate 2": {"accumulate": 2},
    "LoRA, adamw8bit": {"optimizer": "adamw8bit"},
    "LoRA, float16": {"dtype": "float16"},
    "QLoRA": {"nf4": True},
    "QLoRA, remat attention": {"nf4": True, "remat": "attention"},
    "QLoRA, remat dots": {"nf4": True, "remat": "dots"},
    "QLoRA, remat layer": {"nf4": True, "remat": "layer"},
    "QLoRA, remat layer, accumulate 2, adamw8bit": {
        "nf4": True, "remat": "layer", "accumulate": 2, "optimizer": "adamw8bit",
    },
    "all parameters": {"full": True},
    "all parameters, adamw8bit": {"full": True, "optimizer": "adamw8bit"},
}  # fmt: skip
"""Accumulated, the two rows are micro-batches of one."""
LOOSELY_PACKED: dict[str, dict[str, Any]] = {
    "all parameters, remat layer": {"full": True, "remat": "layer"},
    "all parameters, remat layer, adamw8bit": {"full": True, "remat": "layer", "optimizer": "adamw8bit"},
}
"""Not in the table: in the second, XLA:CPU leaves gaps of more than a tenth of the peak between the buffers of the update."""


def products(jaxpr: Any) -> int:
    """Floating point operations of the matrix products of a jaxpr: all turns of a scan, the dearest branch of a choice."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
            continue
        values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
        inner = [products(v) for v in (getattr(v, "jaxpr", v) for v in values) if hasattr(v, "eqns")]
        together = max if eqn.primitive.name == "cond" else sum
        total += eqn.params.get("length", 1) * together(inner or [0])
    return total


def measure(
    *,
    shape="1B",
    rows=ROWS,
    length=LENGTH,
    nf4=False,
    full=False,
    remat="none",
    optimizer="adamw",
    accumulate=1,
    dtype="bfloat16",
):
    """One row of the report."""
    model = gpu_models.model_of(shape, dtype=dtype, remat=remat)
    lora, quantize = None if full else gpu_models.LORA, jlora.NF4() if nf4 else None
    stored = jnp.float32 if full else jnp.dtype(dtype)  # what is trained is float32
    params = abstract_tree(model, lora, dtype=stored, quantize=quantize, stack=True)
    adapter, base = halves(params)
    tx = make_optimizer(optimizer, gpu_models.LEARNING_RATE, adapter, max_grad_norm=1.0)
    if dtype == "float16":
        tx = dynamic_loss_scale(tx)
    predicted = predict(model, params, tx, batch_size=rows // accumulate, length=length, accumulate=accumulate)
    step = make_step(causal_lm_loss(model), tx, accumulate=accumulate)
    key = jax.eval_shape(lambda: jax.random.key(0))
    start = time.perf_counter()
    traced = step.trace(abstract_state(adapter, tx), base, abstract_batch(rows, length), key)
    plan = planned(traced.lower().compile())
    return {
        "planned": plan,
        "predicted": predicted.peak,
        "ratio": predicted.peak / plan,
        "parts": dataclasses.asdict(predicted),
        "flops": products(traced.jaxpr.jaxpr),
        "compile_s": time.perf_counter() - start,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | planned | predicted | optimizer | operations |", "| --- | --- | --- | --- | --- |"]
    for case, row in report["cases"].items():
        plain = report["cases"][case.split(",")[0]]
        sizes = f"{row['planned'] / 1e9:.2f} GB | {row['predicted'] / 1e9:.2f} GB | {row['parts']['optimizer'] / 1e6:.0f} MB"
        lines.append(f"| {case} | {sizes} | {row['flops'] / plain['flops']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and do nothing else")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *LOOSELY_PACKED], default=list(CASES), help="only these")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    report = {"machine": bench.machine(bench.pin()), "rows": ROWS, "length": LENGTH, "cases": {}}
    for case in args.cases:
        row = measure(**(CASES | LOOSELY_PACKED)[case])
        report["cases"][case] = row
        print(f"{case}: {row['planned'] / 1e9:.2f} GB planned, {row['ratio']:.3f} of it predicted", flush=True)
        bench.write(args.output, report)


if __name__ == "__main__":
    main()
