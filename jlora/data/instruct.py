"""Instruction and chat records as rows, with the loss on the responses."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from jlora._typing import Json, PretrainedTokenizer
from jlora.data.columns import has_empty_answer
from jlora.data.encoding import Encoded, encode_pieces
from jlora.data.layout import MULTIPLE
from jlora.data.packing import first_fit_decreasing, packed
from jlora.data.rows import IGNORED, Row, supervised_tokens
from jlora.data.stats import Stats
from jlora.data.templates import Rendering, rendering
from jlora.data.tokens import added_bos, pad_id

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
        length: the width of a row for each record: the longest, rounded up to a multiple of 8, but at most `max_length`;
            `max_length` itself when packed.
        largest_token: the largest id in any row.
        stats: what became of the records.
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
    ):
        if max_length < 2:
            raise ValueError(f"`max_length` must be >= 2, a token and the one it predicts; got {max_length}. Raise it.")
        records = list(records)
        if not records:
            raise ValueError("a data set needs at least one record; got none. Check the file it was read from.")
        rows, truncated_at, dropped_at, straddled_at, lengths, starts = [], [], [], [], [], []
        targets = 0
        empty_at = tuple(where for where, record in records if has_empty_answer(record))
        left_out = Counter(name for _, record in records for name in getattr(record, "left_out", ()))
        for where, missing, (ids, spans, straddled) in _tokenized(records, tokenizer, template):
            left_out.update(missing)
            straddled_at += [where] * bool(straddled)
            lengths.append(len(ids))
            starts.append(spans[0][0] if spans else len(ids))
            row = _row(ids, spans, max_length)
            n_targets = supervised_tokens(row)
            if n_targets == 0:
                dropped_at.append(where)
                continue
            targets += n_targets  # as many once packed: the first label of a row never counts
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
        self.pad_id, self.fills_rows = pad_id(tokenizer), pack
        if pack:
            bins = first_fit_decreasing([len(row.input_ids) for row in rows], capacity=max_length)
            rows = [packed([rows[i] for i in items]) for items in bins]
            self.length = max_length
        else:
            self.length = min(max_length, -(-longest_row // MULTIPLE) * MULTIPLE)
        self._rows = rows
        self.largest_token = max(int(row.input_ids.max()) for row in rows)
        self.stats = Stats(
            records=len(records),
            rows=len(rows),
            tokens=n_tokens,
            supervised_tokens=targets,
            truncated=len(truncated_at),
            dropped=len(dropped_at),
            padding_efficiency=n_tokens / (len(rows) * self.length),
            longest=max(lengths),
            truncated_at=tuple(truncated_at),
            dropped_at=tuple(dropped_at),
            straddled=len(straddled_at),
            straddled_at=tuple(straddled_at),
            empty=len(empty_at),
            empty_at=empty_at,
            left_out=tuple(left_out.most_common()),
        )

    def digest(self) -> str:
        """SHA-256 that tells whether this is the same data: of every row's tokens and labels."""
        sha = hashlib.sha256()
        for row in self._rows:
            sha.update(np.int32(len(row.input_ids)).tobytes() + row.input_ids.tobytes() + row.labels.tobytes())
        return sha.hexdigest()

    def tokens(self) -> tuple[set[int], set[int]]:
        """The ids in the rows, and those of them that are supervised."""
        used, learned = np.zeros((2, self.largest_token + 1), bool)
        for start in range(0, len(self._rows), _RECORDS_AT_ONCE):
            rows = self._rows[start : start + _RECORDS_AT_ONCE]
            used[np.concatenate([row.input_ids for row in rows])] = True
            labels = np.concatenate([row.labels for row in rows])
            learned[labels[labels != IGNORED]] = True
        return set(np.flatnonzero(used).tolist()), set(np.flatnonzero(learned).tolist())

    def items(self) -> Iterator[bytes]:
        """Of each record its tokens and labels, packed or not: equal where two records are the same to the model."""
        for ids, labels, segments in self._rows:
            starts = [] if segments is None else (np.flatnonzero(np.diff(segments)) + 1).tolist()
            for start, stop in pairwise((0, *starts, len(ids))):
                yield ids[start:stop].tobytes() + labels[start:stop].tobytes()

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """Row `index`: a record, or several when packed.

        Raises:
            IndexError: `index` is not in 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in 0..{len(self) - 1}; got {index}.")
        return self._rows[index]


def _tokenized(
    records: Sequence[tuple[str, Mapping[str, Json]]], tokenizer: PretrainedTokenizer, template: str
) -> Iterator[tuple[str, tuple[str, ...], Encoded]]:
    """Of each record its place, the names of what its text leaves out, and its ids."""
    bos = added_bos(tokenizer)
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        group = records[start : start + _RECORDS_AT_ONCE]
        texts = [_rendering(where, record, tokenizer, template) for where, record in group]
        try:
            rows = list(encode_pieces(tokenizer, [text.pieces for text in texts], bos=bos))
        except ValueError:
            _blame(group, texts, tokenizer, bos)
            raise
        for (where, _), text, row in zip(group, texts, rows, strict=True):
            yield where, text.left_out, row


def _rendering(where: str, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, template: str) -> Rendering:
    try:
        return rendering(record, tokenizer, template=template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _blame(
    group: Sequence[tuple[str, Mapping[str, Json]]],
    texts: Sequence[Rendering],
    tokenizer: PretrainedTokenizer,
    bos: int | None,
) -> None:
    """Name the first record that cannot be encoded, found one by one."""
    for (where, _), text in zip(group, texts, strict=True):
        try:
            list(encode_pieces(tokenizer, [text.pieces], bos=bos))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _row(ids: list[int], spans: list[tuple[int, int]], max_length: int) -> Row:
    input_ids = np.asarray(ids[:max_length], np.int32)
    labels = np.full(len(input_ids), IGNORED, np.int32)
    for start, stop in spans:
        labels[start:stop] = input_ids[start:stop]
    labels[:1] = IGNORED  # nothing predicts it
    return Row(input_ids, labels)
