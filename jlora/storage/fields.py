"""Tables of fields: what each field of a file from outside may hold, and one error for all that hold something else.

Example:
    >>> table = {"r": integer(1, 10), "bias": one_of("none", "all"), "tags": optional(list_of(text()))}
    >>> list(wrong_fields({"r": "8", "bias": "all", "more": 1}, table))
    ["`r` must be an integer from 1 to 10; got '8'."]
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple, TypeGuard

from jlora._typing import Json

MAX_SIZE = 1 << 24
"""Of one dimension. The largest there are: ten million positions, a vocabulary of a million."""


class Kind(NamedTuple):
    """What a field may hold."""

    says: str
    """In an error, behind "must be"."""
    holds: Callable[[Json], bool]


def wrong_fields(
    fields: Mapping[str, Json], table: Mapping[str, Kind], required: Collection[str] = ()
) -> Iterator[str]:
    """A line for each field that is there and holds what its kind in the table does not, and for each required one that is not."""
    for name, kind in table.items():
        if name in required and name not in fields:
            yield f"`{name}` is missing; it must be {kind.says}."
        if name in fields and not kind.holds(fields[name]):
            yield f"`{name}` must be {kind.says}; got {shown(fields[name])}."


def check_fields(
    fields: Mapping[str, Json], table: Mapping[str, Kind], *, where: str, required: Collection[str] = ()
) -> None:
    """Raises a ValueError that lists the wrong and the missing fields of the file `where`."""
    wrong = list(wrong_fields(fields, table, required))
    if wrong:
        raise ValueError(f"{where} cannot be used:\n  " + "\n  ".join(wrong))


def shown(value: object) -> str:
    """A value in an error, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer, which Python's booleans are not here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number that a float64 holds."""
    if is_integer(value):
        return abs(value) < 1 << 1023
    return isinstance(value, float) and math.isfinite(value)


def integer(least: int = 1, most: int = MAX_SIZE) -> Kind:
    return Kind(f"an integer from {least} to {most}", lambda v: is_integer(v) and least <= v <= most)


def positive(most: float = 1e30) -> Kind:
    """A number above zero; the bounds leave room for float32."""
    return Kind(f"a positive number up to {most:g}", lambda v: is_number(v) and 1e-30 <= v <= most)


def number(least: float, most: float) -> Kind:
    return Kind(f"a number from {least:g} to {most:g}", lambda v: is_number(v) and least <= v <= most)


def probability() -> Kind:
    return Kind("a number in [0, 1)", lambda v: is_number(v) and 0 <= v < 1)


def flag() -> Kind:
    return Kind("true or false", lambda v: isinstance(v, bool))


def text() -> Kind:
    return Kind("text", lambda v: isinstance(v, str))


def one_of(*values: object) -> Kind:
    """One of these values, of the same type: 1 is not true."""
    listed = " or ".join(map(repr, values))
    return Kind(listed, lambda v: any(type(v) is type(value) and v == value for value in values))


def list_of(kind: Kind, *, least: int = 0) -> Kind:
    """A list whose items are all of a kind."""
    says = f"a list{' that is not empty' if least else ''}, each item {kind.says}"
    return Kind(says, lambda v: isinstance(v, list | tuple) and len(v) >= least and all(map(kind.holds, v)))


def mapping_of(kind: Kind) -> Kind:
    """An object whose values are all of a kind."""
    return Kind(
        f"an object, each value {kind.says}", lambda v: isinstance(v, Mapping) and all(map(kind.holds, v.values()))
    )


def either(*kinds: Kind) -> Kind:
    """Of one kind or another."""
    return Kind(" or ".join(kind.says for kind in kinds), lambda v: any(kind.holds(v) for kind in kinds))


def optional(kind: Kind) -> Kind:
    """The kind or null, which stands for absence."""
    return Kind(f"{kind.says} or null", lambda v: v is None or kind.holds(v))


def anything() -> Kind:
    """What is carried along or never read."""
    return Kind("anything", lambda _: True)
