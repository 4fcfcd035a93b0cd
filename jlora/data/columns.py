"""The columns of a record: each means something that is kept, or is refused, or is named."""

from collections.abc import Iterator, Mapping

from jlora._typing import Json, JsonObject
from jlora.data.formats import FORMATS, SIDE_COLUMNS, TOLD, Reading, format_of, renamed
from jlora.data.tokens import require_text
from jlora.data.turns import SYSTEM_ROLES, THOUGHTS
from jlora.data.values import Record, as_object, as_text, cut, kind, parsed, says_nothing

_SYSTEM = ("system", "system_prompt")
# What would change the meaning of a record were it left out, and what to do.
_REFUSED = {
    "functions": "Write them as `tools`",
    "function_call": "Write it as `tool_calls` of a turn",
    "reasoning_content": "Write it into a turn of `messages`",
    "thinking": "Write it as `reasoning_content` of a turn of `messages`",
    "documents": "Write them into a turn",
} | dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "Remove the record: only text is trained")
_WEIGHTS = ("weight", "sample_weight", "loss_weight", "train")


def normalized(value: Json, how: Reading = TOLD) -> Record:
    """A record with columns of known names and types.

    {"instruction", "input", "output"} (strings; a missing or null `input` is ""), with `system` and `history` (pairs of
    texts) where there are any; or {"messages"}, whose turns are as `messages_of` makes them, the column `system` their first
    turn; or {"text"}. The first two may have `tools` and `chat_template_kwargs`. Other columns are left out and named in
    `left_out`; null or empty ones say nothing.

    Raises:
        ValueError: missing columns, columns of several formats, values of the wrong type, columns that mean something jlora
            has no place for, or text that is no Unicode.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a record must be a JSON object; got {kind(value)}: {cut(repr(value))}")
    absent = [name for name in how.beside if name not in value]
    if absent:
        raise ValueError(
            f"a record needs the column {absent[0]!r}, which was asked for; got {', '.join(map(repr, value))}"
        )
    beside = {name: value[name] for name in how.beside}
    value, displaced = renamed(value, how.columns)
    columns = {name: item for name, item in value.items() if not says_nothing(item)}
    for name, edit in _REFUSED.items():
        if name in columns:
            raise ValueError(
                f"column {name!r} has no place in training on text; got {cut(repr(columns[name]))}. {edit}"
            )
    for name in _WEIGHTS:
        if name in value and value[name] is not None and value[name] != 1:
            raise ValueError(
                f"every record counts alike; got {name!r}: {cut(repr(value[name]))}. Remove the record or the column"
            )
    name = format_of(value, how)
    record = FORMATS[name].read(value)
    record.format = name
    placeless = [side for side in SIDE_COLUMNS if side in columns] + (["--system"] if how.system is not None else [])
    if "text" in record and placeless:
        raise ValueError(f"raw text has no place for {' and '.join(map(repr, placeless))}. Leave it out")
    _put_system_column(record, columns)
    if how.system is not None:
        put_system(record, how.system)
    if "history" in columns:
        if "instruction" not in record:
            raise ValueError("`history` goes with `instruction`; got it beside turns. Write it into the turns")
        record["history"] = _history(columns["history"])
    if "tools" in columns:
        record["tools"] = _tools(columns["tools"])
    if "chat_template_kwargs" in columns:
        record["chat_template_kwargs"] = as_object("chat_template_kwargs", columns["chat_template_kwargs"])
    record.beside = beside
    used = {*FORMATS[name].columns, *FORMATS[name].optional, *_WEIGHTS, *SIDE_COLUMNS, *beside}
    record.left_out = (*displaced, *(str(name) for name in columns if name not in used))
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
        and not any(turn.get(name) for name in ("tool_calls", *THOUGHTS))
        for turn in record["messages"]
    )


def put_system(record: JsonObject, text: str) -> None:
    """Gives a record a system prompt, if it has none."""
    if "messages" not in record:
        record.setdefault("system", text)
    elif record["messages"][0]["role"] not in SYSTEM_ROLES:
        record["messages"].insert(0, {"role": "system", "content": text})


def _put_system_column(record: Record, columns: Mapping[str, Json]) -> None:
    """The system prompt of its column."""
    found = {name: as_text(name, columns[name]) for name in _SYSTEM if name in columns}
    if len(set(found.values())) > 1:
        raise ValueError(f"a record has one system prompt; got {' and '.join(map(repr, found))}. Remove one")
    for name, text in found.items():
        put_system(record, text)
        first = record["messages"][0] if "messages" in record else {"content": text}
        if first["content"] != text:
            raise ValueError(
                f"a record has one system prompt; got {name!r} and a turn of the {first['role']}. Remove one"
            )


def _history(value: Json) -> list[list[str]]:
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise ValueError(f"`history` must be a list of [question, answer] pairs of strings; got {cut(repr(value))}")
    return [list(pair) for pair in pairs]


def _tools(value: Json) -> list[JsonObject]:
    tools = parsed(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"`tools` must be a list of objects (JSON schemas); got {cut(repr(value))}")
    return tools


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
