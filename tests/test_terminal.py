"""What is printed: text from outside is text, on a terminal and in a pipe; and how the command ends when it cannot go on."""

import ast
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command import on_a_terminal, run
from rich.table import Table
from rich.text import Text

import jlora
from jlora import _start, cli
from jlora._terminal import console, say, visible
from jlora.report import Comparison, print_comparison
from jlora.report.comparison import PromptComparison

HOSTILE = [
    "exp[v2]",
    "a[/b]",
    "[red]x[/red]",
    "[/]",
    "[link=https://x]y[/link]",
    ".*[/q]_proj",
    ":rocket: :smile:",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "a\rb",
    "a\bb\x7f",
    "\udc80",
    "[@click=f()]x[/]",
]


def in_a_pipe():
    return console(file=io.StringIO(), width=40)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_is_neither_markup_nor_commands(text, capsys):
    table = Table(title=f"T {text}")
    table.add_column(f"C {text}")
    table.add_row(f"R {text}")
    table.add_row(Text(f"X {text}"))
    terminal = on_a_terminal()
    terminal.print(f"P {text}", Text(f"Y {text}"))
    terminal.print(table)
    terminal.rule(f"L {text}")
    say(terminal, "S ", (text, "bold"))
    shown = terminal.file.getvalue()
    assert visible(shown) == shown, "nothing is left for the terminal to obey"
    # rich itself drops some control characters (bell, backspace, carriage return) from what it lays out.
    laid_out = visible("".join(c for c in text if c not in "\a\b\v\f\r"))
    for mark in "PYTCRXL":
        assert f"{mark} {laid_out}" in shown, mark
    assert f"S {visible(text)}\n" in shown


@pytest.mark.parametrize("text", [*HOSTILE, "long " * 50, "wide 漢字 " * 20, "tab\tand\nline"], ids=ascii)
def test_lines_into_a_pipe_are_raw_and_whole(text):
    pipe = in_a_pipe()
    say(pipe, "made ", (text, "bold red"))
    assert pipe.file.getvalue() == f"made {text}\n"


def test_lines_on_a_terminal_are_not_wrapped():
    terminal = on_a_terminal(width=20)
    say(terminal, "made ", ("/a/long/path" * 10, "bold"), "\nline", end="")
    assert terminal.file.getvalue() == "made " + "/a/long/path" * 10 + "\nline"


def test_quiet_is_quiet():
    out = console(quiet=True, file=io.StringIO())
    say(out, "x")
    out.print("x")
    assert out.file.getvalue() == ""


def test_a_comparison_cannot_command_the_terminal():
    text = "\x1b]0;owned\x07[/b] <b>"
    result = Comparison((PromptComparison(text, text, text, 0.0, 0.0),))
    terminal = on_a_terminal()
    print_comparison(result, terminal)
    assert terminal.file.getvalue().count("\\x1b]0;owned\\x07[/b] <b>") == 3 and "\x1b" not in terminal.file.getvalue()
    markdown = result.to_markdown()
    assert markdown.count("\\x1b]0;owned\\x07[/b] &lt;b>") == 3 and "\x1b" not in markdown


