"""Read instruction and chat records from files or the hub, telling where each bad one stands."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from jlora._typing import Json
from jlora.data.columns import Record as Record
from jlora.data.columns import normalized
from jlora.data.formats import TOLD, Reading
from jlora.data.readers import KINDS, Values, ending, files_below, is_saved, read_hub, read_saved

_LISTED = 10  # bad records named in one error

Placed = tuple[str, Record]
"""Where a record stands, "file:line" or "name[row]", and the record."""


class BadRecords:
    """Records that cannot be used: the first ten are named in one error, or, with a file for them, all are counted and kept there.

    Args:
        file: JSON lines of `where`, `error` and `record`; None: a bad record is refused.
    """

    def __init__(self, file: Path | None = None):
        self.file, self.count = file, 0
        self._last = ""
        self._said: list[str] = []
        if file is not None:
            file.unlink(missing_ok=True)

    @property
    def first(self) -> str:
        return self._said[0].strip()

    def add(self, where: str, error: ValueError, value: Json) -> bool:
        """Whether more can be taken. The same one again, as in a mix, counts once."""
        if where == self._last:
            return True
        self._last = where
        self.count += 1
        if len(self._said) < _LISTED:
            self._said.append(f"  {where}: {error}")
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as lines:
                kept = None if isinstance(value, ValueError) else value
                lines.write(json.dumps({"where": where, "error": str(error), "record": kept}, default=str) + "\n")
            return True
        if self.count == _LISTED:
            self._said.append("  (stopped here; there may be more)")
        return self.count < _LISTED

    def refuse(self, source: object) -> None:
        """Raises ValueError where there are any, and no file for them."""
        if self.count and self.file is None:
            raise ValueError(f"bad records in {source}; correct or remove these:\n" + "\n".join(self._said))

    def none_left(self, source: object) -> ValueError:
        """For data of which nothing can be used."""
        if self.count:
            return ValueError(f"all {self.count} records in {source} are bad:\n" + "\n".join(self._said))
        return ValueError(f"a data set needs at least one record; {source} has none. Check that it is the right file.")


class Records:
    """The records of one or more sources, in their order; of a whole table or read again each time.

    A record comes back as `columns.normalized` makes it. Blank lines are no records.

    Args:
        sources: each a file of records, a folder of files of one kind, a folder that `save_to_disk` of datasets wrote, or a hub
            data set, `owner/name:configuration:split`.
        how: how to read them.
        at_most: take so many records of each source, the first ones; None: all.
        bad: what to do with those that cannot be read.
        keep: hold them in memory; else every iteration reads the sources again.
        prepare: what to make of each value before it is read as a record.
    Attributes:
        sources: what they are.
        sizes: the records of each source.
        formats: how many records were read as which format.
        conversations: how many are turns.
    Raises:
        FileNotFoundError: no such file.
        ValueError: bad lines, columns or values (the first ten are named), a source without records, one that cannot be read
            piece by piece and is not to be kept, or a data set that does not load.
        ImportError: a hub id without the `datasets` package.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        *,
        how: Reading = TOLD,
        at_most: int | None = None,
        bad: BadRecords | None = None,
        keep: bool = True,
        prepare: Callable[[Json], Json] = lambda value: value,
    ):
        self._how, self._at_most, self._prepare = how, at_most, prepare
        self.sources, bad = list(sources), BadRecords() if bad is None else bad
        self._kept: list[Placed] | None = [] if keep else None
        sizes, self.formats, self.conversations = [], Counter[str](), 0
        for source in self.sources:
            if not keep:
                _check_streams(source)
            size = 0
            for where, record in self._read(source, bad):
                size += 1
                self.formats[record.format] += 1
                self.conversations += "messages" in record
                if self._kept is not None:
                    self._kept.append((where, record))
            bad.refuse(source)
            if not size:
                raise bad.none_left(source)
            sizes.append(size)
        self.sizes = tuple(sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Placed]:
        if self._kept is not None:
            yield from self._kept
            return
        for source in self.sources:
            yield from self._read(source, None)

    def _read(self, source: str | Path, bad: BadRecords | None) -> Iterator[Placed]:
        return islice(self._good(source, bad), self._at_most)

    def _good(self, source: str | Path, bad: BadRecords | None) -> Iterator[Placed]:
        """Those that can be read; without `bad` the others were counted before."""
        for where, value in values_of(source):
            try:
                if isinstance(value, ValueError):
                    raise value
                yield where, normalized(self._prepare(value), self._how)
            except ValueError as error:
                if bad is not None and not bad.add(where, error, value):
                    return


def read_records(
    source: str | Path,
    *,
    prepare: Callable[[Json], Json] = lambda value: value,
    how: Reading = TOLD,
) -> list[Placed]:
    """The records of one source; see `Records`."""
    return list(Records([source], how=how, prepare=prepare))


def values_of(source: str | Path) -> Values:
    """The values of a source, by the ending of its name or of those in the folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a source that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return read_saved(path) if is_saved(path) else _of_folder(path)
    found = ending(path)
    if not found:
        return read_hub(str(source))
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {source}. Check the path.")
    return KINDS[found].read(path)


def record_files(folder: Path) -> list[Path]:
    """The files of records in a folder, by their names.

    Raises:
        ValueError: they are of several kinds.
    """
    files = [file for file in files_below(folder)[0] if ending(file)]
    kinds = sorted({ending(file) for file in files})
    if len(kinds) > 1:
        raise ValueError(
            f"a folder of records must have files of one kind; {folder} has {', '.join(kinds)}. Name the files instead."
        )
    return files


def _of_folder(folder: Path) -> Values:
    for file in record_files(folder):
        yield from KINDS[ending(file)].read(file)


def _check_streams(source: str | Path) -> None:
    files: Iterable[Path] = record_files(Path(source)) if Path(source).is_dir() else [Path(source)]
    whole = [str(file) for file in files if ending(file) and not KINDS[ending(file)].streams]
    if whole:
        raise ValueError(
            f"a `.json` list is read whole and cannot be streamed; got {whole[0]}. Write it as `.jsonl`, one record a line, or "
            f"leave `--streaming` out."
        )
