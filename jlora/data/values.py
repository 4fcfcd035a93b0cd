"""The values of records: what a column or a key says, in words and in its own form."""

import json
from collections.abc import Mapping

from jlora._typing import Json, JsonObject
from jlora.storage.structured import decode_json


class Record(JsonObject):
    """A record by its columns; the format it was read as, the names of the columns that were left out, and what was kept beside."""

    format: str = ""
    left_out: tuple[str, ...] = ()
    beside: Mapping[str, Json] = {}


def says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def parsed(value: Json) -> Json:
    """JSON inside JSON, as columns of tables hold it."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)[0]
    except json.JSONDecodeError:
        return value


def as_object(name: str, value: Json) -> JsonObject:
    found = parsed(value)
    if not isinstance(found, dict):
        raise ValueError(f"{name!r} must be an object; got {cut(repr(value))}")
    return found


def as_text(name: str, value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {name!r} must be a string; got {kind(value)}: {cut(repr(value))}")
    return value


def kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), type(value).__name__
    )


def cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
