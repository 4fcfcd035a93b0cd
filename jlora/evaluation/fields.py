"""Answers as JSON: whether they are it, and whether they say the same."""

from collections.abc import Iterator

from jlora._typing import Json
from jlora.evaluation.example import Example, Unscorable, references
from jlora.storage.structured import decode_json

_NONE = object()


def json_valid(example: Example, answer: str) -> float:
    """Whether the answer, but for white space around it, is one JSON value, as a program that is given it would need."""
    return float(_parsed(answer) is not _NONE)


def json_fields(example: Example, answer: str) -> float:
    """The share of the fields, of reference and answer together, that both have with the same value.

    A field is a path to a value that is no object and no list, or to an empty one: `{"a": {"b": 1}, "c": []}` has two.
    """
    wanted = [value for value in map(_parsed, references(example)) if value is not _NONE]
    if not wanted:
        raise Unscorable("its reference is no JSON")
    given = _parsed(answer)
    return 0.0 if given is _NONE else max(_agreement(value, given) for value in wanted)


def _parsed(text: str) -> Json:
    """The value, or `_NONE`."""
    try:
        return decode_json(text.strip())[0]
    except ValueError:
        return _NONE


def _agreement(wanted: Json, given: Json) -> float:
    ours, theirs = dict(_fields(wanted)), dict(_fields(given))
    same = sum(name in theirs and _same(value, theirs[name]) for name, value in ours.items())
    return same / len(ours.keys() | theirs.keys())


def _fields(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Json]]:
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _fields(item, (*path, key))


def _same(a: Json, b: Json) -> bool:
    """Whether two values are the same to JSON, where true is not 1 but 1.0 is."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
