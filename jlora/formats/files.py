"""Writing a file or a directory whole or not at all, and taking nothing that is there for ours."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial-"
"""Between an output's name and random characters, in the hidden name that it has while it is written."""


def refuse_existing(path: str | os.PathLike) -> Path:
    """The path, when nothing is there yet.

    Raises:
        FileExistsError: when something is.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists; choose another file name or remove it first.")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` when the block ends and is removed when it fails.

    The name is new and nobody else's, what a killed process left under such a name is removed, and the bytes are on the disk
    before they get the name `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path)
    descriptor, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # `mkstemp` and safetensors leave files that nobody else can read
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to write into, which becomes `path` when the block ends and is removed when it fails.

    Raises:
        FileExistsError: when there is something at `path` other than an empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{str(path)!r} exists; choose another directory or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for file in partial.rglob("*"):
            _flush(file)
        _flush(partial)
        partial.rename(path)  # also onto an empty directory
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_partial(path: Path) -> None:
    """Removes what a killed process left of an earlier attempt to write `path`."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}{_PARTIAL}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """To the disk: a rename may outlive a power cut that the bytes behind it do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
