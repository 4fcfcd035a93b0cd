"""Conversations: the turns of a record as a chat template gets them, and whether their text holds all they say."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jlora._typing import Json, JsonObject
from jlora.data.turns import THOUGHTS

Message = JsonObject

_CHECKED = ("role", "content", "tool_calls", *THOUGHTS)
_SPACE = "white space around or within content"


class Conversation(NamedTuple):
    """What a chat template is given.

    messages: as in transformers, without keys of which the value is None.
    trained: whether the loss is taken on each, if it is the assistant's.
    tools: JSON schemas, or None.
    variables: further ones of the template (the column `chat_template_kwargs`).
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[JsonObject] | None
    variables: JsonObject

    def until(self, turns: int) -> "Conversation":
        """Its first turns."""
        return self._replace(messages=self.messages[:turns], trained=self.trained[:turns])


def conversation_of(record: Mapping[str, Json]) -> Conversation:
    """Of a record as from `read_records`; instruction columns become turns.

    Raises:
        ValueError: neither turns nor instruction columns.
    """
    turns = record["messages"] if "messages" in record else _of_columns(record)
    messages = [_for_template(turn) for turn in turns]
    trained = [turn.get("train", True) for turn in turns]
    return Conversation(messages, trained, record.get("tools"), record.get("chat_template_kwargs", {}))


def turn_content(message: Message) -> str:
    return message.get("content") or ""


def left_out_of(conversation: Conversation, whole: str, source: str, *, forgets: bool = False) -> tuple[str, ...]:
    """Names of what the turns say and their rendering does not, where it is no more than a label.

    Args:
        whole: the rendering.
        source: the template.
        forgets: the template drops the reasoning of answers before the last turn, which is written as `reasoning_content` or
            in the content, before "</think>".
    Raises:
        ValueError: something of more weight is not in the rendering: content, reasoning, tools, tool calls.
    """
    left_out, cursor = {}, 0
    for turn, message in enumerate(conversation.messages):
        if forgets and turn + 1 < len(conversation.messages):
            message = _without_reasoning(message)
        content = turn_content(message)
        place = whole.find(content, cursor)
        if place >= 0:
            # A system prompt may be moved, say into the first turn of the user.
            cursor = place + len(content) if message["role"] not in ("system", "developer") else cursor
        elif _holds(whole, content):
            left_out[_SPACE] = True
        else:
            raise ValueError(
                f"a chat template must render what each turn says; this tokenizer's leaves out the content of turn {turn} "
                f"({message['role']}: {_cut(content)}). Remove the turn, put its text into another one, or use another template."
            )
        for what, text in _further(message):
            if not _holds(whole, text):
                raise ValueError(
                    f"a chat template must render what each turn says; this tokenizer's leaves out {what} of turn {turn} "
                    f"({_cut(text)}). Remove it, or use another template."
                )
        left_out |= dict.fromkeys(_labels(message, whole, source), True)
    for tool in conversation.tools or ():
        name = _function(tool).get("name", "")
        if not _holds(whole, name):
            raise ValueError(
                f"a chat template must render `tools`; this tokenizer's leaves out {name!r}. Remove them from the record, or use "
                f"another template."
            )
    for name in conversation.variables:
        if not _named(name, source):
            left_out[f"chat_template_kwargs.{name}"] = True
    return tuple(left_out)


def _of_columns(record: Mapping[str, Json]) -> list[Message]:
    if "instruction" not in record:
        raise ValueError(
            f"the chat template needs `messages`, or `instruction` and `output`; got {', '.join(map(repr, record))}. "
            f"Rename the columns."
        )
    request = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    turns = [{"role": "system", "content": record["system"]}] if "system" in record else []
    for asked, answered in record.get("history", ()):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    turns.append({"role": "user", "content": request})
    if "output" in record:
        turns.append({"role": "assistant", "content": record["output"]})
    return turns


def _for_template(turn: Message) -> Message:
    message = {key: value for key, value in turn.items() if key != "train" and value is not None}
    reasoning = next((message[name] for name in THOUGHTS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _without_reasoning(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in THOUGHTS}
    _, _, said = turn_content(message).rpartition("</think>")
    return rest | {"content": said.lstrip("\n")}


def _further(message: Message) -> Iterator[tuple[str, str]]:
    """What else a turn says, by name: reasoning, and the calls with each text in their arguments."""
    if "reasoning_content" in message:
        yield "the reasoning", message["reasoning_content"]
    for call in message.get("tool_calls", ()):
        function = _function(call)
        yield "a tool call", str(function.get("name", ""))
        for text in _texts(function.get("arguments")):
            yield "an argument of a tool call", text


def _labels(message: Message, whole: str, source: str) -> Iterator[str]:
    for key in message:
        if key not in _CHECKED and not _named(key, source):
            yield f"messages.{key}"
    for call in message.get("tool_calls", ()):
        if call.get("id") and str(call["id"]) not in whole:
            yield "messages.tool_calls.id"


def _function(tool: JsonObject) -> JsonObject:
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _texts(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _named(key: str, source: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def _holds(whole: str, text: str) -> bool:
    """Whether a text is there as it is, as JSON writes it, or with other white space."""
    if text in whole or text.strip() in whole:
        return True
    if any(json.dumps(text, ensure_ascii=ascii_only)[1:-1] in whole for ascii_only in (False, True)):
        return True
    return "".join(text.split()) in "".join(whole.split())


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
