"""One writer for a directory, on any host that sees it: a lock that ends with its process, however that ends.

The lock is the kernel's (`flock`), which also goes by the server of a network file system where that passes locks on. Not all do;
so the holder leaves a record of itself in the file, and touches it every few seconds. Who gets the lock and finds another host's
record waits until it has seen whether that one still lives.
"""

import errno
import json
import math
import os
import platform
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jlora._typing import JsonObject

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

LOCK = ".lock"
"""The file in the directory. It is there while the directory is written to, and stays behind a process that was killed."""
BEAT = 10.0
"""Seconds from one sign of life to the next."""
SILENT = 60.0
"""Seconds without one after which a process of another host counts as dead. Network file systems show changes within half of it."""

_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems without locks answer (some network mounts). There, only the records guard."""

_FIELDS = {"pid", "host", "machine", "started", "token"}


class InUse(RuntimeError):
    """Another process writes to the directory."""


class Held:
    """A lock that this process holds."""

    def __init__(self, path: Path, record: JsonObject):
        self._path, self._record = path, record

    def check(self) -> None:
        """
        Raises:
            InUse: when another process has taken the lock over, which it does after a long silence: of a host that was
                suspended, or cut off from the file system. Nothing more may be written then.
        """
        found = _read(self._path)
        if found is not None and found.get("token") == self._record["token"]:
            return
        who = _who(found) if found else "another process, which has ended since"
        raise InUse(
            f"{str(self._path.parent)!r} was taken over by {who}, since this process gave no sign of life for a while. It stops "
            "here, and has written nothing since."
        )


@contextmanager
def only_writer(directory: Path, doing: str) -> Iterator[Held]:
    """Holds `directory` for this process.

    Args:
        directory: must exist.
        doing: what is done to it, for the other's error: "trained".

    Raises:
        InUse: when another process (or another call in this one) holds it. Nothing is touched then.
    """
    path = directory / LOCK
    descriptor = _take(path, doing)
    record = _own_record()
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(descriptor, over), daemon=True)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)
        beats.start()
        yield Held(path, record)
    finally:
        over.set()
        if beats.is_alive():
            beats.join()
        if (_read(path) or {}).get("token") == record["token"]:
            path.unlink(
                missing_ok=True
            )  # before it is let go: whoever opened it in between finds it gone and looks again
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in this block for the same file, which need not exist."""
    while True:
        try:
            descriptor = _take(path.with_name(f".{path.name}{LOCK}"), "written")
            break
        except InUse:
            time.sleep(0.01)
    try:
        yield
    finally:
        path.with_name(f".{path.name}{LOCK}").unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, doing: str) -> int:
    """A descriptor of the file, which this process alone holds."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            locks = _lock(descriptor)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                _refuse_living(path, doing, locks=locks)
                return descriptor
        except BlockingIOError:
            found = _read(path)
            os.close(descriptor)
            raise _in_use(path, doing, found) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the file system has locks.

    Raises:
        BlockingIOError: when another process holds this one.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return False
    return True


def _refuse_living(path: Path, doing: str, *, locks: bool) -> None:
    """Raises InUse when the process of the record lives in spite of the lock: on another host, or where there are no locks."""
    found = _read(path)
    if found is None or "token" not in found:
        return  # nobody's, or an older version's, which knew no other host
    if found["machine"] == _machine():
        if not locks and _started(found["pid"]) == found["started"] is not None:
            raise _in_use(path, doing, found)
        return
    seen, wait = _sign(path), SILENT - _age(path)
    if wait > 0:
        warnings.warn(
            f"{str(path.parent)!r} is held by {_who(found)}: waiting up to {math.ceil(wait)} s for a sign of its life",
            stacklevel=2,
        )
    until = time.monotonic() + wait
    while time.monotonic() < until:
        time.sleep(min(0.5, BEAT / 4))
        if _sign(path) != seen:
            raise _in_use(path, doing, found)
    warnings.warn(
        f"{str(path.parent)!r} is taken over from {_who(found)}, which has given no sign of life for {SILENT:.0f} s",
        stacklevel=2,
    )


def _in_use(path: Path, doing: str, found: JsonObject | None) -> InUse:
    return InUse(
        f"{str(path.parent)!r} is being {doing} by {_who(found)}. Wait until it ends, or stop it (its state is saved then)."
    )


def _who(found: JsonObject | None) -> str:
    if found is None:
        return "process (just started)"
    return f"process {found['pid']}" + (f" on {found['host']}" if found["host"] else "")


def _beat(descriptor: int, over: threading.Event) -> None:
    """Signs of life, until it is over."""
    while not over.wait(BEAT):
        with suppress(OSError, NotImplementedError):  # a file system that is away for a while
            os.utime(descriptor)


def _sign(path: Path) -> tuple[int, bytes] | None:
    """What a sign of life changes. The file is opened anew, by which network file systems look at the server's."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    probe = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> JsonObject | None:
    """The record in the file, of any version; None: there is none."""
    try:
        text = path.read_bytes()[:2000].decode(errors="replace").strip()
    except OSError:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.keys() >= _FIELDS:
        return found
    process, _, host = text.partition(" ")  # as older versions wrote it
    return {"pid": process, "host": host} if process else None


def _own_record() -> JsonObject:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(pid),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """What is the same for all processes between which locks hold, in whatever container they are: those of one kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.system()} {socket.gethostname()}"


def _started(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None: there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]  # field 22: behind the name stands field 3
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "unknown"
