"""The columns of a record and the keys of its turns: each means something that is kept, or is refused, or is named."""

import json
from collections.abc import Iterator, Mapping

from jlora._typing import Json, JsonObject
from jlora.data.tokens import require_text
from jlora.storage.structured import decode_json

_COLUMNS = "`instruction` and `output` (and optionally `input`), or `messages`, or `conversations`"
_ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names, https://github.com/lm-sys/FastChat/blob/main/docs/training.md
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_SYSTEM = ("system", "system_prompt")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Whether a turn is trained, as OpenAI, axolotl and ms-swift name it: true, false, 1 or 0.
_TRAIN = ("weight", "train", "training", "trainable", "loss")

# What would change the meaning of a record or turn were it left out, and what to do.
_REFUSED_COLUMNS = {
    "functions": "Write them as `tools`",
    "function_call": "Write it as `tool_calls` of a turn",
    "reasoning_content": "Write it into a turn of `messages`",
    "thinking": "Write it as `reasoning_content` of a turn of `messages`",
    "documents": "Write them into a turn",
} | dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "Remove the record: only text is trained")
_REFUSED_KEYS = {
    "function_call": "Write it as `tool_calls`",
    "refusal": "Write it as `content`",
    "training_detail": "Train whole turns, with `train`",
    "train_detail": "Train whole turns, with `train`",
    "mask": "Say it with `train`, true or false",
    "prefix": "Remove it: a turn is learned whole",
} | dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "Remove the turn")
_WEIGHTS = ("weight", "sample_weight", "loss_weight", "train")


class Record(JsonObject):
    """A record by its columns, and the names of those that were left out."""

    left_out: tuple[str, ...] = ()


def normalized(value: Json) -> Record:
    """A record with columns of known names and types.

    Either {"instruction", "input", "output"} (strings; a missing or null `input` is ""), with `system` and `history` (pairs
    of texts) where there are any; or {"messages"}, whose turns have `role`, `content` (text; missing only beside
    `tool_calls`) and their further keys. ShareGPT's `conversations` become messages, `system` their first turn, a weight
    of 0 or `train: false` becomes `train`: False, arguments of tool calls objects. Both may have `tools` and
    `chat_template_kwargs`. Other columns are left out and named in `left_out`; null or empty ones say nothing.

    Raises:
        ValueError: missing columns, values of the wrong type, columns that mean something jlora has no place for, or
            text that is no Unicode.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a record must be a JSON object; got {kind(value)}: {cut(repr(value))}")
    columns = {name: item for name, item in value.items() if not _says_nothing(item)}
    for name, edit in _REFUSED_COLUMNS.items():
        if name in columns:
            raise ValueError(
                f"column {name!r} has no place in training on text; got {cut(repr(columns[name]))}. {edit}"
            )
    for name in _WEIGHTS:
        if name in value and value[name] is not None and value[name] != 1:
            raise ValueError(
                f"every record counts alike; got {name!r}: {cut(repr(value[name]))}. Remove the record or the column"
            )
    used = {"messages", "conversations", "instruction", "input", "output", *_WEIGHTS}
    if value.get("messages") is not None:
        record = Record(messages=_messages(value["messages"], role="role", content="content"))
        used -= {"conversations", "instruction", "input", "output"}
    elif value.get("conversations") is not None:
        record = Record(messages=_messages(value["conversations"], role="from", content="value"))
        used -= {"instruction", "input", "output"}
    else:
        record = _instruction(value)
    system = [(name, columns[name]) for name in _SYSTEM if name in columns]
    for name, text in system:
        if not isinstance(text, str):
            raise ValueError(f"column {name!r} must be a string; got {kind(text)}: {cut(repr(text))}")
    if len({text for _, text in system}) > 1:
        raise ValueError(
            f"a record has one system prompt; got {' and '.join(repr(name) for name, _ in system)}. Remove one"
        )
    if system:
        _put_system(record, *system[0])
    if "history" in columns:
        if "messages" in record:
            raise ValueError("`history` goes with `instruction`; got it beside turns. Write it into the turns")
        record["history"] = _history(columns["history"])
    if "tools" in columns:
        record["tools"] = _tools(columns["tools"])
    if "chat_template_kwargs" in columns:
        record["chat_template_kwargs"] = _object("chat_template_kwargs", columns["chat_template_kwargs"])
    used |= {*_SYSTEM, "history", "tools", "chat_template_kwargs"}
    record.left_out = tuple(str(name) for name in columns if name not in used)
    for text in _texts(record):
        require_text(text)
    return record


def has_empty_answer(record: Mapping[str, Json]) -> bool:
    """Whether an answer that is learned has nothing but white space, no reasoning and no call of a tool either."""
    if "messages" not in record:
        return not record.get("output", "x").strip()
    return any(
        turn["role"] == "assistant"
        and turn.get("train", True)
        and not (turn.get("content") or "").strip()
        and not any(turn.get(name) for name in ("tool_calls", *_THOUGHTS))
        for turn in record["messages"]
    )


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _instruction(value: JsonObject) -> Record:
    missing = [name for name in ("instruction", "output") if name not in value]
    if missing:
        raise ValueError(
            f"a record needs the columns {_COLUMNS}; got {', '.join(map(repr, value)) or 'none'}, "
            f"so {' and '.join(map(repr, missing))} is missing. Rename the columns."
        )
    record = Record(instruction=value["instruction"], input=value.get("input"), output=value["output"])
    if record["input"] is None:
        record["input"] = ""
    for name, text in record.items():
        if not isinstance(text, str):
            raise ValueError(f"column {name!r} must be a string; got {kind(text)}: {cut(repr(text))}")
    return record


def _put_system(record: Record, name: str, text: str) -> None:
    if "messages" not in record:
        record["system"] = text
        return
    first = record["messages"][0]
    if first["role"] not in ("system", "developer"):
        record["messages"].insert(0, {"role": "system", "content": text})
    elif first["content"] != text:
        raise ValueError(f"a record has one system prompt; got {name!r} and a turn of the {first['role']}. Remove one")


def _history(value: Json) -> list[list[str]]:
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise ValueError(f"`history` must be a list of [question, answer] pairs of strings; got {cut(repr(value))}")
    return [list(pair) for pair in pairs]


def _tools(value: Json) -> list[JsonObject]:
    tools = _parsed(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"`tools` must be a list of objects (JSON schemas); got {cut(repr(value))}")
    return tools


def _object(name: str, value: Json) -> JsonObject:
    parsed = _parsed(value)
    if not isinstance(parsed, dict):
        raise ValueError(f"{name!r} must be an object; got {cut(repr(value))}")
    return parsed


def _parsed(value: Json) -> Json:
    """JSON inside JSON, as columns of tables hold it."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)[0]
    except json.JSONDecodeError:
        return value


