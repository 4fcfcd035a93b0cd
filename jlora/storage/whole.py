"""Writing a file or a directory whole or not at all, and taking nothing that is there for ours."""

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

Content: TypeAlias = Path | bytes
"""A file as it is, or the bytes of one that is not on disk."""

_PARTIAL = ".partial-"
"""Between an output's name and random characters, in the name of the hidden directory beside it where it is written."""
_LOCK = ".lock"
"""In that directory: a file that the writing process holds locked, so that nobody takes a living one's work for a dead one's."""
_BEFORE = ".before"
"""In that directory: what is being replaced, until what replaces it is in its place."""
_NEW = "new"
"""Stands for the name of files of which none is the last."""
_MOVES = ".moves"
"""In that directory: [name, identity] of the files that go one by one into a directory that is there already, in their order."""
_NAME_BYTES = 200
"""Of an output's name in its hidden directory's, which must stay within the 255 bytes that file systems allow."""

_FULL = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "the disk quota is used up on",
    errno.EFBIG: "a file that large is not allowed on",
}
_FULL_TEXTS = {
    "no space left on device": errno.ENOSPC,
    "(os error 28)": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "(os error 122)": errno.EDQUOT,
    "file too large": errno.EFBIG,
}
"""What libraries make of them where they do not raise an OSError: tensorstore, safetensors, tokenizers."""


class NoSpace(OSError):
    """A full disk, in words for the user.

    Args:
        said: one line without a full stop, from `no_space`.
        advice: what to do, where more is to be said than to make room.
        needed: bytes that were to be written, where that is known.
    """

    def __init__(self, said: str, advice: str = "", needed: int | None = None):
        super().__init__(f"{said}. {advice}".strip())
        self.said, self.advice, self.needed = said, advice, needed


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
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    for cause in chain:
        if isinstance(cause, NoSpace):
            return cause.said
    full = {c: number for c in chain if (number := _full_number(c))}
    if not full:
        return None
    names = [path, *(getattr(c, "filename", None) for c in full)]
    name = next((os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)), None)
    if name is None:
        return f"{_FULL[next(iter(full.values()))]} the device"
    place = Path(name)
    free = f"{size_said(shutil.disk_usage(_there(place)).free)} free"
    shown = Path(*(part for part in place.parts if not is_partial(part)))
    return f"{_FULL[next(iter(full.values()))]} {_disk(place)} for {str(shown)!r}: " + (
        f"needs about {size_said(needed)}, {free}" if needed else free
    )


@contextmanager
def full_disk_said(path: str | os.PathLike, *, needed: int | None = None, advice: str = "") -> Iterator[None]:
    """Turns an error for want of space into a `NoSpace` that names `path`; of several around each other the
    innermost that knows what is needed says it, and the outermost advises."""
    try:
        yield
    except Exception as error:
        more = needed if isinstance(error, NoSpace) and error.needed is None else None
        said = no_space((more and error.__cause__) or error, path, needed=needed)
        if said is None or (isinstance(error, NoSpace) and not advice and not more):
            raise
        raise NoSpace(said, advice, needed) from error


def _full_number(error: BaseException) -> int | None:
    if getattr(error, "errno", None) in _FULL:
        return error.errno  # pyright: ignore[reportAttributeAccessIssue]
    text = str(error).lower()
    return next((number for phrase, number in _FULL_TEXTS.items() if phrase in text), None)


