"""Compiled programs are kept between commands: shared, mended, and done without where they cannot be."""

import json
import os
import warnings
from pathlib import Path

import child
import jax
import pytest
from processes import DEADLINE, FORKS

from jlora.cli import compilation


@pytest.fixture
def evaluate(gpt2_dir, text_file, tmp_path):
    """Runs as many `jlora evaluate` at once as asked for, with a cache, and gives their reports."""
    made = []

    def run(cache, *more, at_once=1):
        flags = ["evaluate", "--model", gpt2_dir, "--data", text_file, "--max-length", "16", *more]
        outputs = [tmp_path / f"{len(made) + i}.json" for i in range(at_once)]
        made.extend(outputs)
        running = [FORKS.Process(target=child.command, args=(flags, str(cache), str(path))) for path in outputs]
        for process in running:
            process.start()
        for process in running:
            process.join(DEADLINE)
            assert process.exitcode == 0
        reports = [json.loads(path.read_text()) for path in outputs]
        for report in reports:
            assert report["code"] == 0, report["err"]
            assert json.loads(report["out"])["eval_loss"] > 0
        return reports

    return run


def entries(cache):
    return {path: path.read_bytes() for path in Path(cache).rglob("*-cache")}


@pytest.mark.slow
def test_nothing_is_compiled_twice(evaluate, tmp_path):
    """Two processes fill the cache at once; a third finds all of it there; a fourth mends what is damaged."""
    cache = tmp_path / "cache"
    first, other = evaluate(cache, at_once=2)
    assert first["out"] == other["out"] and first["kept"].startswith(str(cache))
    filled = entries(cache)
    assert len(filled) >= 3 and Path(first["kept"]).stat().st_mode & 0o077 == 0
    [again] = evaluate(cache)
    assert again["out"] == first["out"] and again["err"] == ""
    assert "cache_misses" not in again and again["cache_hits"] >= 3
    assert entries(cache) == filled
    # As a process leaves it that was killed while it wrote: jax writes in place, and never over what is there.
    for path, content in filled.items():
        path.write_bytes(content[: len(content) // 2])
    [mended] = evaluate(cache)
    assert mended["out"] == first["out"]
    lines = mended["err"].splitlines()
    assert lines and all(line.startswith("note: the compiled program") for line in lines)
    assert entries(cache).keys() == filled.keys()
    assert all(len(content) > len(filled[path]) // 2 for path, content in entries(cache).items())


@pytest.mark.slow
def test_the_flag_turns_it_off(evaluate, tmp_path):
    [report] = evaluate(tmp_path / "cache", compilation.OFF)
    assert not (tmp_path / "cache").exists() and report["kept"] is None and report["err"] == ""


@pytest.mark.slow
def test_a_directory_that_cannot_be_made_is_done_without(evaluate, tmp_path):
    (tmp_path / "cache").write_text("a file")
    [report] = evaluate(tmp_path / "cache")
    assert report["kept"] is None
    assert report["err"].startswith("note: compiled programs are not kept: ") and "Not a directory" in report["err"]


# Without a process of its own


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"JLORA_CACHE": "/somewhere"}, "/somewhere"),
        ({"JLORA_CACHE": "~/mine", "HOME": "/h"}, "/h/mine"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/jlora"),
        ({"HOME": "/h"}, "/h/.cache/jlora"),
    ],
)
def test_where_it_lies(variables, root, monkeypatch):
    for name in ("JLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    directory = compilation.cache_directory()
    assert directory.parent == Path(root) / "compilation" and "-" in directory.name


def test_a_cache_that_jax_was_given_stays():
    before = jax.config.jax_compilation_cache_dir
    assert before
    compilation.keep_compiled(True)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_directory_that_others_may_write_to_is_not_used(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to it"):
        compilation._prepare(tmp_path / "open")


def test_the_least_used_entries_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "MOST_BYTES", 250)
    directory = tmp_path / "cache"
    for i in range(4):
        directory.mkdir(exist_ok=True, mode=0o700)
        (directory / f"{i}-cache").write_bytes(bytes(100))
        os.utime(directory / f"{i}-cache", (1000 + i, 1000 + i))
    (directory / "other").write_bytes(bytes(1000))
    compilation._prepare(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["2-cache", "3-cache", "other"]


def test_only_the_program_that_failed_is_removed(capsys):
    """And every other warning is shown as it was."""
    directory, shown = Path(jax.config.jax_compilation_cache_dir), []
    directory.mkdir(exist_ok=True)
    for name in ("jit_broken-0-cache", "jit_broken_not-0-cache"):
        (directory / name).write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = compilation.repairing(lambda *given: shown.append(str(given[0])))
        warnings.warn("something else", stacklevel=1)
        warnings.warn("Error reading persistent compilation cache entry for 'jit_broken': X", stacklevel=1)
    assert shown == ["something else"] and "note: the compiled program 'jit_broken'" in capsys.readouterr().err
    assert not (directory / "jit_broken-0-cache").exists()
    (directory / "jit_broken_not-0-cache").unlink()
