"""Records of one or more sources as data sets: held out, mixed, rendered; in memory, or in files made in one pass each."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jlora._typing import JsonObject, PretrainedTokenizer
from jlora.data.formats import Reading
from jlora.data.instruct import InstructDataset, RowText, rows_of
from jlora.data.mix import shares, times
from jlora.data.readers import ending
from jlora.data.records import BadRecords, Placed, Records, record_files
from jlora.data.rendering import Supervise
from jlora.data.row_files import WORD, RowFiles, write_rows
from jlora.data.shards import SPLITS, prepared, read_meta, sha256, written
from jlora.data.tally import Tally
from jlora.data.tokens import fingerprint

AUTO = "auto"
"""The template's name that takes the chat template where there are conversations, and Alpaca's otherwise."""
_FORMAT = 1  # of the request; a change makes older folders be rebuilt
_SHARD_WORDS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class RecordData:
    """How records become data sets; the fields are the arguments of `load_data`."""

    tokenizer: PretrainedTokenizer
    template: str
    max_length: int
    seed: int
    pack: bool
    supervise: Supervise
    how: Reading
    weights: Sequence[float] | None
    temperature: float
    max_examples: int | None
    bad: BadRecords

    def in_memory(
        self, sources: Sequence[str | Path], eval_fraction: float
    ) -> tuple[InstructDataset, InstructDataset | None]:
        records = self._read(sources, keep=True)
        parts = _Parts(self, records, eval_fraction)
        train, held_out = self._made(parts.train(), parts.template), None
        if parts.held_out.any():
            held_out = self._made(parts.evaluation(), parts.template)
        return _described(train, parts.about()), held_out

    def _made(self, records: Iterable[Placed], template: str) -> InstructDataset:
        text = self._text(template)
        return InstructDataset(records, bad=self.bad, pack=self.pack, **text._asdict())

    def in_files(
        self, sources: Sequence[str | Path], eval_fraction: float, directory: Path
    ) -> tuple[InstructDataset, InstructDataset | None]:
        """The same data sets, with their rows in the folder: they are made in a pass that holds a thousand records at a time, after
        one that finds what is wrong with them. They are made anew only where they were not made of the same."""
        files = _files(sources)

        def write(building: Path) -> JsonObject:
            records = self._read(sources, keep=False)
            parts = _Parts(self, records, eval_fraction)
            splits, tallies = {}, {}
            for split, chosen in zip(SPLITS, (parts.train, parts.evaluation), strict=True):
                stream, tally = building / f"{split}.bin", Tally()
                if split == SPLITS[0] or parts.held_out.any():
                    write_rows(rows_of(chosen(), self._text(parts.template), tally, self.bad), stream)
                splits[split] = np.memmap(stream, WORD, mode="r") if tally.rows else np.empty(0, WORD)
                tallies[split] = tally.to_json()
            about = {"template": parts.template, **parts.about()}
            return {"tallies": tallies, "about": about, **written(building, splits, _SHARD_WORDS)}

        needed = 2 * sum(file.stat().st_size for file in files or ())
        request = self._request(files or [], eval_fraction)
        # What a hub data set holds is not known before it is read, nor are the bad records of another pass.
        reuse = files is not None and self.bad.file is None
        meta = prepared(directory, request, write, needed=needed, reuse=reuse)
        about = dict(meta["about"])
        text = self._text(about.pop("template"))
        train, held_out = (
            InstructDataset.of_rows(
                RowFiles(directory, split, meta), Tally(**meta["tallies"][split]), text, pack=self.pack
            )
            if meta["tokens"][split]
            else None
            for split in SPLITS
        )
        assert train is not None
        return _described(train, about), held_out

    def _read(self, sources: Sequence[str | Path], *, keep: bool) -> Records:
        return Records(sources, how=self.how, at_most=self.max_examples, bad=self.bad, keep=keep)

    def _text(self, template: str) -> RowText:
        return RowText(self.tokenizer, template, self.max_length, self.supervise)

    def _request(self, files: Sequence[Path], eval_fraction: float) -> JsonObject:
        """What the rows are made of."""
        chat = self.tokenizer.chat_template
        return {
            "format": _FORMAT,
            "sources": [{"name": file.name, "sha256": sha256(file)} for file in files],
            "tokenizer": fingerprint(self.tokenizer),
            "chat_template": chat and hashlib.sha256(json.dumps(chat, sort_keys=True).encode()).hexdigest(),
            "eval_fraction": eval_fraction,
            "how": {"format": self.how.format, "columns": dict(self.how.columns), "system": self.how.system},
            "weights": None if self.weights is None else list(self.weights),
            **{name: getattr(self, name) for name in ("template", "max_length", "seed", "supervise", "temperature")},
            "max_examples": self.max_examples,
        }


class _Parts:
    """Which records are held out, and how often each of the others comes in an epoch."""

    def __init__(self, of: RecordData, records: Records, eval_fraction: float):
        self.template = of.template
        if self.template == AUTO:
            self.template = "chat" if records.conversations else "alpaca"
        self.held_out = held_out_of(len(records), eval_fraction=eval_fraction, seed=of.seed)
        self._records, self._lines = records, ()
        starts = np.cumsum([0, *records.sizes])
        sizes = [int((~self.held_out[a:b]).sum()) for a, b in zip(starts, starts[1:], strict=False)]
        if of.weights is not None and 0 in sizes:
            raise ValueError(
                f"a source with a weight needs a record to train on; all of {records.sources[sizes.index(0)]} are held out. Lower "
                f"`eval_fraction`, or give `eval_data`."
            )
        wanted = shares(sizes, of.weights, of.temperature)
        self._times = np.zeros(len(records), np.int64)
        self._times[~self.held_out] = times(sizes, wanted, seed=of.seed)
        if wanted != sizes:
            named = zip(records.sources, wanted, sizes, strict=True)
            self._lines = tuple(f"{source}: {want:,} of {size:,}{_often(want, size)}" for source, want, size in named)

    def train(self) -> Iterator[Placed]:
        for record, count in zip(self._records, self._times, strict=True):
            for _ in range(count):
                yield record

    def evaluation(self) -> Iterator[Placed]:
        for record, held_out in zip(self._records, self.held_out, strict=True):
            if held_out:
                yield record

    def about(self) -> JsonObject:
        """What is to be said of them."""
        return {"formats": self._records.formats.most_common(), "sources": list(self._lines)}


def _often(want: int, size: int) -> str:
    return f", each {want / size:.3g} times" if want > size else ""


def _described(dataset: InstructDataset, about: JsonObject) -> InstructDataset:
    formats = tuple((name, count) for name, count in about["formats"])
    dataset.stats = dataclasses.replace(dataset.stats, formats=formats, sources=tuple(about["sources"]))
    return dataset


def held_out_of(records: int, *, eval_fraction: float, seed: int) -> np.ndarray:
    """Which of so many records are held out, drawn with `seed`: bool [records]. A share above 0 holds out at least one.

    Raises:
        ValueError: no record is left to train on, or `seed` < 0.
    """
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0; got {seed}. Give a non-negative integer.")
    held_out = np.zeros(records, bool)
    if eval_fraction == 0:
        return held_out
    n_held_out = max(1, round(records * eval_fraction))
    if n_held_out >= records:
        raise ValueError(
            f"training needs at least one record; eval_fraction={eval_fraction} holds out {n_held_out} of "
            f"{records}. Lower `eval_fraction` (0 for none), or give `eval_data`."
        )
    # A spawn key of two words: the order of the batches is drawn with keys of one.
    source = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0, 0)))
    held_out[np.random.Generator(source).permutation(records)[:n_held_out]] = True
    return held_out


def holds_rows(directory: Path) -> bool:
    """Whether a folder of shards is one of records."""
    meta = read_meta(directory)
    return meta is not None and "tallies" in meta


def _files(sources: Sequence[str | Path]) -> list[Path] | None:
    """The files of the sources; None: some are not files alone."""
    found = []
    for source in map(Path, sources):
        files = record_files(source) if source.is_dir() else [source] if ending(source) else []
        if not files:
            return None
        found += files
    return found
