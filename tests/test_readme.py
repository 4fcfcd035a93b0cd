"""The README says nothing that is not so: its Python runs, and the commands and flags it shows exist."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from jlora.cli import _commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _python(title):
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_your_own_model_runs():
    run = subprocess.run([sys.executable, "-c", _python("Your own model")], check=True, capture_output=True, text=True)
    assert "2 leaves, 2 factored uses, 0 materialized" in run.stdout


def test_the_ten_lines_run(tmp_path):
    code = _python("The library in ten lines")
    os.symlink(ROOT / "examples", tmp_path / "examples")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_commands_and_flags_exist():
    lines = [line for line in README.splitlines() if line.startswith(".venv/bin/jlora")]
    assert len(lines) >= 6
    for line in lines:
        _, command, *rest = shlex.split(line, comments=True)
        options, _ = _commands()[command]
        fields = {f.name.replace("_", "-") for f in dataclasses.fields(options)}
        flags = {word.removeprefix("--") for word in rest if word.startswith("--")}
        assert flags <= fields, line


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for path in re.findall(r"examples/[\w/.-]+\w", README):
        assert (ROOT / path).exists(), path
