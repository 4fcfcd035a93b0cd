"""What the repository says of itself in several places is the same in each."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())


def _targets(makefile):
    return set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def test_the_licence_is_the_one_declared():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0, January 2004" in text
    (author,) = PROJECT["authors"]
    assert re.search(rf"Copyright \d{{4}} {author['name']}\n", text)
    assert "[yyyy]" not in text


def test_the_pythons_tested_are_those_declared():
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert declared == WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={declared[0]}"
    assert PYPROJECT["tool"]["pyright"]["pythonVersion"] == declared[0]


def test_the_workflow_lints_and_tests():
    runs = [step["run"] for step in WORKFLOW["jobs"]["test"]["steps"] if "run" in step]
    assert [re.match(r"make (\w+)", run)[1] for run in runs] == ["lint", "test"]
    assert {"lint", "test"} <= _targets((ROOT / "Makefile").read_text())


def test_every_package_data_file_is_there():
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package).glob(pattern)), f"{package}: {pattern}"


def test_the_least_jax_is_one():
    extras = PROJECT["optional-dependencies"]
    stated = [line for lines in [PROJECT["dependencies"], *extras.values()] for line in lines if line.startswith("jax")]
    least = {line.partition(">=")[2] for line in stated if re.match(r"jax(\[\w+\])?>", line)}
    assert len(least) == 1, stated
    assert {name: extras[name] for name in ("cuda", "cuda12", "cuda13")} == {
        name: [f"jax[{name}]>={next(iter(least))}"] for name in ("cuda", "cuda12", "cuda13")
    }
