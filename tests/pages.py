"""The pages of the documentation, and the fenced blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
WRITTEN = {page: match[1] for page, text in PAGES.items() if (match := re.match(r"<!-- written by (\S+) -->\n", text))}
"""Page -> the script that ran its commands and wrote it."""
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    language: str
    code: str
    reason: str | None
    """Why it is not run, as a comment above it says."""


def blocks(page: str, *languages: str) -> list[Block]:
    """Those of some languages, in their order; of none: without a language."""
    found = [Block(match["language"], match["code"], match["reason"]) for match in _BLOCK.finditer(PAGES[page])]
    return [block for block in found if block.language in (languages or ("",))]


def calls(page: str) -> list[str]:
    """The lines of shell in it: of blocks, behind the prompts of sessions, and between single backquotes."""
    lines = [line for block in blocks(page, "sh", "") for line in block.code.splitlines()]
    lines += [
        line[2:] for block in blocks(page, "console") for line in block.code.splitlines() if line.startswith("$ ")
    ]
    return lines + re.findall(r"`([^`\n]+)`", PAGES[page])
