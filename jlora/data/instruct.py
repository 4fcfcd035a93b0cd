"""Instruction and chat records as rows, with the loss on the responses."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from jlora._typing import Json, PretrainedTokenizer
from jlora.data.columns import has_empty_answer
from jlora.data.encoding import Encoded, encode_pieces
from jlora.data.layout import MULTIPLE
from jlora.data.named_templates import CHAT_TEMPLATES, check_tokenizer
from jlora.data.packing import first_fit_decreasing, packed
from jlora.data.records import BadRecords
from jlora.data.rendering import Rendering, Supervise
from jlora.data.rows import IGNORED, Row
from jlora.data.tally import Tally
from jlora.data.templates import renderings
from jlora.data.tokens import added_bos, pad_id

_RECORDS_AT_ONCE = 1024  # encoded in one call, so that a fast tokenizer can use the cores


class InstructDataset:
    """Rows of rendered records; a `Dataset`. The loss is on the responses and their end-of-text tokens.

    A record longer than `max_length` is cut on the right. If nothing of its response is left it is dropped. Both are
    counted in `stats`, with their places. Where a chat template rewrites earlier turns a record has a row for each answer.

    Args:
        records: (where, record) pairs as from `read_records`.
        tokenizer: a transformers tokenizer.
        template: "alpaca", "chat" or a chat template's name; see `jlora.data.templates.render`.
        max_length: the most tokens in a row, >= 2.
        pack: put several records into each row of `max_length` tokens, with segment ids.
        supervise: what the loss is on; see `jlora.data.templates.render`.
        bad: what to do with records that do not render; None: refuse them.
    Attributes:
        length: the width of a row for each record: the longest, rounded up to a multiple of 8, but at most `max_length`;
            `max_length` itself when packed.
        largest_token: the largest id in any row.
        stats: what became of the records.
        template: its name.
    Raises:
        ValueError: a record that does not render (with its place), no records, or no supervised token in any of them.
    """

    def __init__(
        self,
        records: Iterable[tuple[str, Mapping[str, Json]]],
        tokenizer: PretrainedTokenizer,
        *,
        template: str,
        max_length: int,
        pack: bool = False,
        supervise: Supervise = "assistant",
        bad: BadRecords | None = None,
    ):
        tally, text = Tally(), RowText(tokenizer, template, max_length, supervise)
        rows = list(rows_of(records, text, tally, BadRecords() if bad is None else bad))
        self._hold(rows, tally, text, pack)

    @classmethod
    def of_rows(cls, rows: Sequence[Row], tally: Tally, text: "RowText", *, pack: bool) -> "InstructDataset":
        """Of rows that were made before, such as `RowFiles`."""
        made = cls.__new__(cls)
        made._hold(rows, tally, text, pack)
        return made

    def _hold(self, rows: Sequence[Row], tally: Tally, text: "RowText", pack: bool) -> None:
        self._rows, self.template = rows, text.template
        self.pad_id, self.fills_rows = pad_id(text.tokenizer), pack
        self.length = min(text.max_length, -(-tally.longest_row // MULTIPLE) * MULTIPLE)
        self._bins: list[list[int]] | None = None
        if pack:
            self.length = text.max_length
            self._bins = first_fit_decreasing([len(row.input_ids) for row in rows], capacity=text.max_length)
        self.largest_token = tally.largest
        self.stats = tally.stats(rows=len(self), length=self.length)

    def digest(self) -> str:
        """SHA-256 that tells whether this is the same data: of every row's tokens and labels."""
        sha = hashlib.sha256()
        for row in map(self.row, range(len(self))):
            sha.update(np.int32(len(row.input_ids)).tobytes() + row.input_ids.tobytes() + row.labels.tobytes())
        return sha.hexdigest()

    def tokens(self) -> tuple[set[int], set[int]]:
        """The ids in the rows, and those of them that are supervised."""
        used, learned = np.zeros((2, self.largest_token + 1), bool)
        rows = iter(self._rows)
        while group := list(islice(rows, _RECORDS_AT_ONCE)):
            used[np.concatenate([row.input_ids for row in group])] = True
            labels = np.concatenate([row.labels for row in group])
            learned[labels[labels != IGNORED]] = True
        return set(np.flatnonzero(used).tolist()), set(np.flatnonzero(learned).tolist())

    def items(self) -> Iterator[bytes]:
        """Of each row before packing a digest of its tokens and labels: equal where two are the same to the model."""
        for row in self._rows:
            yield hashlib.blake2b(row.input_ids.tobytes() + row.labels.tobytes(), digest_size=16).digest()

    def __len__(self) -> int:
        return len(self._rows if self._bins is None else self._bins)

    def row(self, index: int) -> Row:
        """Row `index`: a record, or several when packed.

        Raises:
            IndexError: `index` is not in 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in 0..{len(self) - 1}; got {index}.")
        if self._bins is None:
            return self._rows[index]
        return packed([self._rows[item] for item in self._bins[index]])


class RowText(NamedTuple):
    """How the text of a record becomes a row; see `InstructDataset`."""

    tokenizer: PretrainedTokenizer
    template: str
    max_length: int
    supervise: Supervise = "assistant"


def rows_of(
    records: Iterable[tuple[str, Mapping[str, Json]]], text: RowText, tally: Tally, bad: BadRecords
) -> Iterator[Row]:
    """The rows of records, counted as they come.

    Raises:
        ValueError: as `InstructDataset`.
    """
    if text.max_length < 2:
        raise ValueError(
            f"`max_length` must be >= 2, a token and the one it predicts; got {text.max_length}. Raise it."
        )
    if text.template in CHAT_TEMPLATES:
        check_tokenizer(text.template, text.tokenizer)
    for where, record, rendered, encoded in _tokenized(records, text, bad):
        left_out = [*getattr(record, "left_out", ()), *dict.fromkeys(n for r in rendered for n in r.left_out)]
        tally.record(where, left_out)
        for what, is_so in (
            ("empty", has_empty_answer(record)),
            ("straddled", any(row.straddled for row in encoded)),
            ("apart", len(encoded) > 1),
        ):
            if is_so:
                tally.note(what, where)
        for ids, spans, _ in encoded:
            row = _row(ids, spans, text.max_length)
            if tally.row(where, row, tokens=len(ids), start=spans[0][0] if spans else len(ids)):
                yield row
    if not tally.records:
        if bad.count:
            raise bad.none_left("the data")
        raise ValueError("a data set needs at least one record; got none. Check the file it was read from.")
    if not tally.rows:
        raise ValueError(
            f"a data set needs at least one supervised token; of {tally.records} records, from {tally.first} on, "
            f"none has one within max_length={text.max_length} (the first response starts at token {tally.starts}). "
            f"Raise `max_length` above it, or shorten the prompts."
        )


_Made = tuple[str, Mapping[str, Json], list[Rendering], list[Encoded]]


def _tokenized(records: Iterable[tuple[str, Mapping[str, Json]]], text: RowText, bad: BadRecords) -> Iterator[_Made]:
    """Of each record its place, and the text and the ids of its rows."""
    bos, every = added_bos(text.tokenizer), iter(records)

    def tried(where: str, record: Mapping[str, Json], make):
        try:
            return make()
        except ValueError as error:
            if bad.file is None:
                raise ValueError(f"{where}: {error}") from error
            bad.add(where, error, dict(record))

    def encoded(rendered: list[Rendering]) -> list[Encoded]:
        return list(encode_pieces(text.tokenizer, [row.pieces for row in rendered], bos=bos))

    def rendered_of(record: Mapping[str, Json]) -> list[Rendering]:
        return renderings(record, text.tokenizer, template=text.template, supervise=text.supervise)

    while group := list(islice(every, _RECORDS_AT_ONCE)):
        made = [(where, r, tried(where, r, lambda r=r: rendered_of(r))) for where, r in group]
        made = [(where, record, rows) for where, record, rows in made if rows is not None]
        try:
            all_ids = iter(encoded([row for _, _, rows in made for row in rows]))
        except ValueError:  # whose it is, is found one by one
            for where, record, rows in made:
                if (ids := tried(where, record, lambda rows=rows: encoded(rows))) is not None:
                    yield where, record, rows, ids
            continue
        for where, record, rows in made:
            yield where, record, rows, list(islice(all_ids, len(rows)))


def _row(ids: list[int], spans: list[tuple[int, int]], max_length: int) -> Row:
    input_ids = np.asarray(ids[:max_length], np.int32)
    labels = np.full(len(input_ids), IGNORED, np.int32)
    for start, stop in spans:
        labels[start:stop] = input_ids[start:stop]
    labels[:1] = IGNORED  # nothing predicts it
    return Row(input_ids, labels)
