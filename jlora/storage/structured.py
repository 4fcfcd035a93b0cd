"""JSON and YAML from outside, read within bounds and each key once: one error for whatever is wrong with a text."""

import json
import os
import sys
from itertools import chain
from pathlib import Path

from jlora._typing import Json, JsonObject

MAX_BYTES = 1 << 26
"""Of a file of settings. The largest that is known, a tokenizer.json of a quarter million merges, has 35 MB."""

MAX_DEPTH = 64
"""Of lists and mappings in each other; Python's own readers recurse, and end the process at some thousands."""


class RepeatedKey(ValueError):
    """A key that an object has twice: of two values readers take the last, without a word."""

    def __init__(self, key: str):
        super().__init__(f"the key {key!r} is there twice; leave one of them")


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read, is larger than MAX_BYTES, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{str(path)!r} has {path.stat().st_size:,} bytes; a file of settings has at most {MAX_BYTES:,}. Is it another?"
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} must be UTF-8; got byte 0x{error.object[error.start]:02x} at offset {error.start}. "
            "Convert it, for example with `iconv -t utf-8`."
        ) from None
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


def read_json(path: str | os.PathLike) -> JsonObject:
    """The fields of a file that holds one JSON object.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: as `read_text` and `parse_json`, and for other values than an object.
    """
    value = parse_json(read_text(path), where=repr(os.fspath(path)))
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)!r} must hold a JSON object; got {_kind(value)}.")
    return value


def parse_json(text: str, *, where: str) -> Json:
    """The value of a JSON text; `where` names its place in errors.

    Raises:
        ValueError: when it is not JSON, nested deeper than MAX_DEPTH, has a key twice, or an integer of thousands of digits.
    """
    try:
        value, _ = decode_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}. Write or download it again.") from error
    except ValueError as error:
        raise ValueError(f"{where} cannot be used: {error}.") from error
    return value


def decode_json(text: str, start: int | None = None) -> tuple[Json, int]:
    """The value of a JSON text and where it ends.

    Args:
        start: where the value begins, with anything behind it; None: the text is one value.

    Raises:
        json.JSONDecodeError: when it is not JSON.
        RepeatedKey: when an object has a key twice.
        ValueError: when it is nested deeper than MAX_DEPTH, or has an integer of thousands of digits.
    """
    try:
        value, end = (_DECODER.decode(text), len(text)) if start is None else _DECODER.raw_decode(text, start)
    except (json.JSONDecodeError, RepeatedKey):
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(beyond_bounds(error)) from None
    if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH and _is_too_deep(value):
        raise ValueError(_TOO_DEEP)
    return value, end


def beyond_bounds(error: RecursionError | ValueError) -> str:
    """What Python's reader raised of JSON that is JSON, in words."""
    digits = f"it has an integer of more than {sys.get_int_max_str_digits():,} digits"
    return _TOO_DEEP if isinstance(error, RecursionError) else digits


def _once_each(pairs: list[tuple[str, Json]]) -> JsonObject:
    """An object of its fields.

    Raises:
        RepeatedKey: when two have one name.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(next(name for name in names if names.count(name) > 1))
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_once_each)
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} lists and objects"


def read_yaml(path: str | os.PathLike) -> JsonObject:
    """The fields of a YAML file that holds one mapping with text for keys.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: as `read_text`; for what is not YAML, other values than a mapping, a key that is there twice, and aliases
            (`*name`), a few of which in each other stand for gigabytes.
    """
    import yaml  # a tenth of a second to import, which few uses of the library need

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.events.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.YAMLError(f"line {mark.line + 1} has an alias (*name); write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            first = {}
            for key, _ in node.value:
                # A key that is no text, as 1 and 01, is refused below or by Python.
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
                line = key.start_mark.line + 1
                if name in first:
                    raise yaml.YAMLError(
                        f"the key {key.value!r} is there twice, in lines {first[name]} and {line}; leave one of them"
                    )
                first[name] = line
            return super().construct_mapping(node, deep)

    text = read_text(path)
    try:
        value = yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{os.fspath(path)!r} is nested deeper than {MAX_DEPTH} lists and mappings.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two: dates and keys that Python cannot make
        raise ValueError(f"{os.fspath(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{os.fspath(path)!r} must map names to values; got {_kind(value)}.")
    if _is_too_deep(value):
        raise ValueError(f"{os.fspath(path)!r} is nested deeper than {MAX_DEPTH} lists and mappings. Write it again.")
    return value


def _is_too_deep(value: object) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inside = chain.from_iterable(x.values() if isinstance(x, dict) else x for x in level)
        # Without the leaves: a vocabulary has hundreds of thousands.
        level = [x for x in inside if isinstance(x, dict | list)]
        if not level:
            return False
    return True


def _kind(value: object) -> str:
    return (
        "nothing" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"
    )