def _there(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next((p for p in (path.absolute(), *path.absolute().parents) if p.exists()), Path("/"))


def _disk(path: Path) -> str:
    """Where the file system of a path is mounted."""
    return next(str(p) for p in (_there(path), *_there(path).parents) if p.is_mount() or p == p.parent)


def size_said(n_bytes: int) -> str:
    """A size in words, such as "9.4 MiB"."""
    for exponent, shown in ((30, ",.1f"), (20, ",.1f"), (10, ",.0f")):
        if n_bytes >= 1 << exponent:
            return f"{n_bytes / (1 << exponent):{shown}} {'KMG'[exponent // 10 - 1]}iB"
    return f"{n_bytes} bytes"


def refuse_existing(path: str | os.PathLike) -> Path:
    """The path, when nothing is there yet and something can be written there.

    Raises:
        FileExistsError: when something is.
        PermissionError, NotADirectoryError and other OSErrors: when nothing can be written there.
    """
    path = Path(path)
    try:
        path.lstat()
    except FileNotFoundError:
        check_writable(path)
        return path
    raise FileExistsError(f"{str(path)!r} exists; choose another file name or remove it first.")


def check_writable(path: str | os.PathLike, *, file: bool = False) -> None:
    """Tries whether something can be made at `path`, or in the directory there, before the work whose result is to go there.

    Args:
        file: it is to be a file.

    Raises:
        PermissionError, NotADirectoryError, IsADirectoryError and other OSErrors: when it cannot.
    """
    path = Path(path)
    if file and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    parent = next(p for p in (path if path.is_dir() else path.parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=parent))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


@contextmanager
def whole_file(path: Path, *, new: bool = False, needed: int | None = None) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends; when it fails, nothing of it is left.

    The name is new and nobody else's, what a killed process left of an earlier attempt is removed, the bytes are on the disk
    before they get the name `path`, and who may read it follows the umask, or the file that it replaces.

    Args:
        new: refuse to replace a file.
        needed: about how many bytes it will have, for the error of a full disk.

    Raises:
        FileExistsError: when `new`, and there is one by then.
        NoSpace: when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_said(path, needed=needed), _workshop(path) as partial:
        yield partial
        partial.chmod((path if path.is_file() else partial.parent / _LOCK).stat().st_mode & 0o777)
        _flush(partial)
        if new:
            refuse_existing(path)
        partial.replace(path)
        _flush(path.parent)


@contextmanager
def whole_directory(path: Path, *, replace: bool = False, needed: int | None = None) -> Iterator[Path]:
    """A directory to write into, which becomes `path` when the block ends; when it fails, nothing of it is left.

    Args:
        replace: in place of what is at `path`, which goes when the new one is whole.
        needed: about how many bytes it will have.

    Raises:
        FileExistsError: without `replace`, when there is something at `path` other than an empty directory.
        NoSpace: when the disk is full.
    """
    if path.is_dir():
        remove_partial(path / _NEW)
    if os.path.lexists(path) and not replace and not _is_empty(path):
        raise FileExistsError(f"{str(path)!r} exists; choose another directory or remove it first.")
    if not replace and path.is_dir() and not _can_be_replaced(path):
        with whole_files(path, last="", needed=needed) as partial:
            yield partial
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_said(path, needed=needed), _workshop(path) as partial:
        partial.mkdir()
        yield partial
        _flush_all(partial)
        if replace and os.path.lexists(path):
            before = partial.parent / _BEFORE
            before.mkdir()
            path.rename(before / path.name)
        partial.rename(path)  # also onto an empty directory
        _flush(path.parent)


@contextmanager
def whole_files(path: Path, *, last: str, replace: bool = False, needed: int | None = None) -> Iterator[Path]:
    """A directory to write files into, which all come to be in the directory `path` when the block ends, and else none.

    Other files that are there stay. What a process that was killed between two files had moved, the next one takes back
    (`remove_partial(path / last)`), unless they are to replace others: then the rest follows when the same is written again.

    Args:
        last: the file without which the others are not taken for anything; where there are files already, it is the first to
            go and the last to come, so that nobody reads new files by an old config.
        replace: whether files of the same names may be there, which are replaced.
        needed: about how many bytes they will have.

    Raises:
        FileExistsError: when a file of one of the names is there, and `replace` is off.
        NoSpace: when the disk is full.
    """
    if not path.is_dir() or (_is_empty(path) and _can_be_replaced(path)):
        with whole_directory(path, needed=needed) as partial:
            yield partial
        return
    with full_disk_said(path, needed=needed), _workshop(path / (last or _NEW)) as partial:
        partial.mkdir()
        yield partial
        names = sorted(
            (p.relative_to(partial) for p in partial.rglob("*") if not p.is_dir()), key=lambda p: str(p) == last
        )
        taken = [
            str(name) for name in names if (path / name).is_dir() or (not replace and os.path.lexists(path / name))
        ]
        if taken:
            raise FileExistsError(
                f"{str(path)!r} already holds {taken[0]!r}; choose another directory or remove it first."
            )
        _flush_all(partial)
        if replace and last:
            (path / last).unlink(missing_ok=True)
        if not replace:
            moves = [(str(name), _identity(partial / name)) for name in names]
            (partial.parent / _MOVES).write_text(json.dumps(moves))
            _flush(partial.parent / _MOVES)
        for name in names:
            (path / name).parent.mkdir(exist_ok=True)
            (partial / name).replace(path / name)
        _flush(path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """A UTF-8 file, whole or not at all."""
    content = text.encode("utf-8", "backslashreplace")  # a path that is no UTF-8 has surrogates
    with whole_file(Path(path), needed=len(content)) as partial:
        partial.write_bytes(content)


def remove_directory(path: Path) -> None:
    """Removes a directory so that no half of it is ever seen under its name."""
    if os.path.lexists(path):
        with _workshop(path) as aside:
            path.rename(aside)


def remove_partial(path: Path) -> None:
    """Removes what killed processes left of earlier attempts to write `path`; what a living one writes stays."""
    for work in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        _remove_abandoned(work)


def remove_all_partial(directory: Path) -> None:
    """The same of attempts to write anything in a directory that is ours, temporary files of other names among them."""
    for left in directory.glob(".*"):
        if not is_partial(left.name):
            continue
        if (left / _LOCK).is_file():
            _remove_abandoned(left)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file name is one that is only given while something is written or removed."""
    return name.startswith(".") and _PARTIAL in name


def _remove_abandoned(work: Path) -> None:
    """Removes a directory of `_workshop` whose process is dead."""
    if work.is_symlink() or not work.is_dir():
        return  # not ours
    if not (work / _LOCK).is_file():
        with suppress(OSError):  # it holds something, and is not ours
            work.rmdir()
        return
    lock = _locked(work / _LOCK, os.O_RDWR)
    if lock is not None:
        _remove(work, lock)


def check_size(path: Path, expected: int) -> None:
    """Raises an OSError when the file has another size, since something lost the error of a write."""
    size = path.stat().st_size
    if size != expected:
        full = shutil.disk_usage(path.parent).free < expected - size
        raise OSError(
            errno.ENOSPC if full else errno.EIO,
            f"{path.name} should have {expected:,} bytes and has {size:,}, so that writing it failed somewhere",
        )


@contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A name in a new hidden directory beside `path`, which is removed when the block ends, with what is left in it.

    A directory, because libraries write files of their own beside the one they are told to write, and kills leave them.
    """
    remove_partial(path)
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        lock = _locked(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if lock is not None:
            break  # else another process took the directory for an abandoned one before it was locked
    try:
        yield work / path.name
    finally:
        _remove(work, lock)


def _remove(work: Path, lock: int) -> None:
    """What was about to be replaced is put back first, half of several files taken back, and the lock goes last, by which another
    process knows the rest for ours."""
    for before in (work / _BEFORE).glob("*"):
        if not os.path.lexists(work.parent / before.name):
            before.rename(work.parent / before.name)
    _take_back_moves(work)
    for inside in work.iterdir():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside, ignore_errors=True)
        elif inside.name != _LOCK:
            inside.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    os.close(lock)


def _take_back_moves(work: Path) -> None:
    """Removes the files that were moved, where the last was not; another of the same name is somebody's."""
    try:
        moves = json.loads((work / _MOVES).read_text())
    except (FileNotFoundError, ValueError):  # none began
        return
    if not moves or not any(os.path.lexists(made / moves[-1][0]) for made in work.iterdir() if made.is_dir()):
        return
    for name, identity in moves:
        place = work.parent / name
        if os.path.lexists(place) and _identity(place) == identity:
            place.unlink()
        with suppress(OSError):  # the directory itself, or one that holds others
            place.parent.rmdir()


def _identity(path: Path) -> list[int]:
    """What a file keeps when it is renamed; the inode alone goes to another file when it is removed."""
    found = path.lstat()
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def _locked(path: Path, flags: int) -> int | None:
    """A descriptor of the file, locked until it is closed; None when another process holds it or has removed it."""
    try:
        import fcntl
    except ImportError:  # Windows, which does not let open files be removed
        return os.open(path, flags)
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: ours is written all the same, and others' are left alone
        if flags & os.O_CREAT:
            return descriptor
        os.close(descriptor)
        return None
    if not path.exists():
        os.close(descriptor)
        return None
    return descriptor


def _prefix(path: Path) -> str:
    return f".{os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])}{_PARTIAL}"


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _can_be_replaced(path: Path) -> bool:
    """Whether another directory can be renamed onto this empty one: not onto a link, a mount or ".", nor where the parent is not
    ours."""
    if path.is_symlink() or os.path.ismount(path) or path.name in ("", ".."):
        return False
    return os.access(path.absolute().parent, os.W_OK)


def _flush_all(directory: Path) -> None:
    for file in (*directory.rglob("*"), directory):
        _flush(file)


def _flush(path: Path) -> None:
    """To the disk: a rename may outlive a power cut that the bytes behind it do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(content: Content) -> int:
    """Bytes of a file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size
