"""`jlora prepare`."""

import dataclasses

from rich.console import Console

from jlora.data import prepare_text
from jlora.io import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Tokenize raw text into memory-mapped shards (`jlora finetune` does it by itself in OUTPUT/data)."""

    model: str
    """Whose tokenizer."""
    data: str
    """A .txt file or a folder of them."""
    output: str
    """Directory for the shards."""
    eval_fraction: float = 0.1
    """Share at the end that becomes the validation split."""


def run(options: Prepare) -> None:
    meta = prepare_text(
        options.data, load_tokenizer(options.model), directory=options.output, eval_fraction=options.eval_fraction
    )
    counts = ", ".join(f"{tokens:,} {split} tokens" for split, tokens in meta["tokens"].items())
    Console(highlight=False).print(f"{counts} in [bold]{options.output}[/]")
