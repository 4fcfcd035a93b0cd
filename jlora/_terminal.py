"""What is printed: text from outside (paths, prompts, what a model writes) is never markup, and never commands to a terminal."""

import io
import re
import sys
from collections.abc import Iterable
from typing import TypeAlias

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

Part: TypeAlias = str | tuple[str, str]
"""Text, or (text, style)."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What may move the cursor, set the window's title or not be encoded: all of Unicode's category Cc but tab and line feed, and
lone surrogates (of file names that are no UTF-8)."""


def visible(text: str) -> str:
    r"""The text with its control characters as Python escapes them.

    >>> visible("a\x1b[2J\tb\r\n")
    'a\\x1b[2J\tb\\r\n'
    """
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def console(*, stderr: bool = False, quiet: bool = False, **options) -> Console:
    """The one kind of console here: strings are text, not markup or emoji codes, and on a terminal `visible`."""
    made = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, **options)
    if made.is_terminal:
        made.push_render_hook(_Escape())
    return made


def say(on: Console, *parts: Part, end: str = "\n") -> None:
    """Text as it is: not wrapped by us, styled and `visible` on a terminal, raw into a pipe or a file."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    if on.is_terminal:
        for text, style in pairs:
            on.print(visible(text), style=style or None, end="", soft_wrap=True)
        on.print(end=end)
    elif not on.quiet:
        on.file.write("".join(text for text, _ in pairs) + end)
        on.file.flush()


def never_fail_to_encode() -> None:
    """Standard output prints what its encoding does not have as escapes, as standard error always does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Escape(RenderHook):
    """The last step before the terminal, where every text comes by, whatever table or rule it was put into."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable):
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _escaped(console.render(self._renderable, options))


def _escaped(segments: Iterable[Segment]) -> Iterable[Segment]:
    for text, style, control in segments:
        # `control` are rich's own commands.
        yield Segment(text if control else visible(text), style, control)
