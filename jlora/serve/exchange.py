"""A request on its way: its rows in the engine, and what comes back of them in the event loop."""

import asyncio
import dataclasses
import functools
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from jlora.serve.engine import Engine, Stopped
from jlora.serve.errors import cut_short, failed, queue_full, stopping
from jlora.serve.schedule import End, QueueFull, Row, Token
from jlora.serve.text import Text, Told
from jlora.serve.voices import Voice


class Piece(NamedTuple):
    """What is new of one answer."""

    choice: int
    text: str
    tokens: tuple[Token, ...]
    """Whose text this is or begins."""
    finish: str | None
    """OpenAI's `finish_reason`, with the last piece."""


@dataclasses.dataclass
class Answer:
    """One answer as it grows."""

    choice: int
    row: Row
    text: Text
    count: int = 0
    """Tokens, with the one that ends it."""
    _untold: list[Token] = dataclasses.field(default_factory=list)

    def hear(self, event: Token | End) -> Piece:
        """
        Raises:
            Refused: when it was cut short.
        """
        if isinstance(event, Token):
            self.count += 1
            if event.id in self.row.stops:  # it has no text, and the end follows
                return Piece(self.choice, "", (), None)
            self._untold.append(event)
            told = self.text.add(event.id)
            return self._piece(told, "stop" if self.text.stopped else None)
        if event not in ("stop", "length"):
            raise cut_short(event)
        told = self.text.rest()
        return self._piece(told, "stop" if self.text.stopped else event)

    def _piece(self, told: Told, finish: str | None) -> Piece:
        tokens, self._untold = self._untold[: told.tokens], self._untold[told.tokens :]
        return Piece(self.choice, told.text, tuple(tokens), finish)


class Exchange:
    """The answers to one request.

    What the client has not taken yet waits in memory, never more than the tokens that were asked for; the engine waits for nobody.
    """

    def __init__(self, engine: Engine, voice: Voice, rows: Sequence[Row], stop: Sequence[str]):
        """Submits the rows.

        Raises:
            Refused: there is no room for them.
        """
        self._engine, self._rows = engine, rows
        self._events: asyncio.Queue[tuple[int, Token | End]] = asyncio.Queue()
        self.answers = [Answer(i, row, Text(voice.tokenizer, row.prompt, stop)) for i, row in enumerate(rows)]
        loop = asyncio.get_running_loop()
        for i, row in enumerate(rows):
            row.tell = functools.partial(_pass_on, loop, self._events, i)
        try:
            engine.submit(rows)
        except QueueFull:
            raise queue_full() from None
        except Stopped:
            raise (stopping() if engine.failure is None else failed()) from None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What comes, until all answers are finished. Whoever leaves before cancels the rest.

        Raises:
            Refused: when an answer was cut short.
        """
        running = set(range(len(self._rows)))
        try:
            while running:
                choice, event = await self._events.get()
                if choice not in running:
                    continue
                if event == "stopping" and self._engine.failure is not None:
                    raise failed()
                piece = self.answers[choice].hear(event)
                if piece.finish is not None:
                    running.discard(choice)
                    self._engine.cancel([self._rows[choice]])  # a stop string is found here, not there
                if piece.text or piece.tokens or piece.finish is not None:
                    yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        self._engine.cancel(self._rows)


def _pass_on(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, choice: int, event: Token | End) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, (choice, event))
