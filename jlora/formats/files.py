"""Writing a file or a directory whole or not at all, and taking nothing that is there for ours."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = ".partial-"
"""Between an output's name and random characters, in the hidden name that it has while it is written."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXTS = ("no space left on device", "disk quota exceeded", "(os error 28)", "(os error 122)")
"""What libraries make of the two where they do not raise an OSError: tensorstore, safetensors, tokenizers."""


class NoSpace(OSError):
    """A full disk, in words for the user."""


def no_space(error: BaseException, path: str | os.PathLike | None = None, *, needed: int | None = None) -> str | None:
    """One line on the full disk (or quota) behind an error, its causes included; None when it is another error.

    Args:
        error: of any library; a `NoSpace` speaks for itself.
        path: what was being written; default: the file that the error names.
        needed: bytes that were to be written, where that is known.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in chain:
        if isinstance(cause, NoSpace):
            return str(cause)
    full = [c for c in chain if getattr(c, "errno", None) in _FULL or any(t in str(c).lower() for t in _FULL_TEXTS)]
    if not full:
        return None
    names = [path, *(getattr(c, "filename", None) for c in full)]
    place = Path(next((os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)), "."))
    return f"no space left on {_disk(place)} for {str(place)!r}" + (
        f": needs about {_size(needed)}, {_size(_free(place))} free" if needed else f": {_size(_free(place))} free"
    )


@contextmanager
def full_disk_said(path: str | os.PathLike, *, needed: int | None = None, advice: str = "") -> Iterator[None]:
    """Turns an error for want of space into a `NoSpace` that names `path`, followed by `advice`."""
    try:
        yield
    except Exception as error:
        if said := no_space(error, path, needed=needed):
            raise NoSpace(f"{said}. {advice}".strip()) from error
        raise


def _there(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next((p for p in (path.absolute(), *path.absolute().parents) if p.exists()), Path("/"))


def _disk(path: Path) -> str:
    """Where the file system of a path is mounted."""
    return next(str(p) for p in (_there(path), *_there(path).parents) if p.is_mount() or p == p.parent)


def _free(path: Path) -> int:
    return shutil.disk_usage(_there(path)).free


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:,.0f} KiB"


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
def whole_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory beside `path` to write into, which becomes `path` when the block ends and is removed when it fails.

    Args:
        replace: in place of what is at `path`, which goes when the new one is whole.

    Raises:
        FileExistsError: without `replace`, when there is something at `path` other than an empty directory.
    """
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
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
        if replace and path.exists():
            path.rename(partial.with_name(f"{partial.name}-before"))
        partial.rename(path)  # also onto an empty directory
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove_partial(path)


def remove_directory(path: Path) -> None:
    """Removes a directory so that no half of it is ever seen under its name."""
    remove_partial(path)
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f"{_prefix(path)}gone"))
    remove_partial(path)


def remove_partial(path: Path) -> None:
    """Removes what a killed process left of an earlier attempt to write `path`."""
    _remove(path.parent.glob(f"{glob.escape(_prefix(path))}*"))


def remove_all_partial(directory: Path) -> None:
    """Removes what killed processes left of attempts to write anything in a directory."""
    _remove(path for path in directory.glob(".*") if is_partial(path.name))


def _remove(left: Iterable[Path]) -> None:
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file name is one that is only given while something is written or removed."""
    return name.startswith(".") and _PARTIAL in name


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
