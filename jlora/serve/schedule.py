"""Which row of the cache computes what: slots and a bounded queue, without a model, a thread or a clock."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

End: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "stopping", "unsound"]
"""Why a row gets no more tokens: a token that ends the text, all tokens that were asked for, nobody waits any more, its time is
over, the server stops, its logits were not finite."""


class Token(NamedTuple):
    """One token of an answer."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there and their log-probabilities, as many as were asked for."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Row:
    """One answer to be generated. All but what stands below `tell` is as it was asked for."""

    prompt: Sequence[int]
    """At least one token id."""
    max_new_tokens: int
    adapter: int = -1
    """In the order of the parameters' adapters; -1: the base alone."""
    stops: frozenset[int] = frozenset()
    """Token ids that end the text."""
    temperature: float = 0.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    seed: int = 0
    index: int = 0
    """The row's index in the call of `generate` that would give the same."""
    alternatives: int | None = None
    """Give the log-probability of each token, and of so many of the likeliest; None: not even its own."""
    deadline: float = float("inf")
    """On the engine's clock."""
    tell: Callable[[Token | End], None] = lambda _: None
    """Called for each token and once for the end, by the engine's thread: must not wait."""

    number: int = 0
    """In the order of arrival."""
    slot: int | None = None
    """None: it waits."""
    filled: int = 0
    """Tokens of the prompt that are in the cache."""
    drawn: int = 0
    """Tokens of the answer so far."""
    last: int = 0
    """The last one of them."""
    cancelled: bool = False

    @property
    def is_filling(self) -> bool:
        return self.filled < len(self.prompt)

    @property
    def position(self) -> int:
        """Of the last token."""
        return len(self.prompt) + self.drawn - 1


class QueueFull(Exception):
    """There is no room for more rows now."""


class Schedule:
    """Rows in order of arrival: the first so many have a slot, others wait. A slot that is left is given away at once."""

    def __init__(self, *, slots: int, queue: int):
        """
        Args:
            slots: rows at a time.
            queue: rows that may wait.
        """
        self.slots: list[Row | None] = [None] * slots
        self.waiting: collections.deque[Row] = collections.deque()
        self._queue = queue
        self._numbers = itertools.count()

    def add(self, rows: Sequence[Row]) -> None:
        """All of them or none.

        Raises:
            QueueFull: when they are more than may wait.
        """
        if len(self.waiting) + len(rows) > self._queue + self.slots.count(None):
            raise QueueFull
        for row in rows:
            row.number = next(self._numbers)
        self.waiting += rows
        self._place()

    def leave(self, gone: Iterable[Row]) -> None:
        """Takes rows out, from their slots or out of the queue."""
        for row in gone:
            if row.slot is None:
                self.waiting.remove(row)
            else:
                self.slots[row.slot] = None
        self._place()

    def _place(self) -> None:
        for slot, row in enumerate(self.slots):
            if row is None and self.waiting:
                self.slots[slot] = found = self.waiting.popleft()
                found.slot = slot

    @property
    def running(self) -> list[Row]:
        """Those that have a slot."""
        return [row for row in self.slots if row is not None]

    @property
    def rows(self) -> list[Row]:
        return [*self.running, *self.waiting]

    def to_fill(self) -> Row | None:
        """The row whose prompt is next: of those with a slot, the one that came first."""
        return min((row for row in self.running if row.is_filling), key=lambda row: row.number, default=None)
