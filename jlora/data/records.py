"""Read instruction and chat records from a file or the hub, telling where each bad one stands."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from jlora._typing import Json
from jlora.data.columns import Record as Record
from jlora.data.columns import cut, kind, normalized
from jlora.storage.structured import beyond_bounds, decode_json

_LISTED = 10  # bad records named in one error


def read_records(
    source: str | Path, *, prepare: Callable[[Json], Json] = lambda value: value
) -> list[tuple[str, Record]]:
    """Records of a `.jsonl` file (an object a line), a `.json` file (a list) or a hub data set (its `train` split).

    A record comes back as `columns.normalized` makes it: {"instruction", "input", "output", …} or
    {"messages": [{"role", "content", …}, …], …}. Blank lines are no records.

    Args:
        source: a path that ends in `.jsonl` or `.json`, else the id of a data set on the Hugging Face hub.
        prepare: what to make of each value before it is read as a record.
    Returns:
        (where, record) pairs in the order of the file; `where` is "file:line", or "id[row]" for the hub.
    Raises:
        FileNotFoundError: no such file.
        ValueError: bad lines, columns or values (the first ten are named), no records, or a data set that does not
            load.
        ImportError: a hub id without the `datasets` package.
    """
    reader = _READERS.get(Path(source).suffix.lower(), _hub)
    if reader is not _hub and not Path(source).is_file():
        raise FileNotFoundError(f"no such data file: {source}. Check the path.")
    records, problems = [], []
    for where, value in reader(source):
        try:
            if isinstance(value, ValueError):
                raise value
            records.append((where, normalized(prepare(value))))
        except ValueError as error:
            problems.append(f"  {where}: {error}")
            if len(problems) == _LISTED:
                problems.append("  (stopped here; there may be more)")
                break
    if problems:
        raise ValueError(f"bad records in {source}; correct or remove these:\n" + "\n".join(problems))
    if not records:
        raise ValueError(f"a data set needs at least one record; {source} has none. Check that it is the right file.")
    return records


def _json_lines(source: str | Path) -> Iterator[tuple[str, Json]]:
    with Path(source).open("rb") as lines:  # bytes: a line that is not UTF-8 is then one bad line, not the end
        for number, raw in enumerate(lines, 1):
            line = ""
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value, _ = decode_json(line) if line else (None, 0)
            except UnicodeDecodeError as error:
                value = ValueError(
                    f"a line must be UTF-8; got byte 0x{raw[error.start]:02x} at its offset {error.start}"
                )
            except json.JSONDecodeError as error:
                value = ValueError(f"a line must be one JSON object; {error.msg} at column {error.colno}: {cut(line)}")
            except ValueError as error:
                value = ValueError(f"{error}: {cut(line)}")
            else:
                if not line:
                    continue
            yield f"{source}:{number}", value


def _json_list(source: str | Path) -> Iterator[tuple[str, Json]]:
    raw = Path(source).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
        values = json.loads(text)  # each element is decoded again below, with its line for what is wrong in it
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{source}:{line}: JSON must be UTF-8; got byte 0x{raw[error.start]:02x} at offset {error.start}. "
            f"Convert the file, for example with `iconv -t utf-8`."
        ) from error
    except json.JSONDecodeError as error:
        hint = " One object a line? Name the file `.jsonl`." if error.msg == "Extra data" else ""
        raise ValueError(
            f"{source}:{error.lineno}: a `.json` file must be one JSON list; {error.msg} at column {error.colno}.{hint}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{source}: a `.json` file must be a list of records; {beyond_bounds(error)}") from None
    if not isinstance(values, list):
        raise ValueError(
            f"{source}:1: a `.json` file must be a list of records; got {kind(values)}. "
            f"Write the list itself, or one object a line in a `.jsonl` file."
        )
    for line, value in _elements(text):
        yield f"{source}:{line}", value


def _elements(text: str) -> Iterator[tuple[int, Json]]:
    """Each element of a valid JSON list, or what is wrong with it, and the line on which it starts."""
    plain, place, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while text[place] in " \t\r\n,":
            place += 1
        if text[place] == "]":
            return
        line += text.count("\n", counted, place)
        counted = place
        try:
            value, place = decode_json(text, place)
        except ValueError as error:
            _, end = plain.raw_decode(text, place)
            value, place = ValueError(f"{error}: {cut(text[place:end])}"), end
        yield line, value


def _hub(source: str | Path) -> Iterator[tuple[str, Json]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {str(source)!r} from the hub needs the `datasets` package. "
            f"Run `pip install datasets`, or give a `.jsonl`, `.json` or `.txt` file."
        ) from error
    try:
        rows = datasets.load_dataset(str(source), split="train")
    except Exception as error:  # whatever the network, the hub or the data set's files raise
        raise ValueError(
            f"{str(source)!r} is no file here, and as a hub data set its `train` split did not load "
            f"({type(error).__name__}: {error}). Check the name and the network, or give a file."
        ) from error
    for index, value in enumerate(rows):
        yield f"{source}[{index}]", value


_READERS = {".jsonl": _json_lines, ".json": _json_list}
