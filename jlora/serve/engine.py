"""The thread that owns the device: prompts go in, tokens come out, as many rows at a time as there are slots."""

import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jlora._typing import Params
from jlora.generation import Drawn, Draws, fill, new_cache, step
from jlora.lora import is_stacked
from jlora.models import Model
from jlora.serve.schedule import End, Row, Schedule, Token
from jlora.tree.paths import flatten
from jlora.weight import is_adapted

_PIECE = {"cpu": 64}
_PIECE_ELSEWHERE = 256
"""Tokens of a prompt that are computed at once, between two steps of the rows that are further: a step waits for no more. One
width, so that one program serves prompts of all lengths."""


class Stopped(Exception):
    """The engine takes no more rows."""


class Engine:
    """Generates the answers of rows that come and go.

    A row's tokens depend on its own prompt and settings alone, to the bit: the programs have one shape, whatever is in the other
    slots. They are those of `jlora.generate` with the same settings, up to the rounding of products of other shapes.

    Args:
        model, params: in the form for decoding of so many rows (`for_decoding`); adapters side by side, or none.
        slots: rows at a time.
        max_length: positions of a row, prompt and answer together; the cache holds `slots` times as many.
        queue: rows that may wait for a slot.
        clock: seconds, by which deadlines are.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        slots: int,
        max_length: int,
        queue: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_length, self.vocab_size = max_length, model.config.vocab_size
        self.slots, self.queue = slots, queue
        self.steps = 0
        """Taken so far, of all rows at once."""
        self.failure: BaseException | None = None
        """What ended the thread, if it was no `stop`."""
        self._model, self._params = model, params
        self._routes = any(is_adapted(leaf) and leaf.adapters for leaf in flatten(params).values())
        self._clock = clock
        self._piece = min(_PIECE.get(jax.default_backend(), _PIECE_ELSEWHERE), max_length)
        self._cache = new_cache(model, slots, max_length, is_stacked(params))
        self._schedule = Schedule(slots=slots, queue=queue)
        self._changed = threading.Condition()
        """Held by whoever reads or changes the schedule, which is the engine's thread and those that submit."""
        self._stopping = self._draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> int:
        with self._changed:
            return len(self._schedule.running)

    @property
    def waiting(self) -> int:
        with self._changed:
            return len(self._schedule.waiting)

    @property
    def accepts(self) -> bool:
        return not self._draining and self.failure is None

    def start(self) -> None:
        """Starts the thread. The programs are compiled here, before the first request."""
        self.warm()
        self._thread.start()

    def warm(self) -> None:
        """Runs both programs on nothing, so that they are compiled."""
        self._fill(Row(prompt=[0], max_new_tokens=1, slot=0))
        self._step([None] * self.slots)

    def submit(self, rows: Sequence[Row]) -> None:
        """Takes rows in, all or none; `Row.tell` hears of each.

        Raises:
            QueueFull: there is no room now.
            Stopped: the engine takes none any more.
        """
        with self._changed:
            if not self.accepts:
                raise Stopped
            self._schedule.add(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these any more: their slots are free after the piece or step that is being computed."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._changed.notify()

    def drain(self) -> None:
        """Takes no more rows, and ends those that wait; those that run go on."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends every row after the piece or step that is being computed, and the thread."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self.turn()
        except BaseException as error:
            self.failure = error
        finally:
            self._draining = self._stopping = True
            with self._changed:
                self._leave({row: "stopping" for row in self._schedule.rows})

    def _wait(self) -> bool:
        """Until there is something to do; whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._schedule.rows)
            return not self._stopping

    def turn(self) -> None:
        """Lets go who is to leave; then a piece of one prompt, and a step of all that have theirs behind them."""
        with self._changed:
            self._leave({row: end for row in self._schedule.rows if (end := self._ending(row)) is not None})
            filling = self._schedule.to_fill()
        if filling is not None:
            self._tell([filling], self._fill(filling))
        with self._changed:
            speaking = [None if row is None or row.is_filling else row for row in self._schedule.slots]
        if any(speaking):
            self._tell(speaking, self._step(speaking))
            self.steps += 1

    def _ending(self, row: Row) -> End | None:
        """Why a row is to leave before its next token."""
        if row.cancelled:
            return "cancelled"
        if self._draining and row.slot is None:
            return "stopping"
        return "timeout" if self._clock() > row.deadline else None

    def _fill(self, row: Row) -> Drawn:
        """The next piece of a row's prompt."""
        piece = row.prompt[row.filled : row.filled + self._piece]
        ids = np.zeros((1, self._piece), np.int32)
        ids[0, : len(piece)] = piece
        start, count, slot = (np.array(n, np.int32) for n in (row.filled, len(piece), row.slot))
        drawn, self._cache = fill(
            self._model, self._params, self._cache, ids, start, count, slot, self._adapters([row]), self._draws([row]),
            _informs([row]),
        )  # fmt: skip
        row.filled += len(piece)
        return jax.device_get(drawn)

    def _step(self, rows: Sequence[Row | None]) -> Drawn:
        """The next token of each row, slot by slot."""
        tokens = [0 if row is None else row.last for row in rows]
        positions = [self.max_length if row is None else row.position for row in rows]
        drawn, self._cache = step(
            self._model, self._params, self._cache, np.array(tokens, np.int32), np.array(positions, np.int32),
            self._adapters(rows), self._draws(rows), _informs(rows),
        )  # fmt: skip
        return jax.device_get(drawn)

    def _adapters(self, rows: Sequence[Row | None]) -> np.ndarray | None:
        return np.array([-1 if row is None else row.adapter for row in rows], np.int32) if self._routes else None

    def _draws(self, rows: Sequence[Row | None]) -> Draws:
        how = [
            _ANYHOW
            if row is None
            else (row.seed, row.index, row.drawn, row.temperature, row.top_k or self.vocab_size, row.top_p)
            for row in rows
        ]
        return Draws(*(np.array(column, dtype) for column, dtype in zip(zip(*how, strict=True), _DTYPES, strict=True)))

    def _tell(self, rows: Sequence[Row | None], drawn: Drawn) -> None:
        """Each row hears of its token, and leaves if that was its last."""
        ended: dict[Row, End] = {}
        for place, row in enumerate(rows):
            if row is None:
                continue
            if not drawn.sound[place]:
                ended[row] = "unsound"
            elif not row.is_filling:
                token = int(drawn.tokens[place])
                row.last, row.drawn = token, row.drawn + 1
                row.tell(_token(row, token, drawn, place))
                if token in row.stops:
                    ended[row] = "stop"
                elif row.drawn == row.max_new_tokens:
                    ended[row] = "length"
        with self._changed:
            self._leave(ended)

    def _leave(self, ended: dict[Row, End]) -> None:
        self._schedule.leave(ended)
        for row, end in ended.items():
            row.tell(end)


_DTYPES = (np.uint32, np.int32, np.int32, np.float32, np.int32, np.float32)
"""Of the fields of `Draws`."""
_ANYHOW = (0, 0, 0, 0.0, 1, 1.0)
"""How an idle row draws, whose token nobody reads."""


def _informs(rows: Sequence[Row | None]) -> np.bool_:
    return np.bool_(any(row is not None and row.alternatives is not None for row in rows))


def _token(row: Row, token: int, drawn: Drawn, place: int) -> Token:
    if row.alternatives is None:
        return Token(token)
    count = slice(0, row.alternatives)
    top = zip(drawn.top_tokens[place][count].tolist(), drawn.top_logprobs[place][count].tolist(), strict=True)
    return Token(token, float(drawn.logprobs[place]), tuple(top))
