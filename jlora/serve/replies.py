"""OpenAI's response objects: an answer whole, or in chunks.

Reference: https://platform.openai.com/docs/api-reference/chat/object, …/chat-streaming, …/completions/object.
"""

import abc
import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import ClassVar

from jlora._typing import JsonObject
from jlora.serve.exchange import Answer, Piece
from jlora.serve.schedule import Token
from jlora.serve.text import TokenTexts


@dataclasses.dataclass
class Replies(abc.ABC):
    """Of one request."""

    ID: ClassVar[str]
    """What ids begin with."""

    model: str
    texts: TokenTexts
    alternatives: int | None
    """As in `Request`."""
    prefixes: Sequence[str]
    """What stands before each answer: the prompt where it is to be echoed, else ""."""

    def __post_init__(self):
        self._head = {"id": f"{self.ID}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}

    def opening(self, choice: int) -> JsonObject | None:
        """The chunk before those of an answer; None: there is none."""
        return None

    @abc.abstractmethod
    def chunk(self, piece: Piece) -> JsonObject:
        """What is new of an answer."""

    @abc.abstractmethod
    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """The last chunk, where it was asked for."""

    @abc.abstractmethod
    def whole(self, pieces: Sequence[Piece], usage: JsonObject) -> JsonObject:
        """All at once."""


def usage_of(answers: Sequence[Answer], n: int) -> JsonObject:
    """Tokens of the prompts, each of which counts once for its `n` answers, and of the answers."""
    prompts, completions = sum(len(a.row.prompt) for a in answers[::n]), sum(a.count for a in answers)
    return {"prompt_tokens": prompts, "completion_tokens": completions, "total_tokens": prompts + completions}


@dataclasses.dataclass
class ChatReplies(Replies):
    ID = "chatcmpl"

    def opening(self, choice):
        return self._chunk([_delta(choice, {"role": "assistant", "content": ""}, None, None)])

    def chunk(self, piece):
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk([_delta(piece.choice, delta, self._logprobs(piece.tokens), piece.finish)])

    def usage_chunk(self, usage):
        return self._chunk([]) | {"usage": usage}

    def whole(self, pieces, usage):
        choices = []
        for index in range(len(self.prefixes)):
            text, tokens, finish = _joined(pieces, index)
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = self._logprobs(tokens)
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(self, choices: list[JsonObject]) -> JsonObject:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> JsonObject | None:
        if self.alternatives is None:
            return None
        content = [
            self._entry(t.id, t.logprob) | {"top_logprobs": [self._entry(*other) for other in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> JsonObject:
        text, raw = self.texts[token]
        return {"token": text, "logprob": logprob, "bytes": raw}


@dataclasses.dataclass
class CompletionReplies(Replies):
    ID = "cmpl"

    def __post_init__(self):
        super().__post_init__()
        self._offsets = [0] * len(self.prefixes)
        self._echoed = [False] * len(self.prefixes)

    def chunk(self, piece):
        return self._object([self._choice(piece.choice, piece.text, piece.tokens, piece.finish)])

    def usage_chunk(self, usage):
        return self._object([]) | {"usage": usage}

    def whole(self, pieces, usage):
        choices = [self._choice(index, *_joined(pieces, index)) for index in range(len(self.prefixes))]
        return self._object(choices) | {"usage": usage}

    def _object(self, choices: list[JsonObject]) -> JsonObject:
        return self._head | {"object": "text_completion", "choices": choices}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> JsonObject:
        logprobs = self._logprobs(index, tokens)
        if not self._echoed[index]:
            text, self._echoed[index] = self.prefixes[index] + text, True
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> JsonObject | None:
        if self.alternatives is None:
            return None
        offsets, texts = [], []
        for token in tokens:
            texts.append(self.texts[token.id][0])
            offsets.append(self._offsets[index])
            self._offsets[index] += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.texts[i][0]: logprob for i, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }


def _delta(index: int, delta: JsonObject, logprobs: JsonObject | None, finish: str | None) -> JsonObject:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _joined(pieces: Sequence[Piece], choice: int) -> tuple[str, list[Token], str | None]:
    own = [piece for piece in pieces if piece.choice == choice]
    tokens = [token for piece in own for token in piece.tokens]
    return "".join(piece.text for piece in own), tokens, own[-1].finish if own else None