def _messages(turns: Json, *, role: str, content: str) -> list[JsonObject]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"messages must be a list with at least one turn; got {kind(turns)}: {cut(repr(turns))}")
    messages = [_turn(index, turn, role, content) for index, turn in enumerate(turns)]
    if messages[0]["role"] == "assistant":
        raise ValueError("a conversation must not start with the assistant: there is no prompt. Remove its first turn")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(
            f"a conversation needs a turn of the assistant to learn from; got only "
            f"{', '.join(dict.fromkeys(message['role'] for message in messages))}"
        )
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise ValueError(
            "a conversation needs a turn of the assistant to learn from; all of them are not to be trained"
        )
    return messages


def _turn(index: int, turn: Json, role: str, content: str) -> JsonObject:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {index} must be an object with strings {role!r} and {content!r}; got {cut(repr(turn))}")
    keys = {key: value for key, value in turn.items() if not _says_nothing(value)}
    calls = _tool_calls(index, keys.pop("tool_calls", None))
    text = _text(index, turn.get(content))
    if not isinstance(turn.get(role), str) or (text is None and not calls):
        raise ValueError(f"turn {index} must be an object with strings {role!r} and {content!r}; got {cut(repr(turn))}")
    name = _SHAREGPT.get(turn[role], turn[role])
    if name not in _ROLES:
        raise ValueError(
            f"the role of turn {index} must be one of {', '.join((*_ROLES, *_SHAREGPT))}; got {turn[role]!r}"
        )
    for key, edit in _REFUSED_KEYS.items():
        if key in keys and keys[key] is not False:
            raise ValueError(f"turn {index} must be text that is said; got {key!r}: {cut(repr(keys[key]))}. {edit}")
    message: JsonObject = {"role": name}
    if text is not None:
        message["content"] = text
    if calls:
        if name != "assistant":
            raise ValueError(
                f"`tool_calls` are the assistant's; got them in turn {index}, of the {name}. Correct the role"
            )
        message["tool_calls"] = calls
    for key in _THOUGHTS:
        if key in keys and not isinstance(keys[key], str):
            raise ValueError(f"{key!r} of turn {index} must be a string; got {cut(repr(keys[key]))}")
    if not _trained(index, turn, name):
        message["train"] = False
    skipped = {role, content, *_TRAIN, *_REFUSED_KEYS}
    return message | {key: value for key, value in keys.items() if key not in skipped and key not in message}


def _text(index: int, value: Json) -> str | None:
    """Content: a string, or a list of parts that are text."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    parts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None for part in value
    ]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"the content of turn {index} must be text; got {cut(repr(value))}. Remove what is not")
    return "".join(part for part in parts if part is not None)


def _trained(index: int, turn: JsonObject, role: str) -> bool:
    said = {key: turn[key] for key in _TRAIN if turn.get(key) is not None}
    for key, flag in said.items():
        if flag not in (0, 1) or isinstance(flag, str):
            raise ValueError(f"{key!r} of turn {index} must be true, false, 1 or 0; got {cut(repr(flag))}")
        if flag and role != "assistant":
            raise ValueError(
                f"only turns of the assistant are trained; got {key!r}: {flag!r} in turn {index}, of the {role}. Remove it"
            )
    if len({bool(flag) for flag in said.values()}) > 1:
        raise ValueError(f"turn {index} is trained or not; got {said}. Remove one")
    return all(said.values())


def _tool_calls(index: int, calls: Json) -> list[JsonObject]:
    """Calls with their arguments as objects: OpenAI writes these as JSON, chat templates expect what it says."""
    if calls is None:
        return []
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"`tool_calls` of turn {index} must be a list of objects with a `function` of `name` and `arguments`; got "
                f"{cut(repr(calls))}"
            )
        if "arguments" in function:
            arguments = _object("arguments", function["arguments"] or {})
            function = function | {"arguments": arguments}
        call = {key: value for key, value in call.items() if value is not None}
        found.append(call | {"function": function} if "function" in call else function)
    return found


def _texts(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), type(value).__name__
    )


def cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
