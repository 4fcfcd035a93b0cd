"""Files and directories written whole or not at all: killed, on a full disk, beside what is somebody's, by two at once."""

import errno
import inspect
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jlora.storage import whole
from jlora.storage.whole import (
    NoSpace,
    check_size,
    check_writable,
    full_disk_said,
    no_space,
    refuse_existing,
    remove_partial,
    whole_directory,
    whole_file,
    whole_files,
    write_text,
)


def listing(directory):
    return sorted(p.relative_to(directory).as_posix() for p in Path(directory).rglob("*"))


def write_file(path, *, fail=None):
    with whole_file(path) as partial:
        partial.write_text("new")
        if fail:
            raise fail


def write_directory(path, *, fail=None):
    with whole_directory(path) as partial:
        (partial / "config.json").write_text("new")
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("new")
        if fail:
            raise fail


def write_files(path, *, fail=None, replace=False):
    with whole_files(path, last="config.json", replace=replace) as partial:
        (partial / "config.json").write_text("new")
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("new")
        if fail:
            raise fail


def replace_directory(path, *, fail=None):
    with whole_directory(path, replace=True) as partial:
        (partial / "config.json").write_text("new")
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("new")
        if fail:
            raise fail


WRITERS = {"file": write_file, "directory": write_directory, "files": write_files}
NAMES = ["out", "a[1]", "*?", "with space", "ünï", "a" * 250, ".hidden", "a.tar.gz", "new\nline"]
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@writers
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_whole_and_alone(write, name, tmp_path):
    write(tmp_path / "deeper" / name)
    path = tmp_path / "deeper" / name
    assert [p.name for p in path.parent.iterdir()] == [name]
    assert path.is_dir() == (write is not write_file)
    assert path.read_text() == "new" if path.is_file() else listing(path) == ["config.json", "sub", "sub/a.txt"]


@writers
@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
def test_what_fails_leaves_nothing(write, error, tmp_path):
    with pytest.raises(type(error)):
        write(tmp_path / "out", fail=error)
    assert listing(tmp_path) == []
    write(tmp_path / "out")


@writers
def test_a_link_beside_the_output_is_not_followed(write, tmp_path):
    """Under the names that were once used, and under those that are."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "out.partial").symlink_to("victim")
    (tmp_path / ".out.partial-file").symlink_to("victim")
    (tmp_path / ".out.partial-folder").symlink_to("folder")
    before = {p: p.lstat().st_ino for p in tmp_path.iterdir()}
    write(tmp_path / "out")
    assert (tmp_path / "victim").read_text() == (tmp_path / "folder" / "mine.txt").read_text() == "mine"
    assert {p: p.lstat().st_ino for p in before} == before
    assert not (tmp_path / "out").is_symlink()


@writers
def test_somebodys_own_file_of_such_a_name_stays(write, tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    (tmp_path / ".out.partial-notes").write_text("mine")
    (tmp_path / ".out.partial-drafts").mkdir()
    (tmp_path / ".out.partial-drafts" / "a.txt").write_text("mine")
    before = listing(tmp_path)
    write(tmp_path / "out")
    assert set(before) <= set(listing(tmp_path)) and (tmp_path / ".out.partial-drafts" / "a.txt").read_text() == "mine"


# Who may read it


@pytest.mark.parametrize(
    ("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_permissions_follow_the_umask(mask, file, directory, tmp_path):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file")
        with whole_file(tmp_path / "strict") as partial:  # as safetensors makes its files
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
        write_directory(tmp_path / "directory")
        write_files(tmp_path / "files")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "strict", "directory", "files")}
    assert modes == {"file": file, "strict": file, "directory": directory, "files": directory}


def test_a_replaced_file_keeps_who_may_read_it(tmp_path):
    write_text(tmp_path / "secret.json", "a")
    (tmp_path / "secret.json").chmod(0o600)
    write_text(tmp_path / "secret.json", "b")
    assert stat.S_IMODE((tmp_path / "secret.json").stat().st_mode) == 0o600


# Killed


KILLER = """
import os, sys
at, after, calls = int(sys.argv[1]), sys.argv[2] == "after", 0
def killing(call):
    def one(*args, **kwargs):
        global calls
        calls += 1
        if calls == at and not after:
            os.kill(os.getpid(), 9)
        try:
            return call(*args, **kwargs)
        finally:
            if calls == at:
                os.kill(os.getpid(), 9)
    return one
