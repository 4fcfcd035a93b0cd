"""Compiled programs are kept on disk, so that the next command of the same shapes does not compile them again.

JAX's persistent compilation cache, for the commands alone: programs that import jlora set it themselves.
"""

import hashlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from jlora.cli.as_trained import note

OFF = "--no-compilation-cache"
VARIABLE = "JLORA_CACHE"
MOST_BYTES = 4 << 30
"""Of all entries; the step of a model of 30 layers takes about a MiB."""
_FAILED = re.compile(r"Error (?:read|writ)ing persistent compilation cache entry for '([^']+)'")


def keep_compiled(wanted: bool) -> None:
    """Turns the cache on or off.

    One that JAX was given by its own variables stays as it is. Where none can be written, that is said, and there is none.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        directory = cache_directory()
        try:
            _prepare(directory)
        except OSError as error:
            note(
                f"compiled programs are not kept: {directory}: {error.strerror or error} (set {VARIABLE}, or say {OFF})"
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # All of them: a small program is read in a millisecond and compiled in twenty, and a command has a hundred.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_directory() -> Path:
    """Of this user and this sort of processor, whose instructions compiled programs use: a home may be on several machines."""
    place = os.environ.get(VARIABLE)
    if place:
        root = Path(place).expanduser()
    else:
        caches = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
        root = Path(caches or Path.home() / ".cache") / "jlora"
    return (root / "compilation" / f"{platform.machine()}-{_processor()}").absolute()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def _prepare(directory: Path) -> None:
    """Makes the directory, readable and writable for this user alone, since what lies in it is run; leaves room in it.

    Raises:
        OSError: it cannot be made or written, or is another's.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "geteuid"):
        status = directory.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(0, "others may write to it, and what lies in it is run")
    with tempfile.TemporaryFile(dir=directory):
        pass
    _prune(directory)


def _prune(directory: Path) -> None:
    """Removes the entries not used for longest, until what is left is within `MOST_BYTES`. Another process may do so too."""
    found = []
    for file in directory.glob("*-cache"):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    left = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if left <= MOST_BYTES:
            break
        file.unlink(missing_ok=True)
        left -= size


def repairing(show: Callable[..., None]) -> Callable[..., None]:
    """`warnings.showwarning` that mends the cache first.

    JAX writes entries in place and never over one that is there: of a process that was killed, or of a full disk, half an
    entry would stay, and be warned of for ever. The entries of the program that JAX warns of are removed; it is compiled,
    and written again. So is one that another process is writing right now, which is read half.
    """

    def shown(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        failed = _FAILED.match(str(message))
        directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if failed is None or not directory:
            show(message, category, filename, lineno, *rest)
            return
        for file in Path(directory).glob("*-cache"):
            if file.name.startswith(f"{failed[1]}-"):
                file.unlink(missing_ok=True)
        note(f"the compiled program {failed[1]!r} could not be kept or read; it is compiled again ({message})")

    return shown
