"""Text from outside in Markdown, where it stays text."""

import re
from collections.abc import Iterable, Iterator, Sequence

from jlora._terminal import visible


def plain(text: str) -> str:
    """What a model wrote, neither tags for whoever renders the page nor commands for a terminal that shows it."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;")


def one_line(text: str) -> str:
    return plain(" ".join(text.split()))


def cell(text: str) -> str:
    """For a table."""
    lines = text.strip().replace("\\", "\\\\").replace("|", "\\|").splitlines()
    return "<br>".join(plain(line) for line in lines)


def code(text: str) -> str:
    """As code in a line, whatever is in it."""
    text = visible(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if len(fence) > 1 else ""
    return f"{fence}{room}{text}{room}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Its lines, an empty one last. Cells stand as they are given: escaped."""
    yield from (f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}")
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
