"""From what `--data` names to a training and an evaluation data set."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from jlora._typing import PretrainedTokenizer
from jlora.data.instruct import InstructDataset
from jlora.data.records import Record, read_records
from jlora.data.shards import EVALUATION
from jlora.data.text import TextDataset, prepare_text
from jlora.data.tokens import pad_id
from jlora.data.vocabulary import check_vocabulary

EVAL_FRACTION = 0.1  # the share to evaluate on where nothing is said
MAX_LENGTH = 512  # tokens in a row where nothing is said, if the model has as many positions

Source = str | Path | Sequence[str | Path]

_KINDS = {".txt": "text", ".jsonl": "records", ".json": "records"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What is surely meant as a file, though it would pass for the name of a hub data set.
_FOREIGN = (".csv", ".tsv", ".parquet", ".arrow", ".md", ".gz", ".bz2", ".xz", ".zst", ".zip", ".yaml", ".yml", ".xml")


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
) -> tuple[TextDataset | InstructDataset, TextDataset | InstructDataset | None]:
    """The training data and the evaluation data, or None without one.

    Args:
        data: a `.txt` file, a folder or list of them (raw text); a `.jsonl` or `.json` file or the id of a hub data
            set (records).
        tokenizer: a transformers tokenizer.
        eval_data: the same, to evaluate on all of it.
        eval_fraction: share of `data` to evaluate on instead, in [0, 1): of text the end, of records a choice drawn
            with `seed`, at least one. 0 for none; None is 0.1 without `eval_data`.
        template: for records, "alpaca" or "chat".
        max_length: the most tokens in a row.
        seed: of the choice of records, >= 0.
        directory: where the shards of raw text are kept; `eval_data` goes to its folder `evaluation`.
        pack: put several records into a row. Raw text fills its rows already.
        vocab_size: rows of the model's embedding, which every token must be one of; None: not compared.
    Raises:
        FileNotFoundError: no such file.
        ValueError: both an evaluation file and a share, an unsupported file type, too little data, a token beyond
            the vocabulary, or what `read_records`, `InstructDataset` and `prepare_text` raise.
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

    def of_records(records: list[tuple[str, Record]]) -> InstructDataset:
        return InstructDataset(records, tokenizer, template=template, max_length=max_length, pack=pack)

    def of_text(source: Source, into: Path, share: float) -> tuple[TextDataset, TextDataset | None]:
        prepare_text(source, tokenizer, directory=into, eval_fraction=share, vocab_size=vocab_size)
        splits = ("train", "validation") if share else ("train",)
        made = [TextDataset(into, split, length=max_length, pad_id=pad_id(tokenizer)) for split in splits]
        return made[0], made[1] if share else None

    if kinds[0] == "text":
        train, evaluation = of_text(data, Path(directory), eval_fraction)
    else:
        kept, held_out = split_records(read_records(_single(data)), eval_fraction=eval_fraction, seed=seed)
        train, evaluation = of_records(kept), of_records(held_out) if held_out else None
    if eval_data is not None:
        if kinds[1] == "text":
            evaluation, _ = of_text(eval_data, Path(directory) / EVALUATION, 0.0)
        else:
            evaluation = of_records(read_records(_single(eval_data)))
    for dataset in (train, evaluation):
        if dataset is not None and vocab_size is not None:
            check_vocabulary(dataset, tokenizer, vocab_size)
    return train, evaluation


def trained_too(train: TextDataset | InstructDataset, evaluation: TextDataset | InstructDataset) -> str | None:
    """In words, what of the data to evaluate on is trained on too: the same tokens and labels; None: nothing.

    Of raw text only whole documents are looked for: a share of the same text has none.
    """
    held_out, what = Counter(evaluation.items()), "records" if isinstance(evaluation, InstructDataset) else "documents"
    both = sum(held_out[item] for item in {item for item in train.items() if item in held_out}) if held_out else 0
    return f"{both:,} of {held_out.total():,} {what} to evaluate on are in the training data too" if both else None


def _single(source: Source) -> str | Path:
    assert isinstance(source, str | Path), "kind_of lets lists of records through"
    return source


def kind_of(source: Source) -> str:
    """What a source holds, "text" or "records", by the ending of its name.

    A folder or a list is text; a name that is no file here is the id of a hub data set, and so records.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unsupported file type.
    """
    if not isinstance(source, str | Path):
        kinds = {str(item): kind_of(item) for item in source}
        wrong = [item for item, kind in kinds.items() if kind != "text"]
        if wrong:
            raise ValueError(
                f"a list of data files must be `.txt` files; got {', '.join(wrong)}. Join records in one file."
            )
        return "text"
    path = Path(source)
    kind = _KINDS.get(path.suffix.lower())
    if path.is_dir():
        return "text"
    if path.exists() or path.suffix.lower() in _FOREIGN:
        if kind is None:
            raise ValueError(
                f"data must be a {', '.join(_KINDS)} file, a folder of .txt files or a hub data set; "
                f"got {str(source)!r}. Convert the file."
            )
        return kind
    if kind is not None or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"no such data file: {source}. Check the path.")
    return "records"


def is_hub_data(name: str) -> bool:
    """Whether a name can only be the id of a hub data set: it has the form of one, no file's ending, and is no file here."""
    suffix = Path(name).suffix.lower()
    return bool(_HUB_ID.fullmatch(name)) and suffix not in (*_KINDS, *_FOREIGN) and not Path(name).exists()


def split_records(records: Sequence[_Item], *, eval_fraction: float, seed: int) -> tuple[list[_Item], list[_Item]]:
    """Hold out a share of the records, drawn with `seed`; both parts keep the order of the file.

    A share above 0 holds out at least one record.

    Raises:
        ValueError: no record is left to train on, or `seed` < 0.
    """
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0; got {seed}. Give a non-negative integer.")
    if eval_fraction == 0:
        return list(records), []
    n_held_out = max(1, round(len(records) * eval_fraction))
    if n_held_out >= len(records):
        raise ValueError(
            f"training needs at least one record; eval_fraction={eval_fraction} holds out {n_held_out} of "
            f"{len(records)}. Lower `eval_fraction` (0 for none), or give `eval_data`."
        )
    # A spawn key of two words: the order of the batches is drawn with keys of one.
    source = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0, 0)))
    held_out = set(np.random.Generator(source).permutation(len(records))[:n_held_out].tolist())
    return (
        [record for i, record in enumerate(records) if i not in held_out],
        [record for i, record in enumerate(records) if i in held_out],
    )


def row_length(max_length: int | None, positions: int) -> int:
    """Tokens in a row: as asked, or `MAX_LENGTH`, or the model's limit if that is less.

    Raises:
        ValueError: when the model has fewer positions.
    """
    if max_length is not None and max_length > positions:
        raise ValueError(f"`max_length` must be at most the model's {positions} positions; got {max_length}.")
    return max_length or min(MAX_LENGTH, positions)
