"""README.md and the pages of docs/ say nothing that is not so: their Python runs, their commands, flags, files and links exist."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jlora.cli import _commands

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
pages = pytest.mark.parametrize("page", PAGES)


def _code(page, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


def _run(page, cwd):
    (code,) = _code(page, "python")
    os.symlink(ROOT / "examples", cwd / "examples")
    return subprocess.run([sys.executable, "-c", code], check=True, cwd=cwd, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path):
    _run("README.md", tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_your_own_model_runs(tmp_path):
    assert "2 leaves, 2 factored uses, 0 materialized" in _run("docs/wrap.md", tmp_path)


@pytest.mark.slow
def test_a_rule_of_ones_own_ends_a_run(tmp_path):
    last = int(_run("docs/guide.md", tmp_path).rpartition("ended after step ")[2])
    steps = yaml.safe_load((tmp_path / "out" / "run.json").read_text())["origin"]["steps"]
    assert 20 <= last < steps


def test_no_python_goes_unrun():
    assert [page for page in PAGES if _code(page, "python")] == ["README.md", "docs/guide.md", "docs/wrap.md"]


def _calls():
    """(page, line) of every call of the command, in blocks of code or between single backquotes."""
    for page in PAGES:
        lines = [line for block in _code(page) for line in block.splitlines()]
        for line in lines + re.findall(r"`([^`\n]+)`", PAGES[page]):
            if re.match(r"(\.venv/bin/)?jlora [a-z]", line):
                yield page, line


CALLS = list(_calls())


def test_commands_are_shown():
    assert {page for page, _ in CALLS} >= {"README.md", "docs/guide.md"}
    assert len(CALLS) >= 12


@pytest.mark.parametrize("line", [line for _, line in CALLS])
def test_commands_and_flags_exist(line):
    _, command, *rest = shlex.split(line, comments=True)
    options, _ = _commands()[command]
    fields = {f.name.replace("_", "-") for f in dataclasses.fields(options)}
    flags = {word.removeprefix("--") for word in rest if word.startswith("--")}
    assert flags <= fields


@pages
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in _code(page) for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", PAGES[page])
    for line in lines:
        if match := re.match(r"make (?:PYTHON=\S+ )?(\w+)", line):
            assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE), line


@pages
def test_files_and_links_exist(page):
    text = PAGES[page]
    named = re.findall(
        r"(?:examples|benchmarks|tools|tests|docs|jlora)/[\w/.-]*\w", re.sub(r"\]\([^)]*\)|runs/\S+", "", text)
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


def test_every_page_is_reached_from_the_readme():
    reached = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"]))
    assert reached == {page for page in PAGES if page.startswith("docs/")}
