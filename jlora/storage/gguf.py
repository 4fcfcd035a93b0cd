"""GGUF files read within bounds: the header checked against the file before anything is believed, tensors mapped one at a time.

Nothing of the file is allocated by a number that it states without the bytes being there. What ggml requires of a file is
required here: aligned tensors one behind the other, each whole in the file, keys and names once.

Reference: the GGUF specification (ggml, docs/gguf.md); ggml, `src/gguf.cpp` (`gguf_init_from_file`).
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora._typing import Json, JsonObject
from jlora.storage.fields import is_integer, shown

SUFFIX = ".gguf"
MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the first had other widths and is three years gone
_MAX_ENTRIES = 1 << 16
"""Of keys, and of tensors. The deepest models have some ten thousand tensors."""
_MAX_NAME = 1 << 16
"""Bytes of a key, as the specification has it, or of a tensor's name."""
_MAX_HEADER = 1 << 28
"""Bytes before the tensors. The largest known, a vocabulary of a quarter million tokens, take a twentieth of it."""
_MAX_STRINGS = 1 << 21
"""Of all lists together: eight times the largest vocabulary."""
_MAX_AXES = 4
_ALIGNMENT = 32
"""Where the file says none."""

_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
"""The name of a part of a split model. Reference: llama.cpp, `llama_split_path`."""


class TensorType(NamedTuple):
    """How the numbers of a tensor are stored."""

    name: str
    block: int
    """Neighbours in a row that are packed together."""
    size: int
    """Bytes of a block."""


