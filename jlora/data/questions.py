"""Records to be answered: what is asked, and what a right answer is."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jlora._typing import Json
from jlora.data.conversations import conversation_of, turn_content
from jlora.data.formats import Reading, unanswered
from jlora.data.prompts import shown
from jlora.data.record_data import held_out_of
from jlora.data.records import BadRecords, Record, Records
from jlora.data.values import cut, kind


class Question(NamedTuple):
    where: str
    record: Record
    """Whose last answer is not to be looked at."""
    shown: str
    """What it asks, as people read it."""
    references: tuple[str, ...]
    """Right answers."""
    tests: str | None
    """Code that fails behind a wrong answer."""


def questions_of(
    data: str | Path | Sequence[str | Path],
    *,
    eval_fraction: float,
    held_out: bool,
    seed: int,
    how: Reading,
    max_examples: int | None,
    bad: BadRecords,
    references: str | None = None,
    tests: str | None = None,
    answered: bool = True,
) -> list[Question]:
    """The records of a split, each once, in the order of the file: those that `load_data` holds out of the data, or the others.

    Args:
        data, eval_fraction, seed, how, max_examples: as `load_data` takes them.
        held_out: the share that is held out, not the rest.
        bad: what to do with records that cannot be read.
        references: the column of right answers: a text, a list of texts, or SQuAD's `{"text": [...]}`; None: the record's own
            last answer.
        tests: the column of tests: code, or a list of pieces of it.
        answered: a record must have an answer.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `Records`; and for a column that holds something else.
    """
    beside = tuple(dict.fromkeys(name for name in (references, tests) if name is not None))
    records = Records(
        [data] if isinstance(data, str | Path) else list(data),
        how=how._replace(beside=beside),
        at_most=max_examples,
        bad=bad,
        prepare=(lambda value: value) if answered else unanswered,
    )
    chosen = held_out_of(len(records), eval_fraction=eval_fraction, seed=seed)
    found = []
    for (where, record), is_out in zip(records, chosen, strict=True):
        if is_out != held_out:
            continue
        try:
            right = _answer(record) if references is None else _texts(references, record.beside[references])
            code = None if tests is None else "\n".join(_texts(tests, record.beside[tests])) or None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        found.append(Question(where, record, shown(record), right, code))
    return found


def _answer(record: Record) -> tuple[str, ...]:
    if "text" in record:
        raise ValueError("a record of raw text asks nothing. Give records with an instruction or turns")
    last = conversation_of(record).messages[-1]
    text = turn_content(last) if last["role"] == "assistant" else ""
    return (text,) if text.strip() else ()


def _texts(column: str, value: Json) -> tuple[str, ...]:
    listed = value.get("text") if isinstance(value, dict) else value
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(text, str | int | float) for text in listed):
        raise ValueError(f"column {column!r} must be a text or a list of texts; got {kind(value)}: {cut(repr(value))}")
    return tuple(str(text) for text in listed if str(text).strip())
