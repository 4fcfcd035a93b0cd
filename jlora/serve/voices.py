"""Who answers under which name: the base and each adapter, and how their prompts are written."""

import dataclasses
from collections.abc import Mapping

from jlora._typing import PretrainedTokenizer
from jlora.data import prompt_ids, require_text
from jlora.data.columns import put_system
from jlora.data.prompts import text_ids
from jlora.serve.errors import Refused
from jlora.serve.requests import Request

ALPACA = "alpaca"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voice:
    """A model name of the interface."""

    name: str
    adapter: int
    """Its number in the engine; -1: the base."""
    tokenizer: PretrainedTokenizer
    stops: frozenset[int]
    """Token ids that end an answer."""
    template: str | None = None
    """In which chats are written; None: there is none, and only texts are continued."""
    system: str | None = None
    """The system prompt of a chat that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All model names; the first is the base's."""

    by_name: Mapping[str, Voice]
    max_length: int
    """Tokens of a prompt and its answer together."""
    vocab_size: int

    def named(self, name: str) -> Voice:
        """
        Raises:
            Refused: there is no such model.
        """
        if name not in self.by_name:
            raise Refused(
                f"There is no model {name!r}; there are {', '.join(map(repr, self.by_name))}.",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self.by_name[name]

    def encode(self, request: Request) -> list[list[int]]:
        """The prompts of a request in tokens, `request.n` of each.

        Raises:
            Refused: for one that cannot be written in tokens, or leaves no room for the answer.
        """
        voice, what = self.named(request.model), "messages" if request.chat else "prompt"
        try:
            given = [request.messages] if request.chat else request.prompts
            prompts = [_encoded(voice, one) for one in given]
        except ValueError as error:
            raise Refused(f"{error}".rstrip(".") + ".", param=what) from error
        for ids in prompts:
            self._check(ids, request, what)
        return [ids for ids in prompts for _ in range(request.n)]

    def _check(self, ids: list[int], request: Request, what: str) -> None:
        beyond = next((i for i in ids if i >= self.vocab_size), None)
        if beyond is not None:
            raise Refused(
                f"Token ids must be in 0..{self.vocab_size - 1}; the prompt has {beyond}, for which the model's embedding has no "
                "row.", param=what,
            )  # fmt: skip
        asked = 1 if request.max_tokens is None else request.max_tokens
        if len(ids) + asked > self.max_length:
            answer = "at least one" if request.max_tokens is None else f"{asked}"
            raise Refused(
                f"A prompt and its answer have room for {self.max_length} tokens together; the prompt has {len(ids)} and the "
                f"answer {answer}. Shorten the prompt, ask for fewer tokens, or serve with a greater --max-length.",
                param=what, code="context_length_exceeded",
            )  # fmt: skip


def _encoded(voice: Voice, prompt: str | tuple) -> list[int]:
    """
    Raises:
        ValueError: as `prompt_ids`.
    """
    if isinstance(prompt, str):
        require_text(prompt)
        return text_ids(voice.tokenizer, prompt)
    if isinstance(prompt[0], int):
        return list(prompt)
    messages = [dict(message) for message in prompt]
    for message in messages:
        require_text(message["content"])
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message must not be the assistant's, whose turn it is. Remove it")
    if voice.template is None:
        raise ValueError(
            f"{voice.name!r} continues texts: it has no chat template and was not trained on chats. Use /v1/completions"
        )
    if voice.template == ALPACA:
        if len(messages) > 1:
            raise ValueError(
                f"{voice.name!r} was trained on single instructions (the template alpaca); got {len(messages)} messages. Send one "
                "of the user's"
            )
        return prompt_ids({"instruction": messages[0]["content"]}, voice.tokenizer, template=ALPACA)
    record = {"messages": messages}
    if voice.system is not None:
        put_system(record, voice.system)
    return prompt_ids(record, voice.tokenizer, template=voice.template)
