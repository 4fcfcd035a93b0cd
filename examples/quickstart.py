"""A pretrained model learns a new voice: fine-tune, measure, look, and save an adapter that PEFT loads.

    make quickstart        # or: python examples/quickstart.py

Runs on the embedded 1.4-million-parameter GPT-2 with the embedded style text, without network, in under two minutes on two
CPU cores. Exits with 1 when the held-out perplexity of the style text did not fall by at least 20 %.
"""

import argparse
import shutil
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape

import jlora
from jlora.report import plot_history, print_comparison
from jlora.train import perplexity

ASSETS = Path(__file__).parent / "assets"
PROMPTS = ("The lamp", "This morning", "I have kept", "She came", "In the evening")


def main(output: Path, steps: int) -> int:
    shutil.rmtree(output, ignore_errors=True)  # this example's own directory: run it as often as you like
    console = Console(highlight=False)

    console.rule("[bold]1  fine-tune with LoRA", align="left")
    result = jlora.finetune(
        jlora.FinetuneConfig(
            model=_shown(ASSETS / "tiny-gpt2"),
            data=_shown(ASSETS / "style.txt"),
            output=str(output),
            steps=steps,
            rank=8,
            alpha=16,
            learning_rate=5e-3,
            batch_size=8,
            max_length=128,
            eval_every=10,
            save="best",  # five thousand words are soon known by heart
        )
    )

    console.rule("[bold]2  base and adapted, side by side", align="left")
    model, params = jlora.load(ASSETS / "tiny-gpt2", dtype="float32")
    params = jlora.load_adapter(result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(result.adapter_dir)
    comparison = jlora.compare(
        model,
        params,
        [(text, tokenizer(text)["input_ids"]) for text in PROMPTS],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        key=jax.random.key(0),
        max_new_tokens=48,
        temperature=0.7,  # so small a model wanders off at 1
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
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    sys.exit(main(options.output, options.steps))
