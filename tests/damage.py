"""Damage to the files of a directory, and what is to come of it: one clear error, quickly, and nothing written."""

import json
import struct
import time
from pathlib import Path

import pytest

WEIGHTS = "model.safetensors"


def edit_json(file, change):
    def apply(directory):
        fields = json.loads((directory / file).read_text())
        changed = change(fields)
        (directory / file).write_text(json.dumps(fields if changed is None else changed))

    return apply


def text(file, content):
    return lambda directory: (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def raw(change, file=WEIGHTS):
    """Changes the bytes of a file."""
    return lambda directory: (directory / file).write_bytes(change((directory / file).read_bytes()))


def header(change, file=WEIGHTS):
    """Changes the header of a safetensors file, the data left as they are."""

    def apply(data):
        (length,) = struct.unpack("<Q", data[:8])
        fields = json.loads(data[8 : 8 + length])
        changed = change(fields)
        encoded = json.dumps(fields if changed is None else changed).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    return raw(apply, file)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(call, directory: Path) -> str:
    """The message of the error, which came quickly, says something, and changed no file."""
    before, started = files(directory), time.process_time()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call()
    # Bounds what hangs or allocates, not speed: a case takes a few hundredths of a second of processor time.
    assert time.process_time() - started < 20
    assert files(directory) == before
    message = str(error.value)
    assert len(message) > 20 and type(error.value) in (ValueError, FileNotFoundError)
    return message
