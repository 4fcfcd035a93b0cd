"""What `jlora.wrap` adds to a training step: equations, floating point operations and seconds of tracing.

Full-size GPT-2 (124M), batch 4 x 128, rank 8 on `c_attn`, from shapes alone: nothing is compiled or allocated. The explicit
path multiplies through `jlora.linear`; the wrapped one traces the same loss on what it takes for dense arrays.

    python benchmarks/wrap_overhead.py --output benchmarks/results/wrap_overhead_cpu.json
"""

import argparse
import itertools
import time
from pathlib import Path

import bench
import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.models import model_from_config
from jlora.train.memory import abstract_batch, abstract_tree

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
IDS = {"bos_token_id": 50256, "eos_token_id": 50256}


def equations(jaxpr) -> int:
    """Equations of a jaxpr, those of inner ones included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


def measure(wrapped: bool, quantize: bool, stack: bool, fields: dict | None = None) -> dict[str, float]:
    """Equations, FLOPs and trace seconds of one training step."""
    model = model_from_config(GPT2 | IDS | (fields or {}), dtype=jnp.float32)
    config = jlora.LoraConfig(rank=8, targets=["c_attn"])
    params = abstract_tree(model, config, dtype=jnp.float32, quantize=jlora.NF4() if quantize else None, stack=stack)
    loss, tx = jlora.train.causal_lm_loss(model), optax.adamw(1e-3)
    if wrapped:
        explicit = loss
        loss = jlora.wrap(lambda params, batch, key: explicit(params, batch, None))
    adapter, base = jlora.split(params)
    state = jax.eval_shape(lambda a: jlora.train.init_state(a, tx), adapter)
    key = jax.eval_shape(lambda: jax.random.key(0))
    start = time.perf_counter()
    traced = jlora.train.make_step(loss, tx).trace(state, base, abstract_batch(4, 128, segments=False), key)
    seconds = time.perf_counter() - start
    cost = traced.lower().cost_analysis()
    return {"equations": equations(traced.jaxpr.jaxpr), "flops": cost["flops"], "trace_s": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of each trace; the median counts")
    options = parser.parse_args()
    threads = bench.pin(options.threads)
    rows = []
    for quantize, stack in itertools.product((False, True), repeat=2):
        row: dict = {"base": "nf4" if quantize else "float32", "form": "stacked" if stack else "per layer"}
        for name in ("explicit", "wrapped"):
            runs = [measure(name == "wrapped", quantize, stack) for _ in range(options.repeats)]
            row[name] = runs[0] | {"trace_s": bench.median([run["trace_s"] for run in runs])}
        for figure in ("equations", "flops", "trace_s"):
            row[f"{figure}_ratio"] = row["wrapped"][figure] / row["explicit"][figure]
        rows.append(row)
        print({name: value if isinstance(value, str | dict) else round(value, 3) for name, value in row.items()})
    bench.write(options.output, {"machine": bench.machine(threads), "rows": rows})


if __name__ == "__main__":
    main()
