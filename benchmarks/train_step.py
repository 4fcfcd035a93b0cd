"""The training step of a 124M model with random weights against PEFT + torch: LoRA, and QLoRA against bitsandbytes.

    python benchmarks/train_step.py --output benchmarks/results/train_step_cpu.json
    python benchmarks/train_step.py --family llama --quantize nf4 --dtype bfloat16 --output benchmarks/results/qlora_step_cpu.json

GPT-2 has rank 8 on `c_attn`, the Llama of the same size rank 16 on all linear layers. With `--quantize nf4` the step is also
compared with jlora's own on the dense base.

Each measurement is a process of its own. jlora's and the peer's alternate, pinned to the same cores with as many threads, so
that a slow minute of the machine hits both; the ratio of a pair is what counts, and the median over the pairs is the
result. Both sides train the same weights on the same batch with the same AdamW: their first losses must agree, the
gradient must not vanish and the loss must fall, or there is no result. Without torch, transformers and peft it
measures jlora alone and says so.
"""

import dataclasses
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from bench import ROOT, machine, pin, quartiles, write
from rich.console import Console
from rich.table import Table

FIELDS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "llama": {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64, "max_position_embeddings": 1024, "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
DEPTH = {"gpt2": "n_layer", "llama": "num_hidden_layers"}
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {
    "gpt2": {"rank": 8, "alpha": 16, "targets": ("c_attn",)},
    "llama": {"rank": 16, "alpha": 32, "targets": LLAMA_LINEAR},
}
PEER_PACKAGES = {"none": ("torch", "transformers", "peft"), "nf4": ("torch", "transformers", "peft", "bitsandbytes")}
WORKER = "--worker"  # hidden: be a measured process
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Allowed difference of the two first losses, nats: both start at the base model, where LoRA's update is zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    dtype: Literal["float32", "bfloat16", "both"] = "both"
    """Of the frozen weights and the activations; the adapter is float32 on both sides."""
    pairs: int = 5
    """Alternated pairs of processes for each dtype."""
    steps: int = 10
    """Timed steps of a process."""
    warmup: int = 2
    """Steps before the timed ones, the first of which compiles."""
    batch: int = 4
    length: int = 128
    layers: int = 12
    """Fewer make a quick check, not a result."""
    family: Literal["gpt2", "llama"] = "gpt2"
    quantize: Literal["none", "nf4"] = "none"
    """nf4: both sides train on a 4-bit base with double quantization."""
    form: Literal["auto", "per-layer", "stacked"] = "auto"
    """jlora's execution form: unrolled layers, or one scan over a stack of them; auto: as `jlora finetune` chooses."""
    remat: bool = False
    """Recompute the layers in the backward pass (gradient checkpointing), on both sides."""
    threads: int = 0
    """Cores to pin both sides to; 0: all that this process may use."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU when there is one. Both sides must then have one."""
    only: Literal["all", "jlora", "peft"] = "all"
    """Measure one side alone, without ratios."""
    output: Path | None = None
    """JSON file for everything measured."""


# ---- the measured processes -----------------------------------------------------------------------------------------


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of a checkpoint name: the same on both sides, which never talk to each other."""
    if "ln_" in name or "norm" in name:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def tokens(args: Args) -> np.ndarray:
    """int32 [batch, length]; also the labels."""
    return np.random.default_rng(0).integers(0, FIELDS[args.family]["vocab_size"], (args.batch, args.length), np.int32)


def jlora_side(args: Args) -> tuple[Callable[[], tuple[Any, Any]], Callable[[], int | None], str]:
    """(a step that returns (loss, grad_norm) when they are there, peak device bytes, device)."""
    import jax
    import jax.numpy as jnp
    import optax

    from jlora.files.names import hf_name
    from jlora.lora import LoraConfig, add_lora, split, stack_layers
    from jlora.models import abstract_params, model_from_config
    from jlora.quant import NF4, quantize_params
    from jlora.train import causal_lm_loss, init_state, make_step
    from jlora.tree.paths import flatten, nest

    fields = {**FIELDS[args.family], DEPTH[args.family]: args.layers}
    model = model_from_config(fields, dtype=args.dtype, remat="layer" if args.remat else "none")
    shapes = flatten(abstract_params(model))

    def stored(path, shape):
        if path.endswith("/kernel") and model.config.transposed_kernels:
            return draw(hf_name(path), shape[::-1]).T
        return draw(hf_name(path), shape)

    params = nest({path: jnp.asarray(stored(path, s.shape)).astype(args.dtype) for path, s in shapes.items()})
    if args.quantize == "nf4":
        params = quantize_params(params, NF4())
    if args.form != "per-layer":
        params = stack_layers(params)
    params = add_lora(params, LoraConfig(**LORA[args.family]), key=jax.random.key(0))
    adapter, base = split(params)
    ids = jnp.asarray(tokens(args))
    batch = jax.block_until_ready({"input_ids": ids, "labels": ids})
    tx = optax.adamw(LEARNING_RATE, weight_decay=0.01)
    state = init_state(adapter, tx)
    step = make_step(causal_lm_loss(model), tx)
    del params, adapter

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, base, batch, None))
        return metrics["loss"], metrics["grad_norm"]

    device = jax.devices()[0]
    return run, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"), device.device_kind


def peft_side(args: Args) -> tuple[Callable[[], tuple[Any, Any]], Callable[[], int | None], str]:
    """The same as `jlora_side`, in PEFT's usual way: an eager step."""
    import peft
    import torch
    import transformers

    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if args.family == "gpt2" else {}
    fields = {**FIELDS[args.family], **dropouts, DEPTH[args.family]: args.layers, "use_cache": False}
    config = transformers.AutoConfig.for_model(**fields)
    default, dtype = torch.get_default_dtype(), getattr(torch, args.dtype)
    torch.set_default_dtype(dtype)
    model = transformers.AutoModelForCausalLM.from_config(config).to(device)
    torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    if args.quantize == "nf4":
        packing = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, quantization_config=packing, dtype=dtype, device_map=device
            )
    if args.remat:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recipe = LORA[args.family]
    lora = peft.LoraConfig(
        r=recipe["rank"],
        lora_alpha=recipe["alpha"],
        target_modules=list(recipe["targets"]),
        lora_dropout=0.0,
        fan_in_fan_out=args.family == "gpt2" and args.quantize == "none",
    )
    model = peft.get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    ids = torch.from_numpy(tokens(args)).long().to(device)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        # jlora's step reports the norm as well; it is 0.2 % of the time.
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), norm

    if device == "cpu":
        return run, lambda: None, "cpu"
    return run, torch.cuda.max_memory_allocated, torch.cuda.get_device_name()


