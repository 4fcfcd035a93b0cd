"""Small JSON and YAML files from outside, read within bounds: one error for whatever is wrong with one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 26
"""Of a file of settings. The largest that is known, a tokenizer.json of a quarter million merges, has 35 MB."""

MAX_DEPTH = 64
"""Of lists and mappings in each other; Python's own readers recurse, and end the process at some thousands."""


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


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of a file that holds one JSON object.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: as `read_text` and `parse_json`, and for other values than an object.
    """
    value = parse_json(read_text(path), where=repr(os.fspath(path)))
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)!r} must hold a JSON object; got {_kind(value)}.")
    return value


def parse_json(text: str, *, where: str) -> Any:
    """The value of a JSON text; `where` names its place in errors.

    Raises:
        ValueError: when it is not JSON, nested deeper than MAX_DEPTH, or has an integer of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} lists and objects. Write it again.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}. Write or download it again.") from error
    _check_depth(value, where)
    return value


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of a YAML file that holds one mapping with text for keys.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: as `read_text`; for what is not YAML, other values than a mapping, and aliases (`*name`), a few of which in
            each other stand for gigabytes.
    """
    import yaml  # a tenth of a second to import, which few uses of the library need

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.events.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.YAMLError(f"line {mark.line + 1} has an alias (*name); write the value out")
            return super().compose_node(parent, index)

    text = read_text(path)
    try:
        value = yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{os.fspath(path)!r} is nested deeper than {MAX_DEPTH} lists and mappings.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two: dates and keys that Python cannot make
        raise ValueError(f"{os.fspath(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{os.fspath(path)!r} must map names to values; got {_kind(value)}.")
    _check_depth(value, repr(os.fspath(path)))
    return value


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, Mapping) else parent)
        ]
        if not level:
            return
    raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} lists and objects. Write it again.")


def _kind(value: Any) -> str:
    return (
        "nothing" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"
    )
