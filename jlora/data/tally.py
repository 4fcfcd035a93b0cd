"""What becomes of records on their way to rows, counted while they pass."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from jlora._typing import JsonObject
from jlora.data.rows import Row, supervised_tokens
from jlora.data.stats import Stats

_PLACES = 10_000
"""Of one kind, at most so many are named: the memory that they take is bounded."""


@dataclass(kw_only=True)
class Tally:
    """Counts of a data set in the making; its fields are as JSON has them.

    targets: supervised tokens.
    longest: tokens of the longest record before truncation; longest_row: after it.
    largest: the largest token.
    first: where the first record stands; starts: where the earliest response starts.
    counts, places: by the names of `Stats`.
    """

    records: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0
    longest_row: int = 0
    largest: int = 0
    first: str = ""
    starts: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def note(self, what: str, where: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if len(places := self.places.setdefault(what, [])) < _PLACES:
            places.append(where)

    def record(self, where: str, left_out: Sequence[str]) -> None:
        self.first = self.first or where
        self.records += 1
        for name in left_out:
            self.left_out[name] = self.left_out.get(name, 0) + 1

    def row(self, where: str, row: Row, *, tokens: int, start: int) -> bool:
        """Whether a row, of a text with so many tokens whose response starts there, has something to learn."""
        self.longest = max(self.longest, tokens)
        self.starts = start if self.starts is None else min(self.starts, start)
        targets = supervised_tokens(row)
        if not targets:
            self.note("dropped", where)
            return False
        if tokens > len(row.input_ids):
            self.note("truncated", where)
        self.rows += 1
        self.tokens += len(row.input_ids)
        self.targets += targets  # as many once packed: the first label of a row never counts
        self.longest_row = max(self.longest_row, len(row.input_ids))
        self.largest = max(self.largest, int(row.input_ids.max()))
        return True

    def stats(self, *, rows: int, length: int) -> Stats:
        """Of the rows, packed or not, of a data set of this width."""
        places = {kind: tuple(self.places.get(kind, ())) for kind in self.counts}
        return Stats(
            records=self.records,
            rows=rows,
            tokens=self.tokens,
            supervised_tokens=self.targets,
            padding_efficiency=self.tokens / (rows * length),
            longest=self.longest,
            left_out=tuple(Counter(self.left_out).most_common()),
            truncated=self.counts.get("truncated", 0),
            dropped=self.counts.get("dropped", 0),
            straddled=self.counts.get("straddled", 0),
            empty=self.counts.get("empty", 0),
            apart=self.counts.get("apart", 0),
            truncated_at=places.get("truncated", ()),
            dropped_at=places.get("dropped", ()),
            straddled_at=places.get("straddled", ()),
            empty_at=places.get("empty", ()),
            apart_at=places.get("apart", ()),
        )

    def to_json(self) -> JsonObject:
        return asdict(self)
