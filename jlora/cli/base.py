"""What several commands share: a model with or without an adapter, and a data set to evaluate on."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from jlora._terminal import say
from jlora.data import InstructDataset, TextDataset, load_data
from jlora.io import base_model_of, load, load_adapter, load_tokenizer
from jlora.models import has_adapted_tie, untie
from jlora.quant import SPECS

Split = Literal["validation", "train", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Which model."""

    model: str | None = None
    """Hugging Face directory or hub id; default: the base that --adapter names."""
    adapter: str | None = None
    """Directory of an adapter, such as OUTPUT/adapter: PEFT's or mlx-lm's. (`jlora generate`: or of several of them.)"""
    quantize: Literal["nf4", "int8", "int4"] | None = None
    """Pack the base's linear kernels, as `jlora finetune --quantize` did."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""


def resolve_model(weights: Weights) -> str:
    """The base model's name.

    Raises:
        ValueError: when neither a model nor an adapter that names one is given.
    """
    name = weights.model or (weights.adapter and base_model_of(weights.adapter))
    if not name:
        raise ValueError("Give --model, or an --adapter whose adapter_config.json names its base model.")
    return name


def load_weights(weights: Weights) -> tuple[Any, Any, Any]:
    """(model, parameters with the adapter on, tokenizer)."""
    name = resolve_model(weights)
    dtype = weights.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    spec = SPECS[weights.quantize]() if weights.quantize else None
    model, params = load(name, dtype=jnp.dtype(dtype), quantize=spec)
    if weights.adapter is not None:
        params = load_adapter(weights.adapter, params)
    return model, params, load_tokenizer(name)


def mergeable(model: Any, params: Any, console: Console) -> tuple[Any, Any]:
    """The same model in a form that can be merged: with a head of its own where the adapter changes a tied embedding."""
    if not has_adapted_tie(model, params):
        return model, params
    say(
        console,
        "The adapter changes the embedding, which is the output head too; the head keeps the base's values, as a tensor of its "
        "own (tie_word_embeddings: false).",
    )
    return untie(model, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Which data; the defaults are those of `jlora finetune`, so that its validation split is found again."""

    data: str | None = None
    """A .txt file or folder, a .jsonl or .json file, or the id of a hub data set."""
    split: Split = "validation"
    """validation: the --eval-fraction that `jlora finetune` holds out; train: the rest; all: both."""
    eval_fraction: float = 0.1
    """Share of the data in the validation split."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How records become text."""
    max_length: int | None = None
    """Tokens in a row; default: 512, or the model's limit if that is less."""
    batch_size: int = 8
    """Rows in a batch."""
    seed: int = 0
    """Of the choice of validation records, and of sampling."""


def require_data(options: EvaluationData) -> str:
    """The data's name.

    Raises:
        ValueError: when there is none.
    """
    if options.data is None:
        raise ValueError("Give --data: a text file, records, or the id of a hub data set.")
    return options.data


@contextmanager
def open_data(options: EvaluationData, tokenizer: Any, model: Any) -> Iterator[TextDataset | InstructDataset]:
    """The split as a data set; tokenized text lives in a temporary directory meanwhile."""
    with tempfile.TemporaryDirectory() as directory:
        train, validation = load_data(
            require_data(options),
            tokenizer,
            eval_fraction=0.0 if options.split == "all" else options.eval_fraction,
            template=options.template,
            max_length=row_length(options.max_length, model),
            seed=options.seed,
            directory=directory,
        )
        chosen = validation if options.split == "validation" else train
        if chosen is None:
            raise ValueError("An --eval-fraction of 0 leaves no validation split; use --split all.")
        yield chosen


def row_length(max_length: int | None, model: Any) -> int:
    """Tokens in a row: as asked, or 512 or the model's limit.

    Raises:
        ValueError: when the model has fewer positions.
    """
    limit = model.config.max_length
    if max_length is not None and max_length > limit:
        raise ValueError(f"`max_length` must be at most the model's {limit} positions; got {max_length}.")
    return max_length or min(512, limit)
