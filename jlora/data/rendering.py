"""A record as text: its pieces, and which of them the loss is on."""

from typing import Literal, NamedTuple

from jlora.data.encoding import Piece

Supervise = Literal["all", "response", "assistant", "last"]
"""What the loss is on: each answer ("assistant"), those behind the last turn of the user, the last one, or the whole text."""


class Rendering(NamedTuple):
    """A row's text.

    pieces: the text, each piece supervised or not; joined they are the whole.
    left_out: what the record says and the text does not, by name, once each.
    """

    pieces: list[Piece]
    left_out: tuple[str, ...] = ()


class Rewritten(ValueError):
    """A chat template renders a conversation otherwise than it does the beginning of it."""
