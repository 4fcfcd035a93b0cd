"""Every command and every line of Python of the pages is run, in its order, a page in a directory of its own.

What stands in for models that have to be downloaded, and for the reader's own files, is listed here. A block that cannot be run
has a comment above it that says why; tests/test_docs.py counts these.
"""

import csv
import json
import os
import re
import shutil
import stat
import subprocess
import sys

import jax.numpy as jnp
import pyarrow
import pyarrow.parquet
import pytest
from pages import PAGES, ROOT, WRITTEN, blocks

import jlora

pytestmark = pytest.mark.slow

GPT2, LLAMA, LONG = "examples/assets/tiny-gpt2", "examples/assets/tiny-llama", "tiny-llama-of-long-rows"
STAND_INS = {
    "gpt2": GPT2,
    "gpt2-large": GPT2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": LLAMA,
    "meta-llama/Llama-3.2-1B": LONG,
}
"""Hub id on a page -> the model that is run instead."""
RUN = [page for page in PAGES if page not in WRITTEN and blocks(page, "sh", "console", "python")]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The files that a reader of the guides has: texts, records, chats, and a GGUF file; and the command."""
    place = tmp_path_factory.mktemp("reader")
    assets = ROOT / "examples" / "assets"
    text = (assets / "style.txt").read_text()[:12000]
    for name in ("my_novel.txt", "novel.txt", "more.txt", "play.txt"):
        (place / name).write_text(text)
    (place / "tokens.txt").write_text("<keeper>\n<lamp>\n")
    records = (assets / "instructions.jsonl").read_text().splitlines()[:24]
    (place / "records.jsonl").write_text("\n".join(records) + "\n")
    pairs = [(record["instruction"], record["output"]) for record in map(json.loads, records)]
    with open(place / "faq.csv", "w", newline="") as file:
        csv.writer(file).writerows([("query", "reply"), *pairs])
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), place / "chats.parquet")
    shutil.copytree(ROOT / LLAMA, place / LONG)
    config = json.loads((place / LONG / "config.json").read_text())
    (place / LONG / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    model, params = jlora.load(ROOT / LLAMA, dtype=jnp.float32)
    tokenizer = jlora.load_tokenizer(ROOT / LLAMA)
    jlora.save_gguf(place / "model-Q4_K_M.gguf", model, params, tokenizer=tokenizer, dtype="q8_0")
    command = place / "bin" / "jlora"
    command.parent.mkdir()
    run = "import sys; sys.argv[0] = 'jlora'; from jlora.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{run}" "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return place


@pytest.fixture
def place(reader, tmp_path):
    """Where a page is run: the reader's files, the repository's examples, and no network."""
    for file in reader.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def with_stand_ins(code):
    names = "|".join(re.escape(name) for name in sorted(STAND_INS, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({names})(?![\w./-])", lambda match: STAND_INS[match[1]], code)


def execute(program, place):
    """What it printed on both streams, and its exit code."""
    changed = {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    changed["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of a run on a tiny model
    done = subprocess.run(
        program,
        cwd=place,
        env=os.environ | changed,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout, done.returncode


def session(code):
    """(command, what is printed) of each prompt."""
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        command, _, said = part.partition("\n")
        yield command, said


def says(said, pattern):
    wanted = ".*".join(re.escape(part) for part in pattern.strip().split("…"))
    return re.fullmatch(wanted, said.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_from_top_to_bottom(page, place):
    for block in blocks(page, "sh", "console", "python"):
        if block.reason:
            continue
        code = with_stand_ins(block.code)
        if block.language == "console":
            for command, expected in session(code):
                said, returned = execute(["bash", "-c", command], place)
                assert says(said, expected), f"{command}\n{said}"
                assert (returned != 0) == ("error: " in expected), said
        else:
            program = (
                ["bash", "-euo", "pipefail", "-c", code] if block.language == "sh" else [sys.executable, "-c", code]
            )
            said, returned = execute(program, place)
            assert returned == 0, f"{code}\n{said}"


def test_a_page_that_lies_is_caught():
    assert says("error: no command 'a'; did you mean 'b'?", "error: …; did you mean 'b'?")
    assert not says("error: no command 'a'", "error: …; did you mean 'b'?")
    assert with_stand_ins("jlora inspect gpt2 --output novel-gpt2") == f"jlora inspect {GPT2} --output novel-gpt2"
    assert "tiny" in with_stand_ins('load("gpt2")') and "tiny" not in with_stand_ins("gpt2_style.py")
