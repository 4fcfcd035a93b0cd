"""Instruction and chat records as rows, with the loss on the responses."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jlora.data.batches import IGNORED, Row, supervised_tokens
from jlora.data.packing import first_fit_decreasing, packed
from jlora.data.records import Record
from jlora.data.stats import Stats
from jlora.data.templates import Piece, assemble, render
from jlora.data.tokens import Tokenizer, added_bos, encode_many, pad_id

_MULTIPLE = 8  # of which the width of a batch is one: matrix units want it, and lengths that nearly agree then share it
_RECORDS_AT_ONCE = 1024  # encoded in one call, so that a fast tokenizer can use the cores


class InstructDataset:
    """Rows of rendered records; a `Dataset`. The loss is on the responses and their end-of-text tokens.

    A record longer than `max_length` is cut on the right. If nothing of its response is left it is dropped. Both are
    counted in `stats`, with their places.

    Args:
        records: (where, record) pairs as from `read_records`.
        tokenizer: a transformers tokenizer.
        template: "alpaca" or "chat"; see `jlora.data.templates.render`.
        max_length: the most tokens in a row, >= 2.
        pack: put several records into each row of `max_length` tokens, with segment ids.
    Attributes:
        length: the width of the batches: the longest row, rounded up to a multiple of 8, but at most `max_length`;
            `max_length` itself when packed.
        stats: what became of the records.
    Raises:
        ValueError: a record that does not render (with its place), no records, or no supervised token in any of them.
    """

    def __init__(
        self,
        records: Iterable[tuple[str, Record]],
        tokenizer: Tokenizer,
        *,
        template: str,
        max_length: int,
        pack: bool = False,
    ):
        if max_length < 2:
            raise ValueError(f"`max_length` must be >= 2, a token and the one it predicts; got {max_length}. Raise it.")
        records = list(records)
        if not records:
            raise ValueError("a data set needs at least one record; got none. Check the file it was read from.")
        rows, truncated_at, dropped_at, lengths, starts = [], [], [], [], []
        for where, ids, supervised in _tokenized(records, tokenizer, template):
            lengths.append(len(ids))
            starts.append(_first_target(supervised))
            row = _row(ids[:max_length], supervised[:max_length])
            if supervised_tokens(row) == 0:
                dropped_at.append(where)
                continue
            if len(ids) > max_length:
                truncated_at.append(where)
            rows.append(row)
        if not rows:
            raise ValueError(
                f"a data set needs at least one supervised token; of {len(records)} records, from {records[0][0]} on, "
                f"none has one within max_length={max_length} (the first response starts at token {min(starts)}). "
                f"Raise `max_length` above it, or shorten the prompts."
            )
        n_tokens = sum(len(row.input_ids) for row in rows)
        longest_row = max(len(row.input_ids) for row in rows)
        self.pad_id = pad_id(tokenizer)
        if pack:
            bins = first_fit_decreasing([len(row.input_ids) for row in rows], capacity=max_length)
            rows = [packed([rows[i] for i in items]) for items in bins]
            self.length = max_length
        else:
            self.length = min(max_length, -(-longest_row // _MULTIPLE) * _MULTIPLE)
        self._rows = rows
        self.stats = Stats(
            records=len(records),
            rows=len(rows),
            tokens=n_tokens,
            supervised_tokens=sum(map(supervised_tokens, rows)),
            truncated=len(truncated_at),
            dropped=len(dropped_at),
            padding_efficiency=n_tokens / (len(rows) * self.length),
            longest=max(lengths),
            truncated_at=tuple(truncated_at),
            dropped_at=tuple(dropped_at),
        )

    def digest(self) -> str:
        """SHA-256 that tells whether this is the same data: of every row's tokens and labels."""
        sha = hashlib.sha256()
        for row in self._rows:
            sha.update(np.int32(len(row.input_ids)).tobytes() + row.input_ids.tobytes() + row.labels.tobytes())
        return sha.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def largest_id(self) -> int:
        """The largest token id of all rows."""
        return max(int(row.input_ids.max()) for row in self._rows)

    def row(self, index: int) -> Row:
        """Row `index`: a record, or several when packed.

        Raises:
            IndexError: `index` is not in 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in 0..{len(self) - 1}; got {index}.")
        return self._rows[index]


def _tokenized(
    records: Sequence[tuple[str, Record]], tokenizer: Tokenizer, template: str
) -> Iterator[tuple[str, list[int], list[bool]]]:
    bos = added_bos(tokenizer)
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        stop = start + _RECORDS_AT_ONCE
        group = [(where, _render(where, record, tokenizer, template)) for where, record in records[start:stop]]
        encoded = iter(encode_many(tokenizer, [text for _, pieces in group for text, _ in pieces]))
        for where, pieces in group:
            ids, supervised = assemble([(next(encoded), flag) for _, flag in pieces], bos=bos)
            yield where, ids, supervised


def _render(where: str, record: Record, tokenizer: Tokenizer, template: str) -> list[Piece]:
    try:
        return render(record, tokenizer, template=template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _first_target(supervised: list[bool]) -> int:
    return supervised.index(True) if True in supervised else len(supervised)


def _row(ids: list[int], supervised: list[bool]) -> Row:
    input_ids = np.asarray(ids, np.int32)
    labels = np.where(np.asarray(supervised, bool), input_ids, np.int32(IGNORED))
    labels[:1] = IGNORED  # nothing predicts it
    return Row(input_ids, labels)
