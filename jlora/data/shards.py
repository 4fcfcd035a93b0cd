"""The folder of tokenized text: its files, how they are written, and how to tell that they are what was written."""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from jlora._typing import Json, JsonObject
from jlora.storage.lock import LOCK, only_writer
from jlora.storage.structured import read_json
from jlora.storage.whole import full_disk_said, is_partial, remove_all_partial, whole_file

META = "meta.json"
EVALUATION = "evaluation"
"""The folder for evaluation data of its own, in that of the training data."""
SPLITS = ("train", "validation")
BUILDING = ".partial-"
"""Begins the name of the folder in which the shards are made."""
_TOKENS_AT_ONCE = 1 << 22
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.npy")


def prepared(
    directory: Path, request: JsonObject, write: Callable[[Path], JsonObject], *, needed: int, reuse: bool = True
) -> JsonObject:
    """The content of `meta.json` of a folder of shards, which are made unless it already holds exactly this.

    Args:
        request: what they are made from.
        write: makes the shards in a folder, and says the rest of `meta.json`.
        needed: about how many bytes that takes on the disk.
        reuse: whether equal requests mean equal shards.
    Raises:
        ValueError: a `meta.json` in `directory` that is not ours, or what `write` raises; nothing is written then.
        InUse: another process writes to `directory`.
        NoSpace: the disk is full.
    """
    if reuse and (meta := reusable(directory, request)) is not None:
        return meta
    with full_disk_said(directory, needed=needed):
        directory.mkdir(parents=True, exist_ok=True)
        with only_writer(directory, "prepared"):
            remove_all_partial(directory)
            if (wrong := damage(directory, request)) is not None:
                warnings.warn(f"{wrong}; the text is tokenized again.", stacklevel=3)
            building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=directory))
            try:
                meta = {"request": request, **write(building)}
                publish(building, directory, meta)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return meta


def written(building: Path, splits: dict[Any, np.ndarray], shard_tokens: int) -> JsonObject:
    """Writes each split as shards; what `meta.json` says of them."""
    shards = {split: write_shards(building, split, part, shard_tokens) for split, part in splits.items()}
    return {
        "dtype": next(iter(splits.values())).dtype.name,
        "tokens": {split: len(part) for split, part in splits.items()},
        "shards": {split: [n for n, _ in parts] for split, parts in shards.items()},
        "sha256": {split: [digest for _, digest in parts] for split, parts in shards.items()},
    }


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.npy"


def write_shards(directory: Path, split: str, tokens: np.ndarray, shard_tokens: int) -> list[tuple[int, str]]:
    """(tokens, SHA-256 of the file) of each shard."""
    parts = [tokens[start : start + shard_tokens] for start in range(0, len(tokens), shard_tokens)]
    return [(len(part), _write_array(directory / shard_name(split, index), part)) for index, part in enumerate(parts)]


