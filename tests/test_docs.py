"""README.md and the pages of docs/ say nothing that is not so: their commands, flags, files, links, messages and pictures exist.
(That every line of them runs is in tests/test_docs_run.py; that the site builds, in `make lint`.)"""

import ast
import collections
import dataclasses
import re
import shlex

import pytest
from pages import PAGES, ROOT, WRITTEN, blocks, calls

from jlora.cli import _commands

pages = pytest.mark.parametrize("page", PAGES)
CALLS = [
    (page, part)
    for page in PAGES
    for line in calls(page)
    for part in line.split(" | ")
    if re.match(r"(\.venv/bin/)?jlora [a-z]", part)
]


def test_commands_are_shown():
    assert {page for page, _ in CALLS} >= {
        "README.md",
        "docs/guide.md",
        "docs/howto/export.md",
        "docs/troubleshooting.md",
    }
    assert {shlex.split(line, comments=True)[1] for _, line in CALLS} >= {*_commands()}, "show it in a guide"


@pytest.mark.parametrize("line", sorted({line for _, line in CALLS} - {"jlora finetun"}))
def test_commands_and_flags_exist(line):
    _, command, *rest = shlex.split(line, comments=True)
    options, _ = _commands()[command]
    fields = {f.name.replace("_", "-") for f in dataclasses.fields(options)}
    flags = {word.removeprefix("--") for word in rest if word.startswith("--")}
    assert flags <= {*fields, "help"}


NOT_RUN = {
    "installs packages": 2,
    "the tests themselves": 2,
    "needs a GPU on another machine": 1,
    "half an hour": 2,
    "downloads a task": 1,
    "serves until it is stopped": 2,
    "asks the server above": 1,
}
"""Reason in a comment above a block that tests/test_docs_run.py does not run -> how many there are."""


def test_what_is_not_run_is_said_and_counted():
    runnable = [block for page in PAGES if page not in WRITTEN for block in blocks(page, "sh", "console", "python")]
    assert collections.Counter(block.reason for block in runnable if block.reason) == NOT_RUN
    endless = [
        block.code for block in runnable if not block.reason and re.search(r"^jlora (serve|chat)", block.code, re.M)
    ]
    assert endless == [], "they wait for somebody: say above the block why it is not run"
    assert [page for page in PAGES if page not in WRITTEN and blocks(page)] == [], (
        "a block without a language is neither"
    )


@pages
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in calls(page):
        if match := re.match(r"make (?:PYTHON=\S+ )?(\w+)", line):
            assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE), line


@pages
def test_files_and_links_exist(page):
    text = PAGES[page]
    named = re.findall(
        r"(?<![\w/])(?:examples|benchmarks|tools|tests|docs|jlora)/[\w/.-]*\w",
        re.sub(r"\]\([^)]*\)|runs/\S+", "", text),
    )
    for name in named:
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


@pages
def test_every_number_has_its_script(page):
    """A result of a benchmark is named with the script that writes it."""
    for result in re.findall(r"benchmarks/results/(\w+)\.json", PAGES[page]):
        assert re.search(rf"`benchmarks/\w+\.py`[^`]*`benchmarks/results/{result}\.json`", PAGES[page]), result


def test_every_public_name_has_its_place_in_the_api_reference():
    public = set()
    for node in ast.parse((ROOT / "jlora" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            public |= {alias.asname for alias in node.names} - {"_start", "train"}
    public |= {
        f"train.{name}" for name in ("causal_lm_loss", "make_step", "init_state", "TrainState", "make_optimizer")
    }
    text = "".join(PAGES[page] for page in PAGES if page.startswith("docs/api/"))
    placed = re.findall(r"^\.\. auto\w+:: (?:jlora\.)?([\w.]+)$", text, re.MULTILINE)
    assert public - {*placed} == set(), "give them a line in docs/api"
    assert len(placed) == len({*placed})


# ---- messages --------------------------------------------------------------------------------------------------------


def _messages():
    """What the package can print: its texts, with … for what is put into them."""
    said = set()
    for file in (ROOT / "jlora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = ("…" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
                said.add(re.sub("…+", "…", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    return said


def test_messages_that_are_quoted_are_those_of_the_code():
    """Of the page of symptoms, those that no command there provokes."""
    said = _messages()
    quoted = [line for block in blocks("docs/troubleshooting.md", "text") for line in block.code.splitlines()]
    assert len(quoted) > 5
    for line in quoted:
        wanted = line.removeprefix("error: ").strip("… ")
        assert not wanted or any(wanted in text for text in said), line


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_house_is_drawn_as_it_stands():
    """Its rooms; which stairs there are, tests/test_pictures.py compares."""
    tree = ast.parse((ROOT / "tests" / "test_floors.py").read_text())
    (floors,) = (ast.literal_eval(node.value) for node in tree.body if _assigns(node, "FLOORS"))
    rooms = {room for floor in floors for room in floor if not room.startswith("_")}
    drawn = re.findall(r">([a-z]\w+)</text>", (ROOT / "docs" / "pictures" / "house.svg").read_text())
    assert {*drawn} == rooms, "draw it again: python tools/pictures.py house"


def _assigns(node, name):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