TYPES: Mapping[int, TensorType] = {
    number: TensorType(*row)
    for number, row in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
        26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip
"""`ggml_type` -> what it is, as `gguf.GGML_QUANT_SIZES` has it."""

_NUMBERS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""`gguf_type` of a number -> NumPy's name of it."""
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


class StoredTensor(NamedTuple):
    """Where a tensor is, and what."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    shape: tuple[int, ...]
    """In NumPy's order, the last axis in neighbouring bytes; GGUF counts them the other way round."""
    type: TensorType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.size


class Damaged(ValueError):
    """What is wrong with a file, as the end of a sentence."""


class GGUFFile:
    """The metadata and the tensors of a file, or of all the files of a split model, of which the first is given.

    Example: `f = GGUFFile(path); f.fields["general.architecture"], f.tensors["token_embd.weight"].shape`

    Raises:
        FileNotFoundError: no such file, or a part of a split model that is missing.
        ValueError: when a file is not valid GGUF, naming what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.files = _parts(self.path)
        self.fields: Mapping[str, Json] = {}
        """Key -> value; lists of numbers are NumPy arrays."""
        self.tensors: dict[str, StoredTensor] = {}
        self.header_size = 0
        """Bytes of the first file before its tensors."""
        for number, file in enumerate(self.files):
            fields, tensors, size = _read_header(file)
            self._check_split(file, fields, number)
            if number == 0:
                self.fields, self.header_size = fields, size
            again = self.tensors.keys() & tensors.keys()
            if again:
                raise ValueError(f"{str(file)!r} holds {min(again)!r}, which another part of the model holds already.")
            self.tensors |= tensors
        promised = self.fields.get("split.tensors.count")
        if len(self.files) > 1 and promised is not None and promised != len(self.tensors):
            raise ValueError(
                f"{str(self.path)!r} says that the parts hold {shown(promised)} tensors, and they hold {len(self.tensors)}. "
                "They are of different models; download them together."
            )

    def _check_split(self, file: Path, fields: Mapping[str, Json], number: int) -> None:
        count = fields.get("split.count", 1)
        count = count if is_integer(count) and count > 0 else 1
        if count != len(self.files):
            raise ValueError(
                f"{str(file)!r} is one of {count} parts of a model"
                + ("; give the first of them, " if count > 1 else ", ")
                + f"which are named …-00001-of-{count:05}.gguf."
            )
        if count > 1 and fields.get("split.no") != number:
            said = shown(fields.get("split.no"))
            raise ValueError(f"{str(file)!r} says that it is part {said}, counted from 0, and its name says {number}.")

    def read(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they are stored, uint8 [*, bytes of a row], mapped from the file for as long as it is used."""
        found = self.tensors[name]
        *rows, row = found.shape or (1,)
        shape = (*rows, row // found.type.block * found.type.size)
        return np.memmap(found.file, np.uint8, mode="r", offset=found.offset, shape=shape)


def is_gguf(path: Path) -> bool:
    """Whether it is a file that has the name or the beginning of a GGUF file."""
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _parts(path: Path) -> list[Path]:
    """The files of a model, of which `path` is the only or the first one."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    names = [f"{match['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, min(count, _MAX_ENTRIES) + 1)]
    if number != 1 or not names:
        raise ValueError(
            f"{str(path)!r} is part {number} of {count} of a model; give the first, …-00001-of-{count:05}.gguf."
        )
    files = [path.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{str(path)!r} is the first of {count} parts of a model; missing: {', '.join(missing[:5])}{more}. Download them into "
            "the same directory."
        )
    return files


def _read_header(file: Path) -> tuple[JsonObject, dict[str, StoredTensor], int]:
    """(fields, tensors, bytes before the tensors) of one file."""
    try:
        with file.open("rb") as raw:
            if os.fstat(raw.fileno()).st_size < 24:
                raise Damaged("it is shorter than a header")
            with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data, file).read()
    except Damaged as error:
        raise ValueError(f"{str(file)!r} is not a valid GGUF file: {error}. Download or write it again.") from None
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


class _Header:
    """The bytes of a header, read from front to back. Every method that reads raises `Damaged` at the end of the file."""

    def __init__(self, data: mmap.mmap, file: Path):
        self._data, self._file, self._size = data, file, len(data)
        self._at = 0
        self._strings = 0

    def read(self) -> tuple[JsonObject, dict[str, StoredTensor], int]:
        if self._take(4) != MAGIC:
            raise Damaged("it does not begin with 'GGUF'")
        version = self._integer("<I")
        if version not in _VERSIONS:
            turned = int.from_bytes(version.to_bytes(4, "big"), "little") in (*_VERSIONS, 1)
            raise Damaged(
                f"it is {'big-endian' if turned else f'of version {version}'}; read are versions 2 and 3, little-endian"
            )
        tensors, keys = self._count("tensors"), self._count("keys")
        fields: JsonObject = {}
        for _ in range(keys):
            key = self._text(_MAX_NAME)
            if key in fields:
                raise Damaged(f"the key {shown(key)} is there twice")
            fields[key] = self._value(key)
        places = [self._tensor() for _ in range(tensors)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not is_integer(alignment) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise Damaged(f"`general.alignment` must be a power of two from 8 up; got {shown(alignment)}")
        start = _aligned(self._at, alignment)
        return fields, dict(self._placed(places, start, alignment)), start

    def _placed(
        self, places: list[tuple[str, tuple[int, ...], TensorType, int]], start: int, alignment: int
    ) -> Iterator[tuple[str, StoredTensor]]:
        names: set[str] = set()
        expected = 0
        for name, shape, kind, offset in places:
            if name in names:
                raise Damaged(f"the tensor {shown(name)} is there twice")
            names.add(name)
            if offset != expected:
                raise Damaged(
                    f"the tensor {shown(name)} is said to be at {offset}, and the one before it ends at {expected}"
                )
            found = StoredTensor(self._file, start + offset, shape, kind)
            if found.offset + found.nbytes > self._size:
                raise Damaged(
                    f"the tensor {shown(name)}, {kind.name} {list(shape)}, ends at byte {found.offset + found.nbytes} of a file of "
                    f"{self._size}"
                )
            expected = _aligned(offset + found.nbytes, alignment)
            yield name, found

    def _tensor(self) -> tuple[str, tuple[int, ...], TensorType, int]:
        """(name, shape, type, offset)"""
        name = self._text(_MAX_NAME)
        axes = self._integer("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise Damaged(f"the tensor {shown(name)} has {axes} axes; there are 1 to {_MAX_AXES}")
        shape = struct.unpack(f"<{axes}Q", self._take(8 * axes))[::-1]
        number = self._integer("<I")
        if number not in TYPES:
            raise Damaged(f"the tensor {shown(name)} is of type {number}, which is none that is known")
        kind, offset = TYPES[number], self._integer("<Q")
        if 0 in shape or math.prod(shape) >= 1 << 62:
            raise Damaged(f"the tensor {shown(name)} has the shape {list(shape)}")
        if shape[-1] % kind.block:
            raise Damaged(
                f"rows of {shape[-1]} of the tensor {shown(name)} do not divide into {kind.name}'s blocks of {kind.block}"
            )
        return name, shape, kind, offset

    def _value(self, key: str) -> Json:
        kind = self._integer("<I")
        if kind == _STRING:
            return self._text()
        if kind in _NUMBERS:
            value = self._numbers(kind, 1)[0]
            # The shortest decimal that is this float32: 1e-06, not 9.999999974752427e-07.
            return float(str(value)) if kind == _FLOAT32 else value.item()
        if kind != _ARRAY:
            raise Damaged(f"the key {shown(key)} is of type {kind}, which is none that is known")
        of, count = self._integer("<I"), self._integer("<Q")
        if of in _NUMBERS:
            return self._numbers(of, count)
        if of != _STRING:
            raise Damaged(f"the key {shown(key)} is a list of type {of}; lists are of text or of numbers")
        self._strings += count
        if self._strings > _MAX_STRINGS or 8 * count > self._size - self._at:
            raise Damaged(f"the key {shown(key)} is said to be a list of {count} texts, for which there is no room")
        return [self._text() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize * count), dtype)

    def _text(self, most: int | None = None) -> str:
        length = self._integer("<Q")
        if most is not None and length > most:
            raise Damaged(f"a name of {length} bytes at byte {self._at}; there are at most {most}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise Damaged(f"the text at byte {self._at - length} is not UTF-8") from None

    def _count(self, what: str) -> int:
        count = self._integer("<Q")
        if count > _MAX_ENTRIES:
            raise Damaged(f"it has {count} {what}; read are at most {_MAX_ENTRIES}")
        return count

    def _integer(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, length: int) -> bytes:
        start, end = self._at, self._at + length
        if end > self._size:
            raise Damaged(f"{length} bytes are announced at byte {start} of a file of {self._size}")
        if end > _MAX_HEADER:
            raise Damaged(f"its header has more than {_MAX_HEADER:,} bytes")
        self._at = end
        return self._data[start:end]


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