def test_every_console_is_made_in_one_place():
    """By `console`; `report.show` takes a caller's."""
    makers = []
    for file in sorted(Path(jlora.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                makers.append(file.name)
    assert set(makers) <= {"_terminal.py", "display.py"}


# Errors, each in one line


class Panic(BaseException):
    pass


Panic.__name__ = "PanicException"


@pytest.fixture
def broken(monkeypatch, fails):
    """Runs a command that raises; gives the message."""
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Empty:
        """No flags."""

    def call(error, code=cli.FAILURE):
        def function(options):
            raise error

        monkeypatch.setattr(cli, "_commands", lambda: {"prepare": (Empty, function)})
        return fails("prepare", code=code)

    return call


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded ("),
        (OverflowError("int too large to convert"), "OverflowError: int too large to convert ("),
        (TypeError("TextEncodeInput must be Union"), "TypeError: TextEncodeInput must be Union ("),
        (KeyError("value_metadata"), "KeyError: 'value_metadata' ("),
        (IndexError(), "IndexError (set JLORA_TRACEBACK=1"),
        (AttributeError("'NoneType' object has no attribute 'x'"), "AttributeError: "),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UnicodeDecodeError: 'utf-8' codec"),
        (
            Exception("data did not match any variant\nof untagged enum"),
            "Exception: data did not match any variant of untagged",
        ),
        (AssertionError(), "AssertionError (set"),
        (Panic("index out of bounds"), "PanicException: index out of bounds"),
        (PermissionError(13, "Permission denied", "/x/[/b]"), "'/x/[/b]': Permission denied.\n"),
        (IsADirectoryError(21, "Is a directory", b"/x"), "'/x': Is a directory.\n"),
        (RuntimeError("tensorstore spec " * 500), "RuntimeError: tensorstore spec"),
        (OSError(28, "No space left on device", "/"), "no space left on / for '/': "),
        (
            RuntimeError("RESOURCE_EXHAUSTED: [Errno 28] No space left on device"),
            "no space left on the device. Run the same",
        ),
        (OSError(28, "No space left on device"), "no space left on the device. Run the same command"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_every_error_is_one_line(error, says, broken):
    said = broken(error)
    assert said.startswith(says) and said.count("\n") == 1 and len(said) < 600


def test_errors_of_jlora_are_printed_as_they_are(fails):
    assert "JLORA_TRACEBACK" not in fails("merge", "--output", "x")


def test_an_interrupt_that_a_library_made_an_error_of(monkeypatch, capsys):
    def imports():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(cli, "_commands", imports)
    assert run("prepare") == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_the_token_is_not_printed(monkeypatch, broken):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert broken(ValueError("401 for Authorization: Bearer hf_secretsecret")).count("hf_***") == 1


# As a process


COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'jlora'; from jlora.cli import main; main()"]


def test_a_reader_that_has_seen_enough():
    """`jlora --help | true`, with the pipe closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.FAILURE, "")


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with open(tmp_path / "file") as only_to_read:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        pipes = {"stdout": only_to_read, "stderr": subprocess.PIPE}
        done = subprocess.run([*COMMAND, "--version"], **pipes, text=True, env=buffered)
    assert (done.returncode, done.stderr) == (
        cli.FAILURE,
        "error: standard output cannot be written: Bad file descriptor.\n",
    )


def test_an_encoding_without_the_characters(tmp_path):
    command = [*COMMAND, "inspect", str(tmp_path / "nö…wo")]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == cli.FAILURE and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr


def test_errors_on_a_terminal_cannot_command_it(tmp_path):
    master, slave = pty.openpty()
    done = subprocess.run([*COMMAND, "inspect", "./\x1b]0;owned\x07[/b]"], stdout=slave, stderr=slave)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert (
        done.returncode == cli.FAILURE
        and "\x1b]0" not in shown
        and "\\x1b]0;owned\\x07[/b]" in shown.replace("\\\\", "\\")
    )


# A process that is started in the background is told to ignore them.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.mark.parametrize("name", ["jlora", "script.py"])
def test_interrupted_while_it_imports(name):
    """Sent as the imports begin: jax is imported last of all, by a finder that interrupts."""
    code = (
        f"{INTERRUPTIBLE}import sys, os; sys.argv = [{name!r}]\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'jax': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import jlora.cli; jlora.cli.main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if name == "jlora":
        assert (done.returncode, done.stdout, done.stderr) == (_start.INTERRUPTED, "", "interrupted\n")
    else:  # not ours to change
        assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr


def test_interrupts_are_raised_again_once_all_is_imported():
    code = (
        f"{INTERRUPTIBLE}import sys; sys.argv = ['jlora', '--version']; from jlora.cli import main; main()\n"
        "print(signal.getsignal(signal.SIGINT))"
    )
    assert (
        "default_int_handler"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
