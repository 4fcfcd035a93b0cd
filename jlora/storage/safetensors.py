"""safetensors directories, single or sharded; each tensor is memory-mapped by itself, for as long as it is used."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora.storage.fields import check_fields, mapping_of, text
from jlora.storage.structured import read_json
from jlora.storage.whole import whole_file, write_text

INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}  # transformers and PEFT refuse files without it


_DTYPES: Mapping[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""The format's dtype names. Reference: safetensors' README, "Format"."""


class _Place(NamedTuple):
    file: Path
    offset: int
    """Of the tensor's first byte in the file."""


class Checkpoint:
    """The tensors of one file, or of a directory with `model.safetensors` or its sharded index.

    Example: `c = Checkpoint(directory); c.shapes["wte.weight"], c.read("wte.weight")`

    Raises:
        FileNotFoundError: when there are no safetensors, or a shard of the index is missing.
        ValueError: when a file is not valid safetensors, or lacks a tensor that the index promises.
    """

    def __init__(self, path: str | os.PathLike):
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Tensor name -> shape, without reading any tensor."""
        self.dtypes: dict[str, str] = {}
        """Tensor name -> the format's dtype name, such as "F32" or "BF16"."""
        files = _files(Path(path))
        placed = set().union(*(names for names in files.values() if names is not None))
        for file, promised in files.items():
            self._open(file, promised, placed)

    def _open(self, file: Path, promised: set[str] | None, placed: set[str]):
        """Takes the names that the index promises of this file, and those that it places nowhere; without an index all."""
        if not file.is_file():
            if file.exists() or file.is_symlink():
                raise ValueError(f"{str(file)!r} is not a file. Is it a directory, or a link to what is not there?")
            raise FileNotFoundError(f"The shard {file.name!r} of {str(file.parent)!r} is missing; download it again.")
        try:
            with file.open("rb") as raw:  # safetensors says "No such file" of one that may not be read
                length = int.from_bytes(raw.read(8), "little")
            # Checks the header against the file: sizes, overlaps, dtypes.
            with safe_open(file, framework="numpy") as checked:
                names = set(checked.keys())
        except OSError as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is not a valid safetensors file ({error}). Download or write it again."
            ) from error
        with file.open("rb") as raw:
            raw.seek(8)
            header = json.loads(raw.read(length))
        if promised is not None and promised - names:
            raise ValueError(
                f"{INDEX} places {sorted(promised - names)[:3]} in {file.name!r}, which does not hold them. The shards are of "
                "another checkpoint than the index; download them together."
            )
        for name in names if promised is None else promised | (names - placed):
            self.shapes[name], self.dtypes[name] = tuple(header[name]["shape"]), header[name]["dtype"]
            self._places[name] = _Place(file, 8 + length + header[name]["data_offsets"][0])

    def read(self, name: str) -> np.ndarray:
        """One tensor as a read-only host array of its own dtype (bfloat16 as ml_dtypes'), mapped from the file.

        A mapping of its own gives its pages back with the array; one of the whole file would keep them all resident.
        """
        if self.dtypes[name] not in _DTYPES:
            raise ValueError(
                f"{name!r} in {str(self._places[name].file)!r} is {self.dtypes[name]}, which jlora does not read."
            )
        place, shape, dtype = self._places[name], self.shapes[name], np.dtype(_DTYPES[self.dtypes[name]])
        if 0 in shape or not shape:  # cannot be mapped
            with place.file.open("rb") as raw:
                raw.seek(place.offset)
                return np.frombuffer(raw.read(dtype.itemsize if not shape else 0), dtype).reshape(shape)
        return np.memmap(place.file, dtype, mode="r", offset=place.offset, shape=shape)


def _files(path: Path) -> Mapping[Path, set[str] | None]:
    """File -> the names to take from it; None: all."""
    if path.is_file():
        return {path: None}
    if (path / "model.safetensors").exists() or (path / "model.safetensors").is_symlink():
        return {path / "model.safetensors": None}
    if (path / INDEX).is_file():
        weight_map = _weight_map(path / INDEX)
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file or "\0" in file:
                raise ValueError(f"{INDEX} names the shard {file!r}; a shard must be a file beside the index.")
            files.setdefault(path / file, set()).add(name)
        return dict(files)
    others = sorted(f.name for f in path.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".msgpack", ".h5"))
    raise FileNotFoundError(
        f"There is no model.safetensors and no {INDEX} in {str(path)!r}"
        + (
            f", only {', '.join(others)}: open it in transformers and call `model.save_pretrained(directory)`."
            if others
            else "."
        )
    )


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor name -> shard, from an index file."""
    fields = read_json(index)
    check_fields(fields, {"weight_map": mapping_of(text())}, where=repr(str(index)), required=("weight_map",))
    return fields["weight_map"]


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file, written whole or not at all. The bytes depend on the tensors alone."""
    path = Path(path)
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with whole_file(path, needed=sum(array.nbytes for array in ordered.values())) as partial:
        save_file(ordered, partial, metadata=_METADATA)


def save_sharded(
    directory: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, max_shard_bytes: int
) -> Iterator[Path]:
    """`model.safetensors`, or shards of at most `max_shard_bytes` with their index. Yields each file when it is written."""
    directory = Path(directory)
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda t: t.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        save_tensors(directory / file, {name: tensors[name] for name in names})
        yield directory / file
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(directory / INDEX, json.dumps(index, indent=2, sort_keys=True))
        yield directory / INDEX