def _write_array(file: Path, array: np.ndarray) -> str:
    """What `np.save` writes, on the disk when this returns, and no error of it lost; returns the SHA-256."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    sha = hashlib.sha256()
    with file.open("wb") as stream:
        for part in (header.getbuffer(), array.data.cast("B")):
            sha.update(part)
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    return sha.hexdigest()


def publish(building: Path, directory: Path, meta: JsonObject) -> None:
    """Swap the shards in. `meta.json` goes first and comes last, so a crash in between leaves "not prepared"."""
    (directory / META).unlink(missing_ok=True)
    for stale in [file for file in directory.iterdir() if _SHARD.fullmatch(file.name)]:
        stale.unlink()
    for file in sorted(building.glob("*.npy")):
        file.replace(directory / file.name)
    with whole_file(directory / META) as partial:
        partial.write_text(json.dumps(meta, indent=2) + "\n")


def holds_only_shards(directory: Path) -> bool:
    """Whether nothing is in a directory but what `prepare_text` writes, for training and for evaluation data."""
    ours = {META, LOCK}
    return directory.is_dir() and all(
        path.name in ours
        or is_partial(path.name)
        or _SHARD.fullmatch(path.name) is not None
        or (path.name == EVALUATION and holds_only_shards(path))
        for path in directory.iterdir()
    )


def read_meta(directory: Path) -> JsonObject | None:
    """`meta.json` as `prepare_text` wrote it; None where there is none or it is damaged.

    Raises:
        ValueError: for one that is somebody else's.
    """
    file = directory / META
    try:
        meta = read_json(file)
    except FileNotFoundError:
        return None
    except ValueError:
        meta = {}
    if _is_meta(meta):
        return meta
    if "request" not in meta and not any(_SHARD.fullmatch(path.name) for path in directory.iterdir()):
        raise ValueError(f"{file} was not written by `prepare_text` and would be lost. Choose another `directory`.")
    return None


def _is_meta(meta: Mapping[str, Json]) -> bool:
    try:
        return isinstance(meta["request"], dict) and all(
            isinstance(meta["tokens"][split], int)
            and sum(meta["shards"][split]) == meta["tokens"][split]
            and all(isinstance(n, int) and n > 0 for n in meta["shards"][split])
            and len(meta["sha256"][split]) == len(meta["shards"][split])
            and np.dtype(meta["dtype"]).kind == "u"
            for split in SPLITS
        )
    except (KeyError, TypeError):
        return False


def reusable(directory: Path, request: JsonObject) -> JsonObject | None:
    """`meta.json`, if it is that of the request and the shards are what it says."""
    meta = read_meta(directory)
    if meta is None or meta["request"] != request or _damaged_shard(directory, meta) is not None:
        return None
    return meta


def damage(directory: Path, request: JsonObject) -> str | None:
    """What is wrong with a folder that was made for this request, in words."""
    meta = read_meta(directory)
    if meta is None:
        return f"{directory / META} is not what was written" if (directory / META).exists() else None
    if meta["request"] == request and (shard := _damaged_shard(directory, meta)) is not None:
        return f"{shard} is not what was written"
    return None


def _damaged_shard(directory: Path, meta: Mapping[str, Json]) -> Path | None:
    for split, digests in meta["sha256"].items():
        for index, digest in enumerate(digests):
            file = directory / shard_name(split, index)
            if not file.is_file() or sha256(file) != digest:
                return file
    return None


class Shards:
    """The tokens of one split of a folder, memory-mapped: a long array in several files.

    Raises:
        ValueError: a shard that is not what `meta.json` says.
    """

    def __init__(self, directory: Path, split: str, meta: Mapping[str, Json]):
        counts = meta["shards"][split]
        self._shards = [open_shard(directory / shard_name(split, i), n, meta["dtype"]) for i, n in enumerate(counts)]
        self._starts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def part(self, start: int, stop: int) -> np.ndarray:
        """Those from `start` to `stop`, which are not the same."""
        parts = []
        shard = bisect_right(self._starts, start) - 1
        while start < stop:
            local = start - self._starts[shard]
            parts.append(self._shards[shard][local : local + stop - start])
            start += len(parts[-1])
            shard += 1
        return np.concatenate(parts)

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them, piece by piece."""
        for shard in self._shards:
            for start in range(0, len(shard), _TOKENS_AT_ONCE):
                yield shard[start : start + _TOKENS_AT_ONCE]


def open_shard(file: Path, count: int, dtype: str) -> np.ndarray:
    """The tokens of a shard, memory-mapped.

    Raises:
        ValueError: when the file is not one of `count` tokens of `dtype`.
    """
    try:
        shard = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is no shard of tokens ({error}). Prepare the text again.") from error
    if shard.shape != (count,) or shard.dtype != dtype:
        raise ValueError(
            f"{file} must hold {count} tokens of {dtype}, as {META} says; got {shard.shape} of {shard.dtype}. "
            "Prepare the text again."
        )
    return shard
