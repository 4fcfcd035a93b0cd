"""From what `--data` names to a training and an evaluation data set."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from jlora._typing import PretrainedTokenizer
from jlora.data.formats import TOLD, Reading
from jlora.data.instruct import InstructDataset
from jlora.data.readers import KINDS, HubName, ending, files_below, is_saved
from jlora.data.record_data import RecordData, held_out_of
from jlora.data.records import BadRecords, record_files
from jlora.data.rendering import Supervise
from jlora.data.shards import EVALUATION
from jlora.data.text import TextDataset, prepare_text
from jlora.data.tokens import pad_id
from jlora.data.vocabulary import check_vocabulary

EVAL_FRACTION = 0.1  # the share to evaluate on where nothing is said
MAX_LENGTH = 512  # tokens in a row where nothing is said, if the model has as many positions

Source = str | Path | Sequence[str | Path]
TEXT = ".txt"

# What is surely meant as a file, though it would pass for the name of a hub data set.
_FOREIGN = (".arrow", ".md", ".gz", ".bz2", ".xz", ".zst", ".zip", ".yaml", ".yml", ".xml", ".parquet", ".csv", ".tsv")

_Item = TypeVar("_Item")


def load_data(
    data: Source,
    tokenizer: PretrainedTokenizer,
    *,
    eval_data: Source | None = None,
    eval_fraction: float | None = None,
    template: str = "alpaca",
    max_length: int,
    seed: int,
    directory: str | Path,
    pack: bool = False,
    vocab_size: int | None = None,
    supervise: Supervise = "assistant",
    how: Reading = TOLD,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    max_examples: int | None = None,
    bad_records: str | Path | None = None,
    streaming: bool = False,
) -> tuple[TextDataset | InstructDataset, TextDataset | InstructDataset | None]:
    """The training data and the evaluation data, or None without one.

    Args:
        data: a `.txt` file, a folder or list of them (raw text); or records: a file of `readers.KINDS`, a folder of them, one
            that `save_to_disk` of datasets wrote, the name of a hub data set, or a list of these.
        tokenizer: a transformers tokenizer.
        eval_data: the same, to evaluate on all of it.
        eval_fraction: share of `data` to evaluate on instead, in [0, 1): of text the end, of records a choice drawn
            with `seed`, at least one. 0 for none; None is 0.1 without `eval_data`.
        template: for records, "alpaca", "chat", the name of a chat template, or "auto": "chat" where there are conversations
            among the records of `data`, "alpaca" otherwise.
        max_length: the most tokens in a row.
        seed: of the choice of records, >= 0.
        directory: where the shards of raw text, and of records with `streaming`, are kept; `eval_data` goes to its folder
            `evaluation`.
        pack: put several records into a row. Raw text fills its rows already.
        vocab_size: rows of the model's embedding, which every token must be one of; None: not compared.
        supervise: what the loss is on; see `jlora.data.render`.
        how: how records are read, where their columns do not tell.
        weights: of each of several sources of records; see `jlora.data.mix.shares`. What is held out is not mixed.
        temperature: of the weights.
        max_examples: take so many records of each source of `data`, the first ones.
        bad_records: a file for the records that cannot be used, which are then left out; None: they are refused.
        streaming: keep the rows of records in files, not in memory; they are the same.
    Raises:
        FileNotFoundError: no such file.
        ValueError: both an evaluation file and a share, an unsupported file type, too little data, a token beyond
            the vocabulary, options for records with raw text, or what `Records`, `InstructDataset` and `prepare_text` raise.
    """
    if eval_data is not None and eval_fraction:
        raise ValueError(
            f"evaluation data is either a file or a share of the data; got eval_data={str(eval_data)!r} and "
            f"eval_fraction={eval_fraction}. Leave one of them out."
        )
    if eval_fraction is None:
        eval_fraction = EVAL_FRACTION if eval_data is None else 0.0
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"`eval_fraction` must be in [0, 1); got {eval_fraction}. Give the share to evaluate on.")
    kinds = [kind_of(source) for source in (data, eval_data) if source is not None]  # both, before work is done
    sources, directory = _listed(data), Path(directory)
    _check_mix(sources, weights, temperature, max_examples)
    mixing = {"weights": weights is not None, "temperature": temperature != 1, "max_examples": max_examples is not None}
    reads = {"format": how.format, "columns": how.columns, "system": how.system, "supervise": supervise != "assistant"}
    for kind, options in ((kinds[0], mixing), ("records" if "records" in kinds else "text", reads)):
        if kind == "text" and (given := [f"`{name}`" for name, is_given in options.items() if is_given]):
            raise ValueError(f"raw text is learned whole, as it is; got {' and '.join(given)}. Leave it out.")
    records = RecordData(
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        seed=seed,
        pack=pack,
        supervise=supervise,
        how=how,
        weights=weights,
        temperature=temperature,
        max_examples=max_examples,
        bad=BadRecords(None if bad_records is None else Path(bad_records)),
    )

    def made(source: Source, kind: str, into: Path, share: float, of: RecordData):
        if kind == "records":
            listed = _listed(source)
            return of.in_files(listed, share, into) if streaming else of.in_memory(listed, share)
        prepare_text(source, tokenizer, directory=into, eval_fraction=share, vocab_size=vocab_size)
        splits = ("train", "validation") if share else ("train",)
        parts = [TextDataset(into, split, length=max_length, pad_id=pad_id(tokenizer)) for split in splits]
        return parts[0], parts[1] if share else None

    train, evaluation = made(data, kinds[0], directory, eval_fraction, records)
    if eval_data is not None:
        named = train.template if isinstance(train, InstructDataset) else template
        whole = dataclasses.replace(records, template=named, weights=None, temperature=1.0, max_examples=None)
        evaluation, _ = made(eval_data, kinds[1], directory / EVALUATION, 0.0, whole)
    if records.bad.count:
        train.stats = dataclasses.replace(train.stats, bad=records.bad.count, bad_first=records.bad.first)
    for dataset in (train, evaluation):
        if dataset is not None and vocab_size is not None:
            check_vocabulary(dataset, tokenizer, vocab_size)
    return train, evaluation


def _listed(source: Source) -> list[str | Path]:
    return [source] if isinstance(source, str | Path) else list(source)


def _check_mix(
    sources: list[str | Path], weights: Sequence[float] | None, temperature: float, max_examples: int | None
) -> None:
    """Raises ValueError for options that do not go with the sources."""
    if weights is not None and len(weights) != len(sources):
        raise ValueError(
            f"each source has one weight; got {len(weights)} weights for {len(sources)} sources. Give as many."
        )
    if not all(0 < weight < math.inf for weight in (*(weights or ()), temperature)):
        raise ValueError(f"weights and temperature must be positive; got {weights} and {temperature}.")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1; got {max_examples}. Leave it out for all.")


def trained_too(train: TextDataset | InstructDataset, evaluation: TextDataset | InstructDataset) -> str | None:
    """In words, what of the data to evaluate on is trained on too: the same tokens and labels; None: nothing.

    Of raw text only whole documents are looked for: a share of the same text has none.
    """
    held_out, what = Counter(evaluation.items()), "records" if isinstance(evaluation, InstructDataset) else "documents"
    both = sum(held_out[item] for item in {item for item in train.items() if item in held_out}) if held_out else 0
    return f"{both:,} of {held_out.total():,} {what} to evaluate on are in the training data too" if both else None


def kind_of(source: Source) -> str:
    """What a source holds, "text" or "records", by the ending of its name, and of a folder by those of its files.

    A folder with `.txt` files is text, whatever else is in it; a name that is no file here is that of a hub data set, and so
    records.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unsupported file type, or a list of both kinds.
    """
    if not isinstance(source, str | Path):
        kinds = {str(item): kind_of(item) for item in source}
        if len(set(kinds.values())) > 1:
            records = [item for item, kind in kinds.items() if kind != "text"]
            raise ValueError(
                f"a list of data files must be `.txt` files; got {', '.join(records)} beside text. Give records alone, or write "
                f"the text as records with the column `text`."
            )
        return next(iter(kinds.values()), "text")
    path = Path(source)
    kind = "text" if path.suffix.lower() == TEXT else "records" if ending(path) else None
    if path.is_dir():
        texts = any(file.suffix.lower() == TEXT for file in files_below(path)[0])
        return "records" if is_saved(path) or (not texts and record_files(path)) else "text"
    if path.exists() or path.suffix.lower() in _FOREIGN:
        if kind is None:
            raise ValueError(
                f"data must be a {', '.join((TEXT, *KINDS))} file, a folder of them or a hub data set; "
                f"got {str(source)!r}. Convert the file."
            )
        return kind
    hub = HubName.of(str(source))
    if hub is not None and Path(hub.id).is_file():
        raise ValueError(
            f"{hub.id!r} is a file, of which there is no {str(source)[len(hub.id) :]!r}; give its name alone."
        )
    if kind is not None or hub is None:
        raise FileNotFoundError(f"no such data file: {source}. Check the path.")
    return "records"


def hub_id(name: str) -> str | None:
    """The id of the hub data set that a name can only be: it has the form of one, no file's ending, and is no file here."""
    hub = HubName.of(name)
    suffix = Path(name).suffix.lower()
    is_file = suffix == TEXT or ending(name) or suffix in _FOREIGN or Path(name).exists()
    return None if hub is None or is_file else hub.id


def is_hub_data(name: str) -> bool:
    """Whether a name can only be that of a hub data set."""
    return hub_id(name) is not None


def split_records(records: Sequence[_Item], *, eval_fraction: float, seed: int) -> tuple[list[_Item], list[_Item]]:
    """Hold out a share of the records, drawn with `seed`; both parts keep the order of the file.

    A share above 0 holds out at least one record.

    Raises:
        ValueError: no record is left to train on, or `seed` < 0.
    """
    held_out = held_out_of(len(records), eval_fraction=eval_fraction, seed=seed)
    kept, out = ([r for r, is_out in zip(records, held_out, strict=True) if is_out == part] for part in (False, True))
    return kept, out


def row_length(max_length: int | None, positions: int) -> int:
    """Tokens in a row: as asked, or `MAX_LENGTH`, or the model's limit if that is less.

    Raises:
        ValueError: when the model has fewer positions.
    """
    if max_length is not None and max_length > positions:
        raise ValueError(f"`max_length` must be at most the model's {positions} positions; got {max_length}.")
    return max_length or min(MAX_LENGTH, positions)
