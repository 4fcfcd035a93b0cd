"""The loop of a chat: lines in, answers out."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from jlora._terminal import console, say
from jlora.cli.adapters import adapter_places
from jlora.cli.chat.commands import obey
from jlora.cli.chat.options import Chat
from jlora.cli.chat.session import Session
from jlora.cli.chat.voices import load_voices, note_templates, trained_system
from jlora.cli.prompts import sampling
from jlora.generation import check_sampling

_PROMPT = "> "


def run(options: Chat) -> None:
    note_templates(adapter_places(options.adapter))
    model, voices, tokenizer, base = load_voices(options)
    if not tokenizer.chat_template:
        raise ValueError(
            f"A chat needs a tokenizer with a chat template; that of {base!r} has none, as is usual for base models. Use an "
            "instruct model, or `jlora generate --template alpaca` for an adapter that was trained so."
        )
    drawn = sampling(options, base)
    check_sampling(**drawn)
    session = Session(
        model, voices, tokenizer, {**drawn, "seed": options.seed},
        voice=next(iter(voices.names), None),
        system=trained_system(options) if options.system is None else options.system,
    )  # fmt: skip
    aside = console(stderr=True)
    talk(session, _lines(aside), out=console(), aside=aside)


def talk(session: Session, lines: Iterator[str], *, out: Console, aside: Console) -> None:
    """Answers line after line.

    Args:
        out: gets the answers and nothing else.
        aside: gets what commands say, what went wrong and, on a terminal, the speed.
    """
    if aside.is_terminal:
        who = f" with {session.voice}" if session.voice else ""
        say(aside, (f"{session.model.config.model_type}{who}; /help lists the commands, Ctrl-D leaves", "dim"))
    for line in lines:
        text = line.strip()
        if not text:
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                say(aside, (_obeyed(session, text), "dim"))
            else:
                _answer(session, text.removeprefix("/"), out, aside)
        except ValueError as error:
            say(aside, ("error:", "bold red"), f" {error}")


def _obeyed(session: Session, text: str) -> str:
    try:
        return obey(session, text)
    except OSError as error:
        raise ValueError(f"{error.filename!r}: {error.strerror}.") from error


def _answer(session: Session, text: str, out: Console, aside: Console) -> None:
    with stopped_by_interrupt() as stopped:
        for part in session.answer(text, stopped=stopped):
            if part:
                say(out, part, end="")
    say(out, "")
    if session.cut:
        say(aside, (f"[{session.cut}]", "dim"))
    if aside.is_terminal and session.speed is not None:
        say(aside, (f"[{session.count} tokens, {session.speed:.1f} a second]", "dim"))


@contextmanager
def stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is no exception but the answer to the question whether it was pressed; pressed again, it is one."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(aside: Console) -> Iterator[str]:
    """What is typed, or comes through a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401 (gives `input` its history and editing)
    except ImportError:
        pass
    interrupted = False
    while True:
        try:
            line = input(_PROMPT)
        except EOFError:
            say(aside, "")
            return
        except KeyboardInterrupt:
            say(aside, "")
            if interrupted:
                return
            interrupted = True
            say(aside, ("Ctrl-C again leaves", "dim"))
            continue
        interrupted = False
        yield line
