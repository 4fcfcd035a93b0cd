"""Where records come from: a row for each ending of a file's name says how it is read; saved data sets; the hub."""

import csv
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jlora._typing import Json
from jlora.data.values import cut, kind
from jlora.storage.history import EXPERIMENTS
from jlora.storage.lock import LOCK
from jlora.storage.structured import beyond_bounds, decode_json

Values = Iterator[tuple[str, Json | ValueError]]
"""(where, value), or what is wrong there."""

_ROWS_AT_ONCE = 256  # of a Parquet file


class Kind(NamedTuple):
    """How the values of a kind of file are read, and whether one after the other, in a memory that does not grow with it."""

    read: Callable[[Path], Values]
    streams: bool = True


def _json_lines(path: Path) -> Values:
    with _opened(path) as lines:  # bytes: a line that is not UTF-8 is then one bad line, not the end
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
            yield f"{path}:{number}", value


def _json_list(path: Path) -> Values:
    with _opened(path) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
        values = json.loads(text)  # each element is decoded again below, with its line for what is wrong in it
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: JSON must be UTF-8; got byte 0x{raw[error.start]:02x} at offset {error.start}. "
            f"Convert the file, for example with `iconv -t utf-8`."
        ) from error
    except json.JSONDecodeError as error:
        hint = " One object a line? Name the file `.jsonl`." if error.msg == "Extra data" else ""
        raise ValueError(
            f"{path}:{error.lineno}: a `.json` file must be one JSON list; {error.msg} at column {error.colno}.{hint}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: a `.json` file must be a list of records; {beyond_bounds(error)}") from None
    if not isinstance(values, list):
        raise ValueError(
            f"{path}:1: a `.json` file must be a list of records; got {kind(values)}. "
            f"Write the list itself, or one object a line in a `.jsonl` file."
        )
    for line, value in _elements(text):
        yield f"{path}:{line}", value


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


def _table(path: Path, *, delimiter: str) -> Values:
    """Rows under the names of the first one; RFC 4180, and all cells are text."""
    at, limit = 1, csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's own bound of 128 KiB
    try:
        with _opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(rows, [])
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{path}:1: a column must be named once; got {twice[0]!r} twice. Rename one.")
            while True:
                at = rows.line_num + 1
                row = next(rows, None)
                if row is None:
                    return
                if not row:  # a blank line
                    continue
                if len(row) == len(names):
                    yield f"{path}:{at}", dict(zip(names, row, strict=True))
                else:
                    yield (
                        f"{path}:{at}",
                        ValueError(f"a row must have {len(names)} cells, as the first; got {len(row)}"),
                    )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: a table must be UTF-8; got byte 0x{error.object[error.start]:02x}. Convert the file, for example with "
            f"`iconv -t utf-8`."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{path}:{at}: no table of cells between {delimiter!r} ({error}). Correct the quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Values:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for rows in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for value in rows.to_pylist():
                    yield f"{path}[{index}]", value
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file; {error}. Write it again.") from error


KINDS = {
    ".jsonl": Kind(_json_lines),
    ".json": Kind(_json_list, streams=False),
    ".parquet": Kind(_parquet),
    ".csv": Kind(partial(_table, delimiter=",")),
    ".tsv": Kind(partial(_table, delimiter="\t")),
}
"""The ending of a file's name -> how it is read. All but Parquet, which compresses by itself, may be in a `.gz`."""
COMPRESSED = ".gz"


def ending(path: str | Path) -> str:
    """The ending of a file of records, without that of its compression: ".jsonl" of "a.jsonl.gz"; "" where it is none."""
    path = Path(path)
    found = path.suffix.lower()
    if found == COMPRESSED:
        found = Path(path.stem).suffix.lower()
        return found if found in KINDS and found != ".parquet" else ""
    return found if found in KINDS else ""


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as stream:
        if path.suffix.lower() != COMPRESSED:
            yield stream
            return
        try:
            with gzip.open(stream) as inside:
                yield inside  # pyright: ignore[reportReturnType]
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} must be a gzip file; {error}. Compress it again.") from error


class HubName(NamedTuple):
    """`owner/name`, its configuration and its split: `owner/name:config:train[:10000]`.

    config: None: the only one, or the data set's default.
    """

    id: str
    config: str | None
    split: str

    @classmethod
    def of(cls, name: str) -> "HubName | None":
        """What a name says; None: it cannot be a hub data set's."""
        found = _HUB_NAME.fullmatch(name)
        if found is None:
            return None
        config, split = found["config"], found["split"]
        return cls(found["id"], config or None, split or "train")


# A part behind one colon is a configuration, but for a slice, which only splits have.
_HUB_NAME = re.compile(
    r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>\w+(\[[^\]]*\])?(\+\w+(\[[^\]]*\])?)*))?"
)


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of datasets writes."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(path: Path) -> Values:
    """Of a folder that `save_to_disk` wrote: the data set, or its split `train`."""
    found = _datasets(str(path)).load_from_disk(str(path))
    if isinstance(found, Mapping):
        if "train" not in found:
            raise ValueError(
                f"a saved data set must be one, or have the split `train`; {path} has "
                f"{', '.join(map(str, found))}. Name the folder of one."
            )
        found = found["train"]
    for index, value in enumerate(found):
        yield f"{path}[{index}]", value


def read_hub(name: str) -> Values:
    hub = HubName.of(name)
    assert hub is not None
    library = _datasets(name)
    try:
        rows = library.load_dataset(hub.id, *([] if hub.config is None else [hub.config]), split=hub.split)
    except Exception as error:  # whatever the network, the hub or the data set's files raise
        raise ValueError(
            f"{name!r} is no file here, and as a hub data set its `{hub.split}` split did not load "
            f"({type(error).__name__}: {error}). Check the name and the network, or give a file."
        ) from error
    for index, value in enumerate(rows):
        yield f"{name}[{index}]", value


def _datasets(name: str):
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {name!r} from the hub needs the `datasets` package. "
            f"Run `pip install datasets`, or give a `.jsonl`, `.json` or `.txt` file."
        ) from error
    return datasets


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the files below a folder, in the order of their names, but hidden ones; directories of runs, which are left out)."""
    files, runs = [], []
    for place, below, names in os.walk(folder):
        if "config.yaml" in names and {"run.json", LOCK} & set(names):
            runs.append(Path(place))
            below.clear()
            continue
        below[:] = [name for name in below if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".") and name != EXPERIMENTS]
    return sorted(files), runs
