"""docs/walk.md is what tools/walk.py wrote of its steps."""

import re
import sys

from pages import PAGES, ROOT, WRITTEN, blocks

sys.path.append(str(ROOT / "tools"))
import walk


def test_the_page_has_every_step_and_its_commands():
    page = "docs/walk.md"
    assert WRITTEN[page] == "tools/walk.py"
    assert re.findall(r"^## \d+\. (.+)$", PAGES[page], re.MULTILINE) == [step.title for step in walk.STEPS]
    for step, block in zip(walk.STEPS, blocks(page, "console"), strict=True):
        assert tuple(line[2:] for line in block.code.splitlines() if line.startswith("$ ")) == step.commands


def test_nothing_of_the_machine_is_on_the_page():
    """Neither where it ran nor what package managers say of their settings."""
    assert not re.search(r"(?<![\w.~-])/\w+/|WARNING|\[notice\]|\r", PAGES["docs/walk.md"])
