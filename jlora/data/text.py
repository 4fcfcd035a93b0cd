"""Raw text: tokenized once into memory-mapped shards, read back as windows in which every token is a target once."""

import codecs
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from jlora._typing import JsonObject, PretrainedTokenizer
from jlora.data.chunks import context_of, encode_chunks, stable_chunks
from jlora.data.rows import IGNORED, Row
from jlora.data.shards import META, SPLITS, Shards, prepared, read_meta, sha256, written
from jlora.data.stats import Stats
from jlora.data.tokens import added_bos, encode, fingerprint, largest_id, with_bos
from jlora.data.vocabulary import beyond
from jlora.storage.history import EXPERIMENTS
from jlora.storage.lock import LOCK

_FORMAT = 1  # of the request; a change makes older folders be rebuilt, and runs on them start anew
_BLOCK_BYTES = 1 << 18
_BLOCKS_AT_ONCE = 16  # encoded in one call: the cores of a fast tokenizer, and about 150 MB of its bookkeeping
_LISTED = 10


def prepare_text(
    path: str | Path | Sequence[str | Path],
    tokenizer: PretrainedTokenizer,
    *,
    directory: str | Path,
    eval_fraction: float,
    shard_tokens: int = 1 << 26,
    vocab_size: int | None = None,
) -> JsonObject:
    """Tokenize text files into `directory`, unless it already holds exactly this.

    Each file is a document: its text as it is (UTF-8; a byte order mark is left out), behind one beginning-of-text
    token iff the tokenizer adds one itself, closed by one end-of-text token if the tokenizer has one. The documents
    follow each other in the order given (a folder: by name); the last `eval_fraction` of the tokens is the validation
    split, the rest the training split. Files are streamed, and their tokens are those of the whole text.

    The folder holds `train-00000.npy`, …, `validation-00000.npy`, … (1-d; uint16, or uint32 for more than 65536 ids)
    and `meta.json`, which is written last: a folder with it is complete. It is reused iff the SHA-256 of each file,
    the tokenizer's fingerprint, `eval_fraction` and `shard_tokens` are the ones in `meta.json`, and the SHA-256 of each shard
    too; a folder that is damaged is made again, with a warning.

    Args:
        path: a text file, a folder of `.txt` files (read with its subfolders, but for directories of runs, which are named in a
            warning where they hold such files), or a list of files.
        tokenizer: a transformers tokenizer.
        directory: where the shards go; other files in it are left alone.
        eval_fraction: share of the tokens for validation, 0 <= eval_fraction < 1; 0 makes no validation split.
        shard_tokens: tokens in a shard, >= 1.
        vocab_size: rows of the model's embedding; None: ids are not compared with it.
    Returns:
        The content of `meta.json`: `request` (what it was made from), `documents`, `dtype`, and by split `tokens`, `shards` (the
        tokens in each shard) and `sha256` (of each shard's file).
    Raises:
        FileNotFoundError: no such file, or no `.txt` file in the folder.
        ValueError: an empty file, bytes that are not UTF-8, too few tokens for the splits, an argument out of range, an id
            that is no row of the embedding (nothing is written then), or a `meta.json` in `directory` that is not ours.
        InUse: another process writes to `directory`.
        NoSpace: the disk is full.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"`eval_fraction` must be in [0, 1); got {eval_fraction}. Give the share to validate on.")
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be >= 1; got {shard_tokens}. Give the tokens to put in one shard.")
    directory, sources = Path(directory), _sources(path)
    request = {
        "format": _FORMAT,
        "sources": [{"name": name, "sha256": sha256(file)} for name, file in sources],
        "tokenizer": fingerprint(tokenizer),
        "eval_fraction": float(eval_fraction),
        "shard_tokens": int(shard_tokens),
    }
    files = [file for _, file in sources]
    # A token of about four bytes of text is kept twice, in two bytes each, while it is prepared.
    needed = sum(file.stat().st_size for file in files)

    def write(building: Path) -> JsonObject:
        stream, dtype = building / "tokens.bin", _dtype(tokenizer)
        _write_stream(files, tokenizer, stream, dtype)
        # Before the file is mapped: an empty one cannot be.
        n_validation = _n_validation(stream.stat().st_size // dtype.itemsize, eval_fraction)
        tokens = np.memmap(stream, dtype, mode="r")
        if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
            raise ValueError(beyond(largest, tokenizer, vocab_size))
        splits = dict(zip(SPLITS, np.split(tokens, [len(tokens) - n_validation]), strict=True))
        return {"documents": len(files), **written(building, splits, shard_tokens)}

    return prepared(directory, request, write, needed=needed)


class TextDataset:
    """Windows over one split of a prepared folder; a `Dataset`.

    Windows of `length` tokens overlap by one, so every token but the first of the split is a target exactly once per
    epoch. The last window may be shorter. Shards are memory-mapped.

    Args:
        directory: made by `prepare_text`.
        split: "train" or "validation".
        length: tokens in a window, >= 2.
        pad_id: the id to pad with.
    Raises:
        FileNotFoundError: the folder is not prepared.
        ValueError: `length` < 2, an unknown split, or one with fewer than 2 tokens; a shard that is not what `meta.json` says.
    """

    def __init__(self, directory: str | Path, split: str, *, length: int, pad_id: int):
        directory = Path(directory)
        if length < 2:
            raise ValueError(f"`length` must be >= 2, a token and the one it predicts; got {length}. Raise it.")
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}. Name one of these.")
        meta = read_meta(directory)
        if meta is None:
            raise FileNotFoundError(
                f"{directory} holds no prepared text ({META} is missing). Run `prepare_text` first."
            )
        n_tokens = meta["tokens"][split]
        if n_tokens < 2:
            raise ValueError(
                f"a split needs at least 2 tokens; {split!r} in {directory} has {n_tokens}. "
                f"Prepare the text with another `eval_fraction` (it was {meta['request']['eval_fraction']})."
            )
        self.length, self.pad_id, self.fills_rows = length, pad_id, True
        self._largest: int | None = None
        is_whole = not meta["request"]["eval_fraction"]
        self._documents = [bytes.fromhex(s["sha256"]) for s in meta["request"]["sources"]] if is_whole else []
        self._digest = hashlib.sha256(json.dumps(meta["request"], sort_keys=True).encode()).hexdigest()
        self._shards = Shards(directory, split, meta)
        n_rows = -(-(n_tokens - 1) // (length - 1))
        self.stats = Stats(
            records=n_rows,
            rows=n_rows,
            tokens=n_tokens,
            supervised_tokens=n_tokens - 1,
            truncated=0,
            dropped=0,
            # Every window but the first repeats one token.
            padding_efficiency=(n_tokens + n_rows - 1) / (n_rows * length),
            longest=min(length, n_tokens),
        )

    def __len__(self) -> int:
        return self.stats.rows

    @property
    def largest_token(self) -> int:
        """The largest id in the split, of the shards as they are; the first call reads them all."""
        if self._largest is None:
            self._largest = max(int(block.max()) for block in self._shards.blocks())
        return self._largest

    def digest(self) -> str:
        """SHA-256 that tells whether this is the same data: of the files' digests and how they were prepared."""
        return self._digest

    def tokens(self) -> tuple[set[int], set[int]]:
        """The ids in the split, all of them supervised; reads it once."""
        used = np.zeros(self.largest_token + 1, bool)
        for block in self._shards.blocks():
            used[block] = True
        ids = set(np.flatnonzero(used).tolist())
        return ids, ids

    def items(self) -> Iterator[bytes]:
        """The SHA-256 of each document, where the split is the whole of the text."""
        yield from self._documents

    def row(self, index: int) -> Row:
        """Window `index`: tokens from `index * (length - 1)`, all of them targets but the first.

        Raises:
            IndexError: `index` is not in 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in 0..{len(self) - 1}; got {index}.")
        start = index * (self.length - 1)
        input_ids = self._shards.part(start, min(start + self.length, self.stats.tokens)).astype(np.int32)
        labels = input_ids.copy()
        labels[0] = IGNORED
        return Row(input_ids, labels)


def _sources(path: str | Path | Sequence[str | Path]) -> list[tuple[str, Path]]:
    """(name, file) of each document. Names leave out the folder, so that a moved data set is still the same."""
    if isinstance(path, str | Path) and Path(path).is_dir():
        folder = Path(path)
        files, others, runs = _text_files(folder)
        found = sorted((file.relative_to(folder).as_posix(), file) for file in files if file.is_file())
        of_runs = {run: n for run in runs if (n := sum(len(_texts(f)) for _, _, f in os.walk(run)))}
        said = f"{sum(of_runs.values())} `.txt` files of runs ({_few([str(run) for run in of_runs])})"
        if not found:
            raise FileNotFoundError(
                f"a folder of text needs `.txt` files; {folder} has "
                + (f"only {said}. Give the text's own folder." if of_runs else "none. Give the file itself.")
            )
        if of_runs:
            warnings.warn(f"left out of the text in {folder}: {said}.", stacklevel=3)
        if others:
            names = _few(sorted(file.relative_to(folder).as_posix() for file in others))
            warnings.warn(f"of the folder {folder}, only the `.txt` files are text; left out: {names}", stacklevel=3)
    else:
        files = [Path(path)] if isinstance(path, str | Path) else [Path(file) for file in path]
        found = [(file.name, file) for file in files]
    missing = [str(file) for _, file in found if not file.is_file()]
    if missing or not found:
        raise FileNotFoundError(f"no such text file: {_few(missing) or '(an empty list)'}. Check the path.")
    empty = [str(file) for _, file in found if file.stat().st_size == 0]
    if empty:
        raise ValueError(f"a text file must not be empty; got 0 bytes in {_few(empty)}. Leave it out.")
    return found


def _text_files(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(the `.txt` files below a folder, other files but hidden ones, the directories of runs, which keep such files of their
    own and are left out)."""
    texts, others, runs = [], [], []
    for place, below, names in os.walk(folder):
        if "config.yaml" in names and {"run.json", LOCK} & set(names):
            runs.append(Path(place))
            below.clear()
            continue
        is_hidden = any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
        found = _texts(names)
        texts += [Path(place, name) for name in found]
        if not is_hidden:
            passed = {*found, EXPERIMENTS}
            others += [Path(place, name) for name in names if name not in passed and not name.startswith(".")]
    return texts, others, runs