for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open", "chmod"):
    setattr(os, name, killing(getattr(os, name)))
"""


@pytest.mark.few(3)
@pytest.mark.parametrize("after", ["before", "after"])
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_every_call(writer, after, tmp_path):
    """Without jlora's imports, which would take a second each time."""
    write = WRITERS[writer]
    code = (
        f"{Path(whole.__file__).read_text()}\n{KILLER}\n{inspect.getsource(write)}\n{write.__name__}(Path(sys.argv[3]))"
    )
    for at in range(1, 100):
        path = tmp_path / str(at) / "out"
        path.parent.mkdir()
        if subprocess.run([sys.executable, "-S", "-E", "-c", code, str(at), after, str(path)]).returncode == 0:
            break
        if path.exists():
            assert (
                path.read_text() == "new" if writer == "file" else listing(path) == ["config.json", "sub", "sub/a.txt"]
            )
            remove_partial(path)
        else:
            write(path)
        assert os.listdir(path.parent) == ["out"]
    assert 8 < at < 99


@pytest.mark.parametrize("after", ["before", "after"])
def test_killed_while_it_is_replaced(after, tmp_path):
    """What was there is there whole, or what is to be."""
    source = Path(whole.__file__).read_text(), KILLER, inspect.getsource(replace_directory)
    code = "\n".join((*source, "replace_directory(Path(sys.argv[3]))"))
    seen = set()
    for at in range(1, 100):
        path = tmp_path / str(at) / "out"
        path.mkdir(parents=True)
        (path / "old.txt").write_text("old")
        if subprocess.run([sys.executable, "-S", "-E", "-c", code, str(at), after, str(path)]).returncode == 0:
            break
        remove_partial(path)
        assert os.listdir(path.parent) == ["out"]
        seen.add(tuple(listing(path)))
    assert seen == {("old.txt",), ("config.json", "sub", "sub/a.txt")} and 8 < at < 99


@pytest.mark.parametrize("after", ["before", "after"])
def test_killed_while_files_come_into_a_directory(after, tmp_path):
    """All or none beside what is somebody's, and the same can be written again."""
    source = Path(whole.__file__).read_text(), KILLER, inspect.getsource(write_files)
    code = "\n".join((*source, "write_files(Path(sys.argv[3]))"))
    everything = ["config.json", "mine.txt", "sub", "sub/a.txt"]
    halves = 0
    for at in range(1, 100):
        path = tmp_path / str(at)
        path.mkdir()
        (path / "mine.txt").write_text("mine")
        if subprocess.run([sys.executable, "-S", "-E", "-c", code, str(at), after, str(path)]).returncode == 0:
            break
        halves += (path / "sub/a.txt").exists() != (path / "config.json").exists()
        remove_partial(path / "config.json")
        assert listing(path) in (["mine.txt"], everything)
        if not (path / "config.json").exists():
            write_files(path)
        assert listing(path) == everything and (path / "mine.txt").read_text() == "mine"
    assert halves and 8 < at < 99


@pytest.mark.parametrize("name", ["config.json", "sub/a.txt"])
def test_interrupted_while_files_come_into_a_directory(name, tmp_path, monkeypatch):
    """What somebody put there under one of the names stays."""
    (tmp_path / "mine.txt").write_text("mine")
    replace = Path.replace

    def interrupted(self, target):
        if Path(target) == tmp_path / name:
            if name == "config.json":
                (tmp_path / "sub/a.txt").unlink()
                (tmp_path / "other").write_text("mine")
                (tmp_path / "other").rename(tmp_path / "sub/a.txt")
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path)
    kept = ["sub", "sub/a.txt"] if name == "config.json" else []
    assert listing(tmp_path) == ["mine.txt", *kept]


def test_interrupted_while_it_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    rename = Path.rename

    def interrupted(self, target):
        if Path(target) == tmp_path / "out" and self.parent.name != ".before":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "out")
    assert listing(tmp_path) == ["out", "out/old.txt"]


