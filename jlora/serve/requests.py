"""What a request may say: OpenAI's parameters as tables, each other one refused by its name."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jlora._numbers import MAX_COUNT, MAX_SEED
from jlora._typing import Json, JsonObject
from jlora.generation import ALTERNATIVES
from jlora.serve.errors import Refused
from jlora.storage.fields import (
    Kind,
    either,
    flag,
    integer,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    shown,
    text,
    wrong_fields,
)  # fmt: skip

COMPLETION_TOKENS = 16
"""Of a completion that does not say how many, as OpenAI has it; an answer in a chat goes on as long as there is room."""
STOPS = 4
"""Stop strings of a request, at most."""
_FEW_ALTERNATIVES = 5
"""Of a completion's token, at most; as OpenAI has it."""

_TEMPERATURE = either(one_of(0, 0.0), number(1e-6, 2))._replace(says="0 or a number from 1e-06 to 2")
_STOP = either(text(), list_of(text()))._replace(
    says=f"a text or a list of at most {STOPS} texts, none of them empty",
    holds=lambda v: bool(v) if isinstance(v, str) else _are_stops(v),
)
_TOKENS = list_of(integer(0, MAX_COUNT), least=1)
_PROMPT = Kind(
    "a text, a list of texts, a list of token ids or a list of such lists",
    either(text(), list_of(text(), least=1), _TOKENS, list_of(_TOKENS, least=1)).holds,
)

_OF_BOTH: Mapping[str, Kind] = {
    "model": text(),
    "stream": optional(flag()),
    "stream_options": optional(mapping_of(optional(flag()))),
    "temperature": optional(_TEMPERATURE),
    "top_p": optional(number(0, 1)),
    "top_k": optional(integer(0, MAX_COUNT)),
    "seed": optional(integer(0, MAX_SEED)),
    "n": optional(integer(1, 128)),
    "stop": optional(_STOP),
    "max_tokens": optional(integer(1, MAX_COUNT)),
    "ignore_eos": optional(flag()),
}
"""`top_k` and `ignore_eos` are vLLM's."""
_OF_CHATS: Mapping[str, Kind] = {
    "messages": list_of(mapping_of(Kind("anything", lambda _: True)), least=1)._replace(says="a list of messages"),
    "max_completion_tokens": optional(integer(1, MAX_COUNT)),
    "logprobs": optional(flag()),
    "top_logprobs": optional(integer(0, ALTERNATIVES)),
}
_OF_COMPLETIONS: Mapping[str, Kind] = {
    "prompt": _PROMPT,
    "logprobs": optional(integer(0, _FEW_ALTERNATIVES)),
    "echo": optional(flag()),
}
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Say nothing of the answer."""
_NEUTRAL: Mapping[str, Sequence[Json]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "min_p": (0,),
    "best_of": (1,), "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "service_tier": ("auto", "default"), "store": (False,), "web_search_options": (),
}  # fmt: skip
"""OpenAI's and vLLM's parameters that are not computed here -> the values with which they change nothing, beside null."""
_ROLES = ("system", "developer", "user", "assistant")
_PARTS = {"type": one_of("text"), "text": text()}


class Sampling(NamedTuple):
    """How to draw, as far as the request says."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request that is as it must be."""

    model: str
    chat: bool
    messages: tuple[JsonObject, ...] = ()
    """Of a chat: `role` and `content`, texts."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Of a completion."""
    sampling: Sampling
    max_tokens: int | None
    """None: as many as there is room for."""
    stop: tuple[str, ...]
    ignore_eos: bool
    n: int
    """Answers to each prompt."""
    alternatives: int | None
    """Give the log-probability of each token, and of so many of the likeliest; None: none."""
    echo: bool
    stream: bool
    include_usage: bool


