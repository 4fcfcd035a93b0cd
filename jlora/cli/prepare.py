"""`jlora prepare`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from jlora._terminal import console, say
from jlora.cli.as_trained import note
from jlora.data import EVAL_FRACTION, TemplateName, kind_of, load_data, prepare_text, row_length
from jlora.data.sources import TEXT
from jlora.files import find, load_tokenizer, read_config
from jlora.models import Model, model_from_config
from jlora.runs.flags import RecordFlags
from jlora.storage.whole import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepare:
    model: str
    """Whose tokenizer."""
    data: str | Sequence[str]
    """As `jlora finetune` takes it."""
    output: str
    """Directory for the shards."""
    eval_fraction: float = EVAL_FRACTION
    """Share that becomes the validation split: the end of a text, a choice of records."""
    template: TemplateName | Literal["auto"] = "alpaca"
    """How records become text."""
    max_length: int | None = None
    """Tokens in a row of records. Default: 512, or the model's limit if that is less."""
    seed: int = 0
    """Of the choice of validation records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(RecordFlags, _Prepare):
    """Tokenize raw text or records into memory-mapped shards (`jlora finetune` does it by itself in OUTPUT/data)."""


def run(options: Prepare) -> None:
    check_writable(options.output)
    if problems := list(options.problems()):
        raise ValueError("\n".join(problems))
    directory = find(options.model)
    model = model_from_config(read_config(directory), dtype=jnp.float32)
    is_text = str(options.data).lower().endswith(TEXT) or kind_of(options.data) == "text"
    counts = (_text if is_text else _records)(options, directory, model)
    shown = ", ".join(f"{tokens:,} {split} tokens" for split, tokens in counts.items())
    say(console(), f"{shown} in ", (options.output, "bold"))


def _text(options: Prepare, directory: Path, model: Model) -> dict[str, int]:
    meta = prepare_text(
        options.data,
        load_tokenizer(directory),
        directory=options.output,
        eval_fraction=options.eval_fraction,
        vocab_size=model.config.vocab_size,
    )
    return meta["tokens"]


def _records(options: Prepare, directory: Path, model: Model) -> dict[str, int]:
    bad = Path(options.output) / "bad_records.jsonl" if options.skip_bad_records else None
    parts = load_data(
        options.data,
        load_tokenizer(directory),
        eval_fraction=options.eval_fraction,
        template=options.template,
        max_length=row_length(options.max_length, model.config.max_length),
        seed=options.seed,
        directory=options.output,
        vocab_size=model.config.vocab_size,
        bad_records=bad,
        **dataclasses.replace(options, streaming=True).of_records(),
    )
    found = {split: part for split, part in zip(("train", "validation"), parts, strict=True) if part is not None}
    for split, part in found.items():
        for said in (*part.stats.cut(), *part.stats.odd()):
            note(f"{split}: {said}")
    return {split: part.stats.tokens for split, part in found.items()}
