"""`--config FILE.yaml`: a file whose fields are flags."""

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from jlora._typing import Json
from jlora.storage.structured import read_yaml

_NUMBER = re.compile(r"-[\d.]")


def with_config_file(options: type, flags: list[str]) -> list[str]:
    """Replaces `--config FILE.yaml` by the flags in it, put first so that those of the command line win.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a mapping from flags to values of their types.
    """
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else (flag,))]
    if "--config" not in flags:
        return flags
    at = flags.index("--config")
    if at + 1 == len(flags):
        raise ValueError("`--config` needs a file: --config run.yaml.")
    return flags_of(options, Path(flags[at + 1])) + flags[:at] + flags[at + 2 :]


def joined(options: type, flags: Sequence[str]) -> list[str]:
    """`--data A --data B` as `--data A B`, for fields that are lists; tyro would take the last alone, as it would of others.

    Raises:
        ValueError: when a flag that takes one value is given two.
    """
    hints = typing.get_type_hints(options)
    lists = {_flag_name(name) for name, hint in hints.items() if _is_sequence(hint)}
    single = {_flag_name(name) for name in hints} - lists
    values: dict[str, list[str]] = {}
    once: dict[str, str] = {}
    others: list[str] = []
    into = others
    for flag, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        if not flag.startswith("--"):
            into.append(flag)
            continue
        name, equals, value = flag.partition("=")
        name = name.replace("_", "-")
        if name in lists:
            into = values.setdefault(name, [])
            into += [value] if equals else []
            continue
        into = others
        others.append(flag)
        known = name if name in single else name.replace("--no-", "--", 1)
        if not equals:
            takes_none = known != name or following.startswith("--")
            value = name if takes_none else following
        if known in single and once.setdefault(known, value) != value:
            raise ValueError(f"{known} is given twice, as {once[known]} and as {value}. Leave one of them.")
    return others + [part for name, given in values.items() for part in (name, *given)]


def _flag_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def flags_of(options: type, path: Path) -> list[str]:
    """The file's fields as they would stand on the command line.

    Raises:
        FileNotFoundError, ValueError: as `with_config_file`.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no config file {str(path)!r}.")
    fields = {field.name: field for field in dataclasses.fields(options)}
    hints = typing.get_type_hints(options)
    flags: dict[str, list[str]] = {}
    for key, value in read_yaml(path).items():
        name = key.replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise ValueError(
                f"{str(path)!r} sets {key!r}, which is no flag" + (f"; did you mean {close[0]!r}?" if close else ".")
            )
        if name in positional(options):
            raise ValueError(f"{str(path)!r} sets {key!r}, which is given on the command line, without a flag.")
        if name in flags:
            raise ValueError(f"{str(path)!r} sets {key!r} twice, with - and with _. Leave one of them.")
        try:
            flags[name] = list(_flag(fields[name], hints[name], value))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} sets {key!r} to {value!r}, {error}") from None
    return [part for parts in flags.values() for part in parts]


def _flag(field: dataclasses.Field, hint: object, value: Json) -> Iterator[str]:
    """Nothing where the value is the default for want of another.

    Raises:
        ValueError: with the end of a sentence, when the value is not of the field's type.
    """
    flag = _flag_name(field.name)
    if value is None:
        if field.default is not None:
            raise ValueError("which is nothing; give a value, or leave the line out for the default.")
    elif value == []:
        if field.default != ():
            raise ValueError("an empty list; name at least one, or leave the line out for the default.")
    elif isinstance(value, bool) and bool in _scalars(hint):
        yield flag if value else f"--no-{flag.removeprefix('--')}"
    elif bool in _scalars(hint):
        raise ValueError("and is true or false.")
    elif isinstance(value, list):
        if not _is_sequence(hint):
            raise ValueError("a list; it takes one value.")
        texts = [_text(hint, one) for one in value]
        for text in texts:
            if text.startswith("-") and not _NUMBER.match(text):
                raise ValueError(f"where {text!r} would be taken for a flag. Give it on the command line or in a file.")
        yield from (flag, *texts)
    else:
        text = _text(hint, value)
        yield from (f"{flag}={text}",) if text.startswith("-") else (flag, text)


def _text(hint: object, value: Json) -> str:
    """One value as it is written on the command line."""
    scalars = _scalars(hint)
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float | bool):
        raise ValueError(f"a {type(value).__name__}; flags take numbers, text, true and false, and lists of these.")
    if isinstance(value, bool) or not scalars & {int, float}:
        # yes, no, on and off are truth values in YAML, 010 is 8 and 1_000 is 1000.
        raise ValueError(f"as YAML reads it, a {type(value).__name__}; it is text: write it in quotes.")
    return str(value)


def _scalars(hint: object) -> set[type]:
    """The types of single values that a field takes: {str, int} for `tuple[str, ...] | int | None`."""
    if typing.get_origin(hint) is Literal:
        return {type(value) for value in typing.get_args(hint)}
    inside = [arg for arg in typing.get_args(hint) if arg not in (Ellipsis, types.NoneType)]
    return set().union(*map(_scalars, inside)) if inside else {hint}


def _is_sequence(hint: object) -> bool:
    return typing.get_origin(hint) in (tuple, list, Sequence) or any(map(_is_sequence, typing.get_args(hint)))


def positional(options: type) -> set[str]:
    """The fields that are given by their place on the command line, without a flag."""
    from tyro.conf import Positional

    (marker,) = typing.get_args(Positional[str])[1:]
    hints = typing.get_type_hints(options, include_extras=True)
    return {name for name, hint in hints.items() if marker in getattr(hint, "__metadata__", ())}