def dense_side(args: Args) -> tuple[Callable[[], tuple[Any, Any]], Callable[[], int | None], str]:
    """jlora on the dense base, in the form that it chooses for that."""
    return jlora_side(dataclasses.replace(args, quantize="none", form="auto"))


SIDES = {"jlora": jlora_side, "peft": peft_side, "dense": dense_side}


def measure(side: str, args: Args) -> dict[str, Any]:
    """What the worker prints: the times of one process."""
    run, device_bytes, device = SIDES[side](args)
    gc.collect()
    seconds, results = [], []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        results.append(run())
        seconds.append(time.perf_counter() - start)
    losses, norms = zip(*((float(loss), float(norm)) for loss, norm in results), strict=True)
    # A benchmark that trains nothing would be fast.
    assert min(norms) > 0 and losses[-1] < losses[0] and np.isfinite(losses).all(), (losses, norms)
    timed = seconds[args.warmup :]
    median = statistics.median(timed)
    return {
        "device": device,
        "step_ms": 1e3 * median,
        "step_ms_all": [round(1e3 * s, 2) for s in timed],
        "tokens_per_s": args.batch * args.length / median,
        "first_step_s": seconds[0],
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_device_bytes": device_bytes(),
        "losses": [round(x, 4) for x in losses],
        "grad_norm": norms[0],
    }


# ---- the parent -----------------------------------------------------------------------------------------------------


