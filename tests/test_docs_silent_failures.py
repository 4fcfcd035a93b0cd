"""docs/silent-failures.md names tests; each of them exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "silent-failures.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Failure,")]


def _cells(row):
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def _functions(file):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_says_what_was_seen_what_is_done_and_what_guards_it():
    assert len(ROWS) > 60
    for row in ROWS:
        failure, answer, tests = _cells(row)
        assert failure and answer, row
        assert re.fullmatch(r"`test_\w+\.py::test_\w+`(, `test_\w+\.py::test_\w+`)*", tests), row


def test_every_test_named_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    defined = {file: _functions(file) for file in {file for file, _ in named}}
    assert [f"{file}::{name}" for file, name in named if name not in defined[file]] == []


def test_reports_are_named_by_repository_and_number():
    for row in ROWS:
        for reference in re.findall(r"\S*#\S*", _cells(row)[0]):
            assert re.fullmatch(r"\(?[\w.-]+#\d+[),;:]*", reference), reference
