"""Where requests are answered: from what was asked to rows of the engine, and from what these say to a reply."""

import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from jlora._numbers import MAX_SEED
from jlora._typing import JsonObject, PretrainedTokenizer
from jlora.generation import Sampling
from jlora.serve.engine import Engine
from jlora.serve.errors import Refused
from jlora.serve.exchange import Exchange, Piece
from jlora.serve.metrics import Metrics
from jlora.serve.replies import ChatReplies, CompletionReplies, Replies, usage_of
from jlora.serve.requests import Request
from jlora.serve.schedule import Row
from jlora.serve.text import TokenTexts
from jlora.serve.voices import Catalogue, Voice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a server."""

    api_key: str | None
    """None: there is none, and only requests to a loopback address are answered."""
    timeout: float
    """Seconds for a request, with its time in the queue and the delivery of the answer."""
    sampling: Sampling
    """Where a request does not say how."""


class Desk:
    """Answers requests with an engine."""

    def __init__(self, engine: Engine, catalogue: Catalogue, settings: Settings, metrics: Metrics):
        self.engine, self.catalogue, self.settings, self.metrics = engine, catalogue, settings, metrics
        # Long texts are encoded beside the event loop, one after the other, and by tokenizers of their own: one of Rust must not be
        # set up for a text while it decodes another.
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")
        self._texts = {name: TokenTexts(voice.tokenizer) for name, voice in catalogue.by_name.items()}
        self._encoding = dataclasses.replace(catalogue, by_name=_apart(catalogue))

    async def take(self, asked: Request, began: float) -> "Ticket":
        """The request, on its way.

        Args:
            began: when it came, on the clock of `time.monotonic`.

        Raises:
            Refused: it cannot be answered, or not now.
        """
        voice = self.catalogue.named(asked.model)
        prompts = await asyncio.get_running_loop().run_in_executor(self._encoder, self._encoding.encode, asked)
        most = self.engine.queue + self.engine.slots
        if len(prompts) > most:
            raise Refused(f"A request may have {most} answers here; this one has {len(prompts)}.", param="n")
        rows = self._rows(asked, voice, prompts, began + self.settings.timeout)
        form = ChatReplies if asked.chat else CompletionReplies
        echoed = [_text_of(voice.tokenizer, ids) if asked.echo else "" for ids in prompts]
        replies = form(voice.name, self._texts[voice.name], asked.alternatives, echoed)
        exchange = Exchange(self.engine, voice, rows, asked.stop)
        self.metrics.prompt_tokens.labels(voice.name).inc(sum(map(len, prompts[:: asked.n])))
        return Ticket(asked, exchange, replies, self.metrics, began)

    def _rows(self, asked: Request, voice: Voice, prompts: Sequence[list[int]], deadline: float) -> list[Row]:
        own, default = asked.sampling, self.settings.sampling
        seed = secrets.randbelow(MAX_SEED + 1) if own.seed is None else own.seed
        top_p = default.top_p if own.top_p is None else own.top_p
        return [
            Row(
                prompt=ids,
                max_new_tokens=asked.max_tokens or self.catalogue.max_length - len(ids),
                adapter=voice.adapter,
                stops=frozenset() if asked.ignore_eos else voice.stops,
                temperature=default.temperature if own.temperature is None else own.temperature,
                top_k=default.top_k if own.top_k is None else own.top_k,
                top_p=max(top_p, _LEAST_TOP_P),
                seed=seed,
                index=index,
                alternatives=asked.alternatives,
                deadline=deadline,
            )
            for index, ids in enumerate(prompts)
        ]


_LEAST_TOP_P = 1e-30
"""OpenAI's 0: the likeliest token alone."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """A request on its way."""

    asked: Request
    exchange: Exchange
    replies: Replies
    metrics: Metrics
    began: float

    async def whole(self) -> JsonObject:
        """
        Raises:
            Refused: when an answer was cut short.
        """
        async with contextlib.aclosing(self._pieces()) as found:
            pieces = [piece async for piece in found]
        return self.replies.whole(pieces, self._usage())

    async def chunks(self) -> AsyncGenerator[JsonObject, None]:
        """
        Raises:
            Refused: when an answer was cut short.
        """
        opened = set()
        async with contextlib.aclosing(self._pieces()) as found:
            async for piece in found:
                if piece.choice not in opened and (opening := self.replies.opening(piece.choice)) is not None:
                    yield opening
                opened.add(piece.choice)
                yield self.replies.chunk(piece)
        if self.asked.include_usage:
            yield self.replies.usage_chunk(self._usage())

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """What comes, counted."""
        first = True
        try:
            async with contextlib.aclosing(self.exchange.pieces()) as found:
                async for piece in found:
                    if first:
                        self.metrics.first_token.observe(time.monotonic() - self.began)
                        first = False
                    yield piece
            self.metrics.seconds.observe(time.monotonic() - self.began)
        finally:
            count = sum(answer.count for answer in self.exchange.answers)
            self.metrics.generated_tokens.labels(self.replies.model).inc(count)

    def _usage(self) -> JsonObject:
        return usage_of(self.exchange.answers, self.asked.n)


def _apart(catalogue: Catalogue) -> dict[str, Voice]:
    """The same voices, whose tokenizers nobody else uses."""
    copies: dict[int, PretrainedTokenizer] = {}
    for voice in catalogue.by_name.values():
        copies.setdefault(id(voice.tokenizer), copy.deepcopy(voice.tokenizer))
    return {n: dataclasses.replace(v, tokenizer=copies[id(v.tokenizer)]) for n, v in catalogue.by_name.items()}


def _text_of(tokenizer: PretrainedTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)