def environment(args: Args) -> dict[str, str]:
    """The same threads for every library that might have its own."""
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    gpu = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if args.device == "auto" else {"JAX_PLATFORMS": "cpu"}
    return {**os.environ, **threads, **gpu, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def settings(args: Args) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(args).items() if k != "output"}


def spawn(side: str, args: Args) -> dict[str, Any]:
    """One measured process. It inherits this one's cores."""
    command = [sys.executable, __file__, WORKER, side, json.dumps(settings(args))]
    done = subprocess.run(command, env=environment(args), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The {side} process failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_pairs(args: Args, sides: list[str], console: Console) -> dict[str, list[dict[str, Any]]]:
    """Measurements by side, of one dtype; the i-th of each side are a pair."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for pair in range(args.pairs):
        for side in sides:
            result = spawn(side, args)
            found[side].append(result)
            console.print(
                f"{args.dtype} pair {pair + 1}/{args.pairs} {side}: {result['step_ms']:.0f} ms, "
                f"{result['tokens_per_s']:.0f} tokens/s"
            )
    if "peft" in sides and "jlora" in sides:
        first = [found[side][0]["losses"][0] for side in ("jlora", "peft")]
        assert abs(first[0] - first[1]) < LOSS_TOLERANCE[args.dtype], f"The sides start at different losses: {first}"
    return found


def summarize(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Quartiles over the processes of each side, and of the pairwise ratios of jlora to each of the others."""
    keys = ("step_ms", "tokens_per_s", "peak_rss_bytes", "first_step_s")
    summary: dict[str, Any] = {
        side: {key: quartiles([r[key] for r in runs]) for key in keys} for side, runs in found.items()
    }
    for other in [side for side in found if side != "jlora" and "jlora" in found]:
        pairs = list(zip(found["jlora"], found[other], strict=True))
        ratios: dict[str, Any] = {key: quartiles([a[key] / b[key] for a, b in pairs]) for key in keys[1:]}
        ratios["tokens_per_s_all"] = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
        summary[f"jlora / {other}"] = ratios
    return summary


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One row for each dtype and side, one for their ratio."""
    out = Table("dtype", "side", "tokens/s", "step ms", "peak RSS GB", "first step s", title="Training step")
    for dtype, summary in results.items():
        for side in (s for s in SIDES if s in summary):
            m = {key: value["median"] for key, value in summary[side].items()}
            cells = (
                f"{m['tokens_per_s']:.0f}",
                f"{m['step_ms']:.0f}",
                f"{m['peak_rss_bytes'] / 1e9:.2f}",
                f"{m['first_step_s']:.1f}",
            )
            out.add_row(dtype, side, *cells)
        for name in (n for n in summary if n.startswith("jlora /")):
            q = summary[name]["tokens_per_s"]
            memory, first = (summary[name][key]["median"] for key in ("peak_rss_bytes", "first_step_s"))
            speed = f"{q['median']:.2f} ({q['q25']:.2f}–{q['q75']:.2f})"
            out.add_row(dtype, f"[bold]{name}", f"[bold]{speed}", "", f"{memory:.2f}", f"{first:.2f}", end_section=True)
    return out


def main(args: Args) -> None:
    console = Console(width=140)
    args = dataclasses.replace(args, threads=pin(args.threads))
    missing = [name for name in PEER_PACKAGES[args.quantize] if importlib.util.find_spec(name) is None]
    sides = ["jlora", "peft"] + (["dense"] if args.quantize == "nf4" else []) if args.only == "all" else [args.only]
    if missing and "peft" in sides:
        console.print(f"[yellow]Not installed: {', '.join(missing)}. Measuring jlora alone, without ratios.")
        sides = [side for side in sides if side != "peft"]
    dtypes = ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]
    runs = {dtype: run_pairs(dataclasses.replace(args, dtype=dtype), sides, console) for dtype in dtypes}
    results = {dtype: summarize(found) for dtype, found in runs.items()}
    console.print(table(results))
    write(args.output, {"machine": machine(args.threads), "settings": settings(args), "results": results, "runs": runs})


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        print(json.dumps(measure(sys.argv[2], Args(**json.loads(sys.argv[3])))))
    else:
        main(tyro.cli(Args, description=__doc__))
