"""The commands of a chat: a row each."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jlora.cli.chat.session import SETTINGS, Session


class Command(NamedTuple):
    argument: str
    """As help shows it."""
    help: str
    run: Callable[[Session, str], str]
    """(session, argument) -> what to say."""


def obey(session: Session, line: str) -> str:
    """What a line that begins with a slash says back.

    Raises:
        ValueError: for a command that there is none of, or that cannot be done.
    """
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ValueError(
            f"There is no command /{name}" + (f"; did you mean /{close[0]}?" if close else "; /help lists them.")
            + " (A turn that begins with a slash is given with two.)"
        )  # fmt: skip
    return COMMANDS[name].run(session, argument.strip())


def _adapter(session: Session, name: str) -> str:
    if not name:
        there = ", ".join(session.voices.names) or "none"
        return f"adapters: {there}; now {_speaker(session)}"
    session.choose(name)
    return f"now {_speaker(session)}"


def _base(session: Session, _: str) -> str:
    session.choose(None)
    return f"now {_speaker(session)}"


def _speaker(session: Session) -> str:
    return "the base" if session.voice is None else f"the adapter {session.voice}"


def _set(session: Session, argument: str) -> str:
    if argument:
        name, _, value = argument.replace("=", " ").partition(" ")
        session.set(name.replace("-", "_"), value.strip())
    return ", ".join(f"{name} {value}" for name, value in session.settings.items())


def _system(session: Session, text: str) -> str:
    session.system = text or None
    return "system prompt set; it holds for the whole conversation" if text else "no system prompt"


def _save(session: Session, file: str) -> str:
    if not file:
        raise ValueError("/save needs a file: /save chats.jsonl")
    session.save(Path(file).expanduser())
    return f"added to {file}: {len(session.turns) // 2} turns, as a record for jlora finetune --template chat"


def _undo(session: Session, _: str) -> str:
    return "the last turn is taken back" if session.undo() else "there is no turn to take back"


def _reset(session: Session, _: str) -> str:
    session.turns.clear()
    return "the conversation begins anew; the system prompt stays" if session.system else "the conversation begins anew"


def _help(session: Session, _: str) -> str:
    rows = [(f"/{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    rows += [("Ctrl-C", "stops an answer; twice at the prompt, or Ctrl-D, leaves")]
    return "\n".join(f"{left:<20}{right}" for left, right in rows)


COMMANDS: Mapping[str, Command] = {
    "adapter": Command("NAME", "this adapter answers; without a name: which there are", _adapter),
    "base": Command("", "the base model answers", _base),
    "set": Command("NAME VALUE", f"one of {', '.join(SETTINGS)}; alone: their values", _set),
    "system": Command("TEXT", "what the model is told before the first turn; alone: nothing", _system),
    "undo": Command("", "takes the last turn and its answer back", _undo),
    "reset": Command("", "forgets the conversation", _reset),
    "save": Command("FILE", "adds the conversation to a .jsonl file that jlora finetune reads", _save),
    "help": Command("", "this list", _help),
}