def _texts(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(".txt")]


def _few(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _dtype(tokenizer: PretrainedTokenizer) -> np.dtype:
    return np.dtype(np.uint16 if largest_id(tokenizer) < 1 << 16 else np.uint32)


def _n_validation(n_tokens: int, eval_fraction: float) -> int:
    n_validation = round(n_tokens * eval_fraction)
    if n_tokens - n_validation < 2 or (eval_fraction > 0 and n_validation < 2):
        raise ValueError(
            f"each split needs at least 2 tokens; the text has {n_tokens}, of which eval_fraction={eval_fraction} "
            f"gives {n_validation} to validation and {n_tokens - n_validation} to training. "
            f"Give more text, or another `eval_fraction` (0 for no validation split)."
        )
    return n_validation


def _read_blocks(file: Path) -> Iterator[str]:
    """Decoded text, a block at a time. Newlines stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed, lines, first = 0, 0, True
    with file.open("rb") as stream:
        while True:
            raw = stream.read(_BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n") + 1
                raise ValueError(
                    f"{file}:{line}: text must be UTF-8; got byte "
                    f"0x{error.object[error.start]:02x} at offset {consumed - pending + error.start} "
                    f"({error.reason}). Convert the file, for example with `iconv -t utf-8`."
                ) from error
            consumed += len(raw)
            lines += text.count("\n")
            if first:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not raw:
                return


def _write_stream(files: list[Path], tokenizer: PretrainedTokenizer, stream: Path, dtype: np.dtype) -> None:
    """All documents' tokens, one after the other, as raw bytes."""
    bos, eos, context = added_bos(tokenizer), tokenizer.eos_token_id, context_of(tokenizer)
    with stream.open("wb") as out:
        for file in files:
            last = None
            chunks = stable_chunks(_read_blocks(file), partial(encode, tokenizer), context=context)
            while group := list(islice(chunks, _BLOCKS_AT_ONCE)):
                for ids in encode_chunks(tokenizer, group):
                    if last is None:
                        ids = with_bos(ids, bos)
                    out.write(np.asarray(ids, dtype).tobytes())  # `tofile` loses the error of a full disk
                    last = ids[-1] if ids else last
            if eos is not None and last != eos:
                out.write(np.asarray([eos], dtype).tobytes())
