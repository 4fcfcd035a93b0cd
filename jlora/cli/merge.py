"""`jlora merge`."""

import dataclasses

from rich.console import Console

from jlora.cli.base import Weights, load_weights
from jlora.io import save_pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Weights):
    """Write a transformers checkpoint with the adapter merged into the weights."""

    output: str
    """Directory to write; it must not hold weights yet."""


def run(options: Merge) -> None:
    if options.adapter is None:
        raise ValueError("There is nothing to merge without --adapter OUTPUT/adapter.")
    model, params, tokenizer = load_weights(options)
    save_pretrained(options.output, model, params, tokenizer=tokenizer)
    Console(highlight=False).print(f"merged checkpoint: [bold]{options.output}[/] (loads in transformers)")