def test_a_directory_is_removed_at_once(tmp_path):
    write_directory(tmp_path / "out")
    whole.remove_directory(tmp_path / "out")
    whole.remove_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_all_that_is_left_in_a_directory_of_ours(tmp_path):
    (tmp_path / ".partial-7").mkdir()
    (tmp_path / ".partial-7" / "shard").touch()
    (tmp_path / ".x.partial-abc").touch()
    (tmp_path / ".x.partial-def").mkdir()
    (tmp_path / ".x.partial-def" / ".lock").touch()
    (tmp_path / ".mine").touch()
    with whole_file(tmp_path / "alive") as partial:
        partial.write_text("new")
        whole.remove_all_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine", "alive"]


def test_killed_within(tmp_path):
    """With what a library has made beside the file that it was to write."""
    code = (
        "import os; from pathlib import Path; from jlora.storage.whole import whole_file, whole_directory\n"
        f"with whole_directory(Path({str(tmp_path / 'out')!r})) as d, whole_file(d / 'model.safetensors') as f:\n"
        "    f.with_name('.tmpABCDEF').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(os.listdir(tmp_path)) == 1
    write_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@writers
def test_what_a_living_process_writes_stays(write, tmp_path):
    inside, done = threading.Event(), threading.Event()

    def other():
        with whole_file(tmp_path / "out") as partial:
            partial.write_text("other")
            inside.set()
            done.wait(60)
            assert partial.read_text() == "other"

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    remove_partial(tmp_path / "out")
    assert len(os.listdir(tmp_path)) == 1
    if write is write_file:
        write(tmp_path / "out")
        assert (tmp_path / "out").read_text() == "new"
    done.set()
    thread.join()
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "other"


# What is there already


def test_a_directory_with_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another directory"):
        write_directory(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    for write in (write_directory, write_files):
        with pytest.raises(FileExistsError, match="choose another directory"):
            write(tmp_path / "file")
    assert listing(tmp_path) == ["file", "out", "out/mine.txt"]


def test_files_come_into_a_directory_all_or_none(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    write_files(tmp_path)
    assert listing(tmp_path) == ["config.json", "mine.txt", "sub", "sub/a.txt"]
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(FileExistsError, match="already holds 'sub/a.txt'|already holds 'config.json'"):
        write_files(tmp_path)
    assert (tmp_path / "config.json").read_text() == "old"
    write_files(tmp_path, replace=True)
    assert (tmp_path / "config.json").read_text() == "new"
    with pytest.raises(ValueError):
        write_files(tmp_path, replace=True, fail=ValueError("no"))
    assert listing(tmp_path) == ["config.json", "mine.txt", "sub", "sub/a.txt"]


def test_a_directory_of_the_name_of_a_file_is_refused_before_anything_moves(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FileExistsError, match="config.json"):
        write_files(tmp_path, replace=True)
    assert listing(tmp_path) == ["config.json"]


@pytest.mark.parametrize("write", [write_directory, write_files])
def test_an_empty_directory_is_filled(write, tmp_path, monkeypatch):
    for name in ("empty", "mount", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    write(tmp_path / "empty")
    write(tmp_path / "link")
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p) == tmp_path / "mount" or ismount(p))
    inode = (tmp_path / "mount").stat().st_ino
    write(tmp_path / "mount")
    assert (tmp_path / "mount").stat().st_ino == inode and (tmp_path / "link").is_symlink()
    for name in ("empty", "mount", "there"):
        assert listing(tmp_path / name) == ["config.json", "sub", "sub/a.txt"]


def test_the_working_directory_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_directory(Path("."))
    assert listing(tmp_path) == ["config.json", "sub", "sub/a.txt"]


def test_a_new_file_does_not_replace_one_that_came_meanwhile(tmp_path):
    with pytest.raises(FileExistsError), whole_file(tmp_path / "out", new=True) as partial:
        partial.write_text("new")
        (tmp_path / "out").write_text("mine")
    assert (tmp_path / "out").read_text() == "mine" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["file", "directory", "link", "dangling"])
def test_refused_what_exists(there, tmp_path):
    path = tmp_path / there
    (tmp_path / "x").touch()
    make = {
        "file": path.touch,
        "directory": path.mkdir,
        "link": lambda: path.symlink_to("x"),
        "dangling": lambda: path.symlink_to("y"),
    }
    make[there]()
    with pytest.raises(FileExistsError, match="exists; choose another"):
        refuse_existing(path)


def test_refused_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        refuse_existing(tmp_path / "file" / "out")
    with pytest.raises(OSError) as long:
        refuse_existing(tmp_path / ("a" * 300))
    assert long.value.errno == errno.ENAMETOOLONG
    check_writable(tmp_path / "not" / "there" / "yet")
    assert os.listdir(tmp_path) == ["file"]

    def read_only(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/.x")

    monkeypatch.setattr(whole.tempfile, "mkdtemp", read_only)
    with pytest.raises(PermissionError) as denied:
        check_writable(tmp_path / "out")
    assert denied.value.filename == str(tmp_path / "out")


# A full disk


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/.partial"), "no space left on"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up on"),
        (OSError(errno.EFBIG, "File too large"), "a file that large is not allowed on"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: error: [Errno 28] No space left on device [tensorstore]"),
            "no space left on",
        ),
        (Exception("No space left on device (os error 28)"), "no space left on"),
        (
            chained(ValueError("could not be saved"), OSError(errno.ENOSPC, "No space left on device")),
            "no space left on",
        ),
    ],
)
def test_a_full_disk_is_said(error, says, tmp_path):
    path = tmp_path / "deeper" / "model.gguf"
    with pytest.raises(NoSpace) as raised, full_disk_said(path, needed=5 << 30):
        raise error
    said = str(raised.value)
    assert said.startswith(says) and f"for {str(path)!r}: needs about 5.0 GiB, " in said and said.endswith(" free.")
    assert "\n" not in said and ".partial" not in said
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [MemoryError("no space"), RuntimeError("RESOURCE_EXHAUSTED: 5 GB"), OSError(errno.EACCES, "x")]
)
def test_other_errors_are_none_of_a_full_disk(error, tmp_path):
    assert no_space(error, tmp_path) is None
    with pytest.raises(type(error)), full_disk_said(tmp_path):
        raise error


