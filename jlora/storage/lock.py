"""One writer for a directory: a lock that ends with its process, however that ends."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

LOCK = ".lock"
"""The file in the directory. It is there while the directory is written to, and stays behind a process that was killed."""

_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems without locks answer (some network mounts). There, nothing guards."""


class InUse(RuntimeError):
    """Another process writes to the directory."""


@contextmanager
def only_writer(directory: Path, doing: str) -> Iterator[None]:
    """Holds `directory` for this process.

    Args:
        directory: must exist.
        doing: what is done to it, for the other's error: "trained".

    Raises:
        InUse: when another process (or another call in this one) holds it. Nothing is touched then.
    """
    path = directory / LOCK
    descriptor = _take(path, doing)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: whoever opened it in between finds it gone and looks again
        os.close(descriptor)


def _take(path: Path, doing: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _lock(descriptor)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            process, _, host = os.read(descriptor, 300).decode(errors="replace").strip().partition(" ")
            os.close(descriptor)
            raise InUse(
                f"{str(path.parent)!r} is being {doing} by process {process or '(just started)'}"
                + (f" on {host}" if host else "")
                + ". Wait until it ends, or stop it (its state is saved then)."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
