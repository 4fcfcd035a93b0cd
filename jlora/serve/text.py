"""The text of an answer as its tokens come: whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from jlora._typing import Tokenizer
from jlora.data import Continued, continuation


class StopStrings:
    """Text up to the first of some strings, wherever the pieces that it comes in are cut.

    What may be the beginning of one of them is held back until it is clear.

    >>> found = StopStrings(["END"])
    >>> [found.add(piece) for piece in ("one E", "X two EN", "D three")], found.hit
    (['one ', 'EX two ', ''], True)
    """

    def __init__(self, strings: Sequence[str]):
        self._strings, self._held, self.hit = strings, "", False

    def add(self, text: str) -> str:
        """What of the text can be told now."""
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.hit = True
            told, self._held = self._held[: min(places)], ""
            return told
        return self._tell(len(self._held) - self._open())

    def rest(self) -> str:
        """What is held back when no more text comes."""
        return self._tell(len(self._held))

    def _open(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        ends = (self._held[-size:] for size in range(min(longest, len(self._held)), 0, -1))
        return next((len(end) for end in ends if any(string.startswith(end) for string in self._strings)), 0)

    def _tell(self, size: int) -> str:
        told, self._held = self._held[:size], self._held[size:]
        return told


class Told(NamedTuple):
    """What tokens add to an answer."""

    text: str
    tokens: int
    """How many more of its tokens have a share in the text that was told up to here."""


class Text:
    """The text of one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self._continued, self._stops = Continued(tokenizer, prompt), StopStrings(stops)
        self._ends: list[int] = []
        """Characters of the text, stop string and all, before the end of each token."""
        self._made = self._told = self._counted = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stops.hit

    def add(self, token: int) -> Told:
        return self._add(self._continued.add(token), 1)

    def rest(self) -> Told:
        """What is held back when no token follows."""
        last = self._add(self._continued.rest(), 0)
        text = "" if self.stopped else self._stops.rest()
        self._told += len(text)
        left = 0 if self.stopped else len(self._ends) - self._counted
        self._counted += left
        return Told(last.text + text, last.tokens + left)

    def _add(self, text: str, tokens: int) -> Told:
        self._made += len(text)
        self._ends += [self._made] * tokens
        told = self._stops.add(text)
        self._told += len(told)
        before = self._counted
        while self._counted < len(self._ends) and self._begins(self._counted) < self._told:
            self._counted += 1
        return Told(told, self._counted - before)

    def _begins(self, token: int) -> int:
        return self._ends[token - 1] if token else 0


class TokenTexts:
    """Of each token its text by itself and that text in bytes (None: it is a part of a character); special ones have theirs."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        # At the start of a text decoders drop a token's space.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __getitem__(self, token: int) -> tuple[str, list[int] | None]:
        if token not in self._known:
            text = continuation(self._decode, self._before, [token])
            self._known[token] = text, None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return self._known[token]
