"""What several commands share: a model with or without an adapter, and a data set to evaluate on."""

import dataclasses
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from jlora._numbers import check_seed
from jlora._terminal import say
from jlora._typing import DTypeName, PretrainedTokenizer, PyTree
from jlora.cli.as_trained import note, note_other_base
from jlora.data import EVAL_FRACTION, InstructDataset, TemplateName, TextDataset, load_data, row_length, trained_too
from jlora.data.tokens import fingerprint
from jlora.files import base_model_of, find, load, load_adapter, load_tokenizer
from jlora.files.adapters import tokens_of
from jlora.files.hf import AdapterBeside, add_stops
from jlora.files.origin import Origin
from jlora.files.run_settings import RunSettings
from jlora.models import Model, grow, has_adapted_tie, untie
from jlora.quant import FormatName, Kept, spec_named
from jlora.runs.flags import RecordFlags

Split = Literal["validation", "train", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Which model."""

    model: str | None = None
    """Hugging Face directory or hub id, or a GGUF file; default: the base that --adapter names."""
    adapter: str | None = None
    """Directory of an adapter, such as OUTPUT/adapter: PEFT's or mlx-lm's, or a GGUF file. (`jlora generate`: or a directory of
    several of them.)"""
    quantize: Literal["none"] | FormatName | Kept | None = None
    """Pack the base's linear kernels; keep: as its GGUF file has them; default: as the adapter's run did, otherwise none."""
    dtype: DTypeName = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere; float16 is for a GPU without bfloat16."""


def resolve_model(weights: Weights) -> str:
    """The base model's name.

    Raises:
        ValueError: when neither a model nor an adapter that names one is given.
    """
    name = weights.model or (weights.adapter and base_model_of(weights.adapter))
    if not name:
        raise ValueError(
            "Give --model, or an --adapter whose adapter_config.json names its base model (a GGUF file names none)."
        )
    return name


class Loaded(NamedTuple):
    model: Model
    """Its end of text is all that ends a generation."""
    params: PyTree
    """With the adapter on."""
    tokenizer: PretrainedTokenizer
    tokenizer_files: Path
    """The directory that it was read from."""


def load_weights(weights: Weights, *, to_write: bool = False) -> Loaded:
    """What `weights` names.

    Args:
        to_write: the weights become another file; then float32 also where there is no loss only in running in bfloat16.
    """
    name = resolve_model(weights)
    spec = spec_named(None if weights.quantize == "none" else weights.quantize)
    with warnings.catch_warnings():
        if weights.adapter is not None:  # what is to be put on is said
            warnings.simplefilter("ignore", AdapterBeside)
        model, params = load(name, dtype=jnp.dtype(_dtype(weights, name, to_write)), quantize=spec)
    if weights.adapter is not None:
        model, params = with_room(model, params, [weights.adapter])
        params = load_adapter(weights.adapter, params, model=model)
        note_other_base({"": Path(weights.adapter)}, name)
    tokenizer, files = tokenizer_of(find(name), weights.adapter, model)
    return Loaded(add_stops(model, tokenizer), params, tokenizer, files)


def with_room(model: Model, params: PyTree, adapters: Iterable[str | Path]) -> tuple[Model, PyTree]:
    """The base with rows for the tokens that the adapters train."""
    return grow(model, params, max(map(tokens_of, adapters), default=0))


def _dtype(weights: Weights, name: str, to_write: bool) -> str:
    if weights.dtype != "auto":
        return weights.dtype
    # What is written takes the base's dtype; float16 and float32 would lose digits on the way through bfloat16.
    exact = to_write and any(dtype != "bfloat16" for dtype in Origin.read(name).dtypes.values())
    return "float32" if exact or jax.default_backend() == "cpu" else "bfloat16"


def written_dtype(weights: Weights) -> str | None:
    """Of the weights in a file that is written: --dtype; None: each as the base has it."""
    return None if weights.dtype == "auto" else weights.dtype


def tokenizer_of(base: Path, adapter: str | None, model: Model) -> tuple[PretrainedTokenizer, Path]:
    """(tokenizer, its directory): the base's, unless the adapter's directory has another, with which it was trained."""
    tokenizer = load_tokenizer(base)
    beside = None if adapter is None else Path(adapter)
    if beside is None or not any((beside / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return tokenizer, base
    own = load_tokenizer(beside)
    if fingerprint(own) == fingerprint(tokenizer) and own.chat_template == tokenizer.chat_template:
        return tokenizer, base
    without = sorted((i, token) for token, i in own.get_vocab().items() if i >= model.config.vocab_size)
    said = f"the tokenizer is the one in {adapter}, which differs from the base's"
    if without:  # such as a `<pad>`; only what a text holds matters
        said += f"; a text that holds {without[0][1]!r} is refused, for which the embedding has no row"
        said += f" (nor for {len(without) - 1} more of its tokens)" if len(without) > 1 else ""
    note(said)
    return own, beside


def mergeable(model: Model, params: PyTree, terminal: Console) -> tuple[Model, PyTree]:
    """The same model in a form that can be merged: with a head of its own where the adapter changes a tied embedding."""
    if not has_adapted_tie(model, params):
        return model, params
    say(
        terminal,
        "The adapter changes the embedding, which is the output head too; the head keeps the base's values, as a tensor of its "
        "own (tie_word_embeddings: false).",
    )
    return untie(model, params)


_OF_RECORDS = ("format", "columns", "data_weights", "data_temperature", "max_examples", "system", "supervise")
OF_DATA = ("data", "eval_data", "eval_fraction", "template", "max_length", "seed", *_OF_RECORDS)
"""The fields of `EvaluationData` that a run has too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
    data: str | Sequence[str] | None = None
    """As `jlora finetune` takes it; default: the data of the adapter's run."""
    split: Split = "validation"
    """validation: what `jlora finetune` holds out; train: the rest; all: both."""
    eval_data: str | None = None
    """This file is the validation split; default: as in the adapter's run, whose --eval-data it was."""
    eval_fraction: float | None = None
    """Share of the data in the validation split; default: as in the adapter's run, otherwise 0.1."""
    template: TemplateName | Literal["auto"] | None = None
    """How records become text; default: as in the adapter's run, otherwise alpaca."""
    max_length: int | None = None
    """Tokens in a row; default: as in the adapter's run, otherwise 512, or the model's limit if that is less."""
    batch_size: int = 8
    """Rows in a batch."""
    seed: int | None = None
    """Of the choice of validation records; default: as in the adapter's run, otherwise 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationData(RecordFlags, _Data):
    """Which data; the defaults are those of `jlora finetune`, so that its validation split is found again."""

    def __post_init__(self):
        super().__post_init__()
        if self.seed is not None:
            check_seed(self.seed)
        if isinstance(self.data, Sequence) and not isinstance(self.data, str):
            object.__setattr__(self, "data", self.data[0] if len(self.data) == 1 else tuple(self.data))
        if problems := list(self.problems()):
            raise ValueError("\n".join(problems))


def require_data(options: EvaluationData) -> str | Sequence[str]:
    """The data's name, or names.

    Raises:
        ValueError: when there is none.
    """
    if options.data is None:
        raise ValueError("Give --data: a text file, records, or the id of a hub data set.")
    return options.data


@contextmanager
def open_data(
    options: EvaluationData, tokenizer: PretrainedTokenizer, model: Model, run: RunSettings | None = None
) -> Iterator[TextDataset | InstructDataset]:
    """The split as a data set; tokenized text lives in a temporary directory meanwhile.

    Args:
        run: of the adapter, whose settings `options` have.
    """
    skip = options.skip_bad_records or (run is not None and run.skip_bad_records)
    with tempfile.TemporaryDirectory() as directory:
        train, validation = load_data(
            require_data(options),
            tokenizer,
            eval_data=options.eval_data if options.split == "validation" else None,
            eval_fraction=eval_share(options),
            template=options.template or "alpaca",
            max_length=row_length(options.max_length, model.config.max_length),
            seed=options.seed or 0,
            directory=directory,
            vocab_size=model.config.vocab_size,
            pack=run is not None and run.pack,
            bad_records=Path(directory) / "bad_records.jsonl" if skip else None,
            **options.of_records(),
        )
        chosen = validation if options.split == "validation" else train
        if chosen is None:
            raise ValueError(
                "An --eval-fraction of 0 leaves no validation split: all of the data were trained on. Give other --data, and for "
                "all of it use --split all."
            )
        for part in chosen.stats.cut():
            note(f"{part}; raise --max-length")
        for part in (*chosen.stats.odd(), *(train.stats.bad_said if chosen is not train else ())):
            note(part)
        if validation is not None and chosen is validation and (both := trained_too(train, validation)) is not None:
            note(both)
        yield chosen


def eval_share(options: EvaluationData) -> float:
    """Of --data that is held out."""
    if options.eval_data is not None or options.split == "all":
        return 0.0  # all of --data is for training, or is looked at
    return EVAL_FRACTION if options.eval_fraction is None else options.eval_fraction