def parse(body: bytes, *, chat: bool) -> Request:
    """The request in a body.

    Raises:
        Refused: with the parameter that is to blame.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body must be JSON in UTF-8; {error}.") from None
    if not isinstance(fields, dict):
        raise Refused(f"The body must be a JSON object; got {shown(fields)}.")
    table = {**_OF_BOTH, **(_OF_CHATS if chat else _OF_COMPLETIONS)}
    required = ("model", "messages" if chat else "prompt")
    for name, value in fields.items():
        _check(name, value, table)
    for name in required:
        if name not in fields:
            raise Refused(f"`{name}` is missing; it must be {table[name].says}.", param=name)
    given = {name: value for name, value in fields.items() if value is not None}
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise Refused(
            "Give `max_completion_tokens` or `max_tokens`, which is its old name, not both.", param="max_tokens"
        )
    options = given.get("stream_options", {})
    unknown = next((name for name in options if name not in ("include_usage", "include_obfuscation")), None)
    if unknown is not None:
        raise Refused(f"`stream_options.{unknown}` is not known; there is `include_usage`.", param="stream_options")
    stream = given.get("stream", False)
    if options and not stream:
        raise Refused("`stream_options` needs `stream`: true.", param="stream_options")
    stop = given.get("stop", ())
    limit = given.get("max_completion_tokens", given.get("max_tokens", None if chat else COMPLETION_TOKENS))
    return Request(
        model=given["model"],
        chat=chat,
        messages=tuple(_message(i, m) for i, m in enumerate(given["messages"])) if chat else (),
        prompts=() if chat else _prompts(given["prompt"]),
        sampling=Sampling(*(given.get(name) for name in Sampling._fields)),
        max_tokens=limit,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=given.get("ignore_eos", False),
        n=given.get("n", 1),
        alternatives=_alternatives(given) if chat else given.get("logprobs"),
        echo=_echo(given),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
    )


def _check(name: str, value: Json, table: Mapping[str, Kind]) -> None:
    """
    Raises:
        Refused: for a parameter that there is none of, or that holds what it must not.
    """
    for wrong in wrong_fields({name: value}, table):
        raise Refused(wrong, param=name)
    if name in table or name in _WITHOUT_EFFECT:
        return
    if name not in _NEUTRAL:
        raise Refused(
            f"{shown(name)} is no parameter of this request. Leave it out.", param=name, code="unknown_parameter"
        )
    # 0 is not False here, but 0.0 is 0.
    if value is not None and not any(
        value == v and isinstance(value, bool) == isinstance(v, bool) for v in _NEUTRAL[name]
    ):
        raise Refused(
            f"`{name}` is not supported; got {shown(value)}. Leave it out.", param=name, code="unsupported_parameter"
        )


def _are_stops(value: Json) -> bool:
    return isinstance(value, list) and len(value) <= STOPS and all(isinstance(v, str) and v for v in value)


def _alternatives(given: JsonObject) -> int | None:
    if given.get("logprobs"):
        return given.get("top_logprobs", 0)
    if given.get("top_logprobs"):
        raise Refused("`top_logprobs` needs `logprobs`: true.", param="top_logprobs")
    return None


def _echo(given: JsonObject) -> bool:
    if given.get("echo") and "logprobs" in given:
        raise Refused(
            "`echo` does not go together with `logprobs`: those of a prompt are not computed. Leave one out.",
            param="echo",
        )
    return given.get("echo", False)


def _prompts(given: Json) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(given, str):
        return (given,)
    if isinstance(given[0], int):
        return (tuple(given),)
    return tuple(one if isinstance(one, str) else tuple(one) for one in given)


def _message(index: int, message: JsonObject) -> JsonObject:
    """Of role and text."""
    where = f"messages[{index}]"
    further = next((name for name in message if name not in ("role", "content") and message[name] is not None), None)
    if further is not None:
        raise Refused(
            f"`{where}.{further}` is not supported; a message here has `role` and `content`. Leave it out.",
            param="messages",
        )
    if message.get("role") not in _ROLES:
        raise Refused(
            f"`{where}.role` must be one of {', '.join(_ROLES)}; got {shown(message.get('role'))}.", param="messages"
        )
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and not [*_wrong_part(p)] for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused(
            f"`{where}.content` must be text, or a list of parts of the type text; got {shown(content)}.",
            param="messages",
        )
    return {"role": message["role"], "content": content}


def _wrong_part(part: JsonObject):
    return wrong_fields(part, _PARTS, required=tuple(_PARTS))
