"""`jlora prepare`."""

import dataclasses

import jax.numpy as jnp

from jlora._terminal import console, say
from jlora.data import EVAL_FRACTION, prepare_text
from jlora.files import find, load_tokenizer, read_config
from jlora.models import model_from_config
from jlora.storage.whole import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Tokenize raw text into memory-mapped shards (`jlora finetune` does it by itself in OUTPUT/data)."""

    model: str
    """Whose tokenizer."""
    data: str
    """A .txt file or a folder of them."""
    output: str
    """Directory for the shards."""
    eval_fraction: float = EVAL_FRACTION
    """Share at the end that becomes the validation split."""


def run(options: Prepare) -> None:
    check_writable(options.output)
    directory = find(options.model)
    model = model_from_config(read_config(directory), dtype=jnp.float32)
    meta = prepare_text(
        options.data,
        load_tokenizer(directory),
        directory=options.output,
        eval_fraction=options.eval_fraction,
        vocab_size=model.config.vocab_size,
    )
    counts = ", ".join(f"{tokens:,} {split} tokens" for split, tokens in meta["tokens"].items())
    say(console(), f"{counts} in ", (options.output, "bold"))
