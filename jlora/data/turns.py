"""The turns of a conversation: roles under all their names, content as text, calls of tools as objects."""

from collections.abc import Mapping

from jlora._typing import Json, JsonObject
from jlora.data.values import as_object, cut, kind, parsed, says_nothing

# transformers' names for it, of which the first one found fills "reasoning_content" and "thinking".
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
SYSTEM_ROLES = ("system", "developer")

_SPELLINGS = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter", "input"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "output"),
    "tool": ("tool", "tool_response", "function", "function_response", "observation"),
    "call": ("function_call", "tool_call"),
}
"""Role -> what data sets call it: OpenAI; FastChat (data/clean_sharegpt.py), axolotl (prompt_strategies/chat_template.py),
LLaMA-Factory (data/README.md), Unsloth (standardize_sharegpt), ms-swift, OpenAssistant. A call is a turn of the assistant whose
text is the JSON of `tool_calls`."""
_ROLE_OF = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}

_KEYS = (("role", "content"), ("from", "value"))
# Whether a turn is trained, as OpenAI, axolotl and ms-swift name it: true, false, 1 or 0.
_TRAIN = ("weight", "train", "training", "trainable", "loss")
# What would change the meaning of a turn were it left out, and what to do.
_REFUSED = {
    "function_call": "Write it as `tool_calls`",
    "refusal": "Write it as `content`",
    "training_detail": "Train whole turns, with `train`",
    "train_detail": "Train whole turns, with `train`",
    "mask": "Say it with `train`, true or false",
    "prefix": "Remove it: a turn is learned whole",
} | dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "Remove the turn")


def messages_of(turns: Json, *, keys: tuple[str, str]) -> list[JsonObject]:
    """The turns as OpenAI writes them: `role`, `content` (text; missing only beside `tool_calls`), and their further keys.

    A weight of 0 or `train: false` becomes `train`: False, arguments of tool calls become objects.

    Args:
        turns: a list, or the JSON of one.
        keys: what the role and the content are called, unless a turn has the names of the other convention.
    Raises:
        ValueError: no list of turns, a role that nobody knows, values of the wrong type, or what has no place in text.
    """
    turns = parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"messages must be a list with at least one turn; got {kind(turns)}: {cut(repr(turns))}")
    return [_turn(index, turn, *_keys_of(turn, keys)) for index, turn in enumerate(turns)]


def check_conversation(messages: list[JsonObject]) -> None:
    """Raises ValueError where there is nothing to learn, or nothing to learn it from."""
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


def is_answer(turn: Mapping[str, Json]) -> bool:
    """Whether a turn, however it is written, is the assistant's."""
    names = [turn[role] for role, _ in _KEYS if isinstance(turn.get(role), str)]
    return bool(names) and _ROLE_OF.get(names[0].lower()) in ("assistant", "call")


def _keys_of(turn: Json, keys: tuple[str, str]) -> tuple[str, str]:
    if isinstance(turn, dict) and not any(key in turn for key in keys):
        return next((other for other in _KEYS if all(key in turn for key in other)), keys)
    return keys


def _turn(index: int, turn: Json, role: str, content: str) -> JsonObject:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {index} must be an object with strings {role!r} and {content!r}; got {cut(repr(turn))}")
    keys = {key: value for key, value in turn.items() if not says_nothing(value)}
    calls = _tool_calls(index, keys.pop("tool_calls", None))
    text = _text(index, turn.get(content))
    if not isinstance(turn.get(role), str) or (text is None and not calls):
        raise ValueError(f"turn {index} must be an object with strings {role!r} and {content!r}; got {cut(repr(turn))}")
    name = _ROLE_OF.get(turn[role].lower())
    if name is None:
        raise ValueError(f"the role of turn {index} must be one of {', '.join(_ROLE_OF)}; got {turn[role]!r}")
    if name == "call":
        name, calls, text = "assistant", [*calls, *_called(index, text)], None
    for key, edit in _REFUSED.items():
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
    for key in THOUGHTS:
        if key in keys and not isinstance(keys[key], str):
            raise ValueError(f"{key!r} of turn {index} must be a string; got {cut(repr(keys[key]))}")
    if not _trained(index, turn, name):
        message["train"] = False
    skipped = {role, content, *_TRAIN, *_REFUSED}
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


def _called(index: int, text: str | None) -> list[JsonObject]:
    """The calls in the text of a turn that is nothing else, each in OpenAI's form."""
    calls = parsed(text)
    if not isinstance(calls, dict | list):
        raise ValueError(
            f"a call of a tool must be JSON with `name` and `arguments`; got {cut(repr(text))} in turn {index}. Correct it, or "
            f"give what is said the role of the assistant"
        )
    found = _tool_calls(index, calls)
    return [call if "function" in call else {"type": "function", "function": call} for call in found]


def _tool_calls(index: int, calls: Json) -> list[JsonObject]:
    """Calls with their arguments as objects: OpenAI writes these as JSON, chat templates expect what it says."""
    if calls is None:
        return []
    calls = parsed(calls)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"`tool_calls` of turn {index} must be a list of objects with a `function` of `name` and `arguments`; got "
                f"{cut(repr(calls))}"
            )
        if "arguments" in function:
            arguments = as_object("arguments", function["arguments"] or {})
            function = function | {"arguments": arguments}
        call = {key: value for key, value in call.items() if value is not None}
        found.append(call | {"function": function} if "function" in call else function)
    return found
