"""One writer, on this host and on others of the same file system."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest

from jlora.storage import lock
from jlora.storage.lock import LOCK, InUse, alone, only_writer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "SILENT", 0.5)


def record(**changes):
    return lock._own_record() | {"token": "theirs"} | changes


def other_host(directory, **changes):
    """What a process of another host leaves, whose kernel's locks this one does not see."""
    found = record(host="node7", pid=4711, machine="another kernel", **changes)
    (directory / LOCK).write_text(json.dumps(found))


@contextlib.contextmanager
def beating(path):
    """Signs of life of the process that wrote the record."""
    over = threading.Event()

    def beat():
        while not over.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_living_process_of_another_host_is_named(tmp_path):
    other_host(tmp_path)
    before = (tmp_path / LOCK).read_bytes()
    with (
        beating(tmp_path / LOCK),
        pytest.warns(UserWarning, match=r"is held by process 4711 on node7: waiting up to 1 s for a sign of its life"),
        pytest.raises(InUse, match=r"being trained by process 4711 on node7\. Wait until it"),
    ):
        with only_writer(tmp_path, "trained"):
            pass
    assert (tmp_path / LOCK).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [LOCK]


def test_a_dead_process_of_another_host_is_waited_for_and_succeeded(tmp_path):
    other_host(tmp_path)
    with pytest.warns(UserWarning) as said, only_writer(tmp_path, "trained"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    waits, takes = (str(warning.message) for warning in said)
    assert "is held by process 4711 on node7: waiting" in waits
    assert f"{str(tmp_path)!r} is taken over from process 4711 on node7, which has given no sign of life" in takes
    assert not list(tmp_path.iterdir())


def test_nobody_waits_for_a_process_that_was_silent_for_long(tmp_path, monkeypatch):
    other_host(tmp_path)
    long_ago = time.time() - 3600
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    monkeypatch.setattr(lock, "SILENT", 600.0)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    with pytest.warns(UserWarning, match="is taken over from process 4711 on node7"), only_writer(tmp_path, "trained"):
        pass


def test_a_record_of_this_host_without_the_lock_is_a_dead_process(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    (tmp_path / LOCK).write_text(json.dumps(record()))
    with only_writer(tmp_path, "trained"):
        pass
    (tmp_path / LOCK).write_text(f"4711 {socket.gethostname()}\n")  # an older version's
    with only_writer(tmp_path, "trained"):
        pass


def test_a_holder_gives_signs_of_life(tmp_path):
    with only_writer(tmp_path, "trained"):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        until = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime_ns == before:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_holder_notices_that_it_was_succeeded(tmp_path):
    """As one that slept for an hour, while another host took it for dead; and does not take the other's lock away."""
    with only_writer(tmp_path, "trained") as held:
        held.check()
        other_host(tmp_path)
        with pytest.raises(
            InUse, match="was taken over by process 4711 on node7, since this process gave no sign of life"
        ):
            held.check()
    assert "node7" in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("alive", [True, False])
def test_where_the_file_system_has_no_locks_the_record_guards(tmp_path, monkeypatch, alive):
    def without(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    started = lock._started(os.getpid())
    (tmp_path / LOCK).write_text(json.dumps(record(started=started if alive else "earlier")))
    refused = pytest.raises(InUse, match=f"by process {os.getpid()} on") if alive else contextlib.nullcontext()
    with refused, only_writer(tmp_path, "trained"):
        pass


def test_several_take_turns(tmp_path):
    path, inside = tmp_path / "table.csv", []

    def count():
        for _ in range(20):
            with alone(path):
                inside.append(1)
                assert sum(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list(tmp_path.iterdir())