def test_the_innermost_says_what_and_the_outermost_what_to_do(tmp_path):
    with pytest.raises(NoSpace, match="^no space left on .*weights'?: needs about 3 bytes, .* free. Use --resume.$"):
        with full_disk_said(tmp_path, advice="Use --resume."), full_disk_said(tmp_path / "all", needed=100):
            with full_disk_said(tmp_path / "weights", needed=3):
                raise OSError(errno.ENOSPC, "No space left on device")


def test_the_size_is_said_by_whoever_knows_it(tmp_path):
    with pytest.raises(NoSpace, match="^no space left on .*out': needs about 5 bytes, .* free\\.$"):
        with full_disk_said(tmp_path / "out", needed=5), whole_directory(tmp_path / "out") as partial:
            (partial / "x").touch()
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("size", [0, 1, 99, 101])
def test_a_file_of_another_size_than_it_must_have_is_not_kept(size, tmp_path):
    with (
        pytest.raises(OSError, match=f"out should have 100 bytes and has {size}"),
        whole_file(tmp_path / "out") as partial,
    ):
        partial.write_bytes(bytes(size))
        check_size(partial, 100)
    assert os.listdir(tmp_path) == []


def test_a_short_file_on_a_full_disk(tmp_path, monkeypatch):
    usage = whole.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(NoSpace, match="out': 0 bytes free"), whole_file(tmp_path / "out") as partial:
        partial.write_bytes(bytes(50))
        check_size(partial, 100)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_within_a_directory_is_said_of_the_file(tmp_path):
    with pytest.raises(NoSpace) as raised, whole_directory(tmp_path / "out", needed=100) as partial:
        with whole_file(partial / "model.safetensors", needed=3):
            raise Exception("No space left on device (os error 28)")
    assert f"for {str(tmp_path / 'out' / 'model.safetensors')!r}: needs about 3 bytes" in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_text(tmp_path / "a", "é \udc80\n")
    assert (tmp_path / "a").read_bytes() == "é \\udc80\n".encode()
