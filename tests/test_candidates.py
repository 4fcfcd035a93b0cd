"""Programs that a model wrote run confined; what they do about it is no harm and no pass."""

import socket
from pathlib import Path

import pytest

from jlora.evaluation import Example, Sandbox, Tools, code, metrics_named
from jlora.evaluation.code import program_of


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(megabytes=256)


def said(sandbox, program):
    (verdict,) = sandbox.verdicts([program])
    assert verdict.passed == (verdict.said == "passed")
    return verdict.said


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "open('note', 'w').write('x')\nassert open('note').read() == 'x'",
        "import asyncio\nasync def one(): return 1\nassert asyncio.run(one()) == 1",
    ],
    ids=["plain", "thread", "own file", "event loop"],
)
def test_what_programs_need_works(sandbox, program):
    assert said(sandbox, program) == "passed"


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended the process itself, with 0"),
        ("x = bytearray(10**9)", "MemoryError"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
        ("open('big', 'wb').write(bytes(1 << 25))", "OSError: [Errno 27]"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import socket; socket.socket()", "PermissionError"),
    ],
)
def test_how_others_end(sandbox, program, ends):
    assert said(sandbox, program).startswith(ends)


def test_time_is_limited():
    assert said(Sandbox(seconds=1.0), "while True: pass") == "timed out after 1 seconds"
    assert said(Sandbox(seconds=1.0), "import time; time.sleep(60)") == "timed out after 1 seconds"


def test_no_network(sandbox):
    """Not to a server of this machine either, whose port is open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "Error" in said(sandbox, f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_nothing_is_written_elsewhere(sandbox, tmp_path):
    file = tmp_path / "file"
    file.write_text("as it was")
    end = said(sandbox, f"import os; os.remove({str(file)!r})")
    assert (file.read_text() == "as it was") == bool(sandbox.measures["files"])
    assert end.startswith("PermissionError") == bool(sandbox.measures["files"])


def test_the_environment_stays_here(sandbox, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert said(sandbox, "import os; assert 'OPENAI_API_KEY' not in os.environ") == "passed"
    assert said(sandbox, "import sys; assert len(sys.argv) == 1") == "passed"


def test_what_confines_is_said(sandbox):
    said(sandbox, "pass")
    assert sandbox.measures["network"] and sandbox.measures["processes"] and sandbox.measures["memory"] == ["RLIMIT_AS"]


def test_where_the_system_has_no_filter_python_refuses(monkeypatch, tmp_path):
    """As on a system without seccomp, namespaces and Landlock: said, and still no sockets and no processes."""
    source = Path(code.confined.__file__).read_text()
    file = tmp_path / "confined.py"
    file.write_text(source.replace('sys.platform != "linux"', "True").replace("libc.unshare(", "libc.absent("))
    monkeypatch.setattr(code.confined, "__file__", str(file))
    plain = Sandbox()
    assert (
        said(plain, "import socket; socket.socket()") == "PermissionError: a candidate may not do this: socket.__new__"
    )
    assert "may not do this: os.fork" in said(plain, "import os; os.fork()")
    assert said(plain, "assert 1") == "passed"
    assert plain.measures == {
        "network": ["audit hook"], "processes": ["RLIMIT_NPROC", "audit hook"], "memory": ["RLIMIT_AS"], "files": [],
    }  # fmt: skip


def test_programs_in_answers():
    assert program_of("Like so:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n"
    assert program_of("```\nx = 1\n```") == "x = 1\n"
    assert program_of("  ```py\n  x\n  ```") == "  x\n"
    assert program_of("```python\nx = 1") == "x = 1"
    assert program_of("```json\n{}\n```") == "```json\n{}\n```"
    assert program_of("    return a + b") == "    return a + b"


def test_pass_at_k():
    good, bad = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
    examples = [
        Example("a", "", (), "assert double(2) == 4"),
        Example("b", "", (), "assert double(0) == 0"),
        Example("c", ""),
    ]
    answers = [[f"```python\n{good}\n```", bad, bad], [bad, bad, good], [good] * 3]
    metrics = metrics_named(["pass@1", "pass@2"])
    tools = Tools(sandbox=Sandbox())
    one, two = (metric.score(examples, answers, tools) for metric in metrics.values())
    assert one.each() == pytest.approx([1 / 3, 1, None]) and two.each() == pytest.approx([2 / 3, 1, None])
    assert one.unscored == {2: "it has no tests"}
    assert one.notes[0] == ["passed", "AssertionError: ", "AssertionError: "]
    assert one.value() == pytest.approx(2 / 3)
