"""Tiny random checkpoints, written by transformers once a session."""

import atexit
import collections
import os
import re
import shutil
import sys
import tempfile
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Tests, their workers and the processes they start compile the same programs again and again. The first process
    # makes the directory, the others inherit it; it does not outlive the session.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jlora-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A core for each worker: the thread pools of XLA and torch would fight over them, which takes many times as long.
    _cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if _cores:
        os.sched_setaffinity(0, {_cores[int(worker.removeprefix("gw")) % len(_cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"

# What the tests are of is imported where it is used: the process that only hands them out to its workers needs nothing of
# it, and would hold them up by half a minute.
import pytest
import typed  # noqa: F401 (first of all that import jlora: from here on its annotations are checked)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items):
    seen = collections.Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if (few := item.get_closest_marker("few")) and seen[test] > few.args[0]:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_is_quick)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """family -> (directory, transformers model)."""
    from oracles import FAMILIES, make_torch_model

    made = {}
    for family in FAMILIES:
        model = make_torch_model(family)
        directory = tmp_path_factory.mktemp(f"checkpoint-{family}")
        model.save_pretrained(directory)
        made[family] = directory, model
    return made


def pytest_generate_tests(metafunc):
    own = (mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not any("family" in names for names in own):
        from oracles import FAMILIES

        metafunc.parametrize("family", list(FAMILIES))


@pytest.fixture
def checkpoint(checkpoints, family):
    """(directory, transformers model) of one family."""
    return checkpoints[family]


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory):
    """A GPT-2 of two layers with a tokenizer, as a directory that `--model` takes."""
    import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "gpt2", tiny.GPT2)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    """The same of Llama, with a chat template."""
    import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", tiny.LLAMA, chat=tiny.CHATML)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    import tiny

    path = tmp_path_factory.mktemp("data") / "logbook.txt"
    path.write_text(tiny.text())
    return str(path)


@pytest.fixture(scope="session")
def records_file(tmp_path_factory):
    import tiny

    return tiny.write_records(tmp_path_factory.mktemp("data") / "tasks.jsonl", tiny.records())


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "The pages are tested in Chromium: install it (apt-get install chromium)."
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=flags)
        yield started
        started.close()


@pytest.fixture
def quick_compilation():
    """Compiling is most of a run on a tiny model. For tests of what surrounds the numbers; test_resume.py runs as users do."""


def _is_quick(item):
    return "quick_compilation" in item.fixturenames


@pytest.hookimpl(tryfirst=True)  # before the first fixture
def pytest_runtest_setup(item):
    """What is compiled is kept from test to test and module to module, which saves a fifth of the compilations."""
    import jax

    quick = _is_quick(item)
    if quick != jax.config.read("jax_disable_most_optimizations"):
        # Executables of both kinds round differently, so none may outlive the switch, one for each worker.
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quick)
    elif (
        len(jax.devices()[0].client.live_executables()) > 2000
    ):  # each is some 15 mappings of memory, of which Linux gives 65530
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    _draw_alike(f"{request.node.nodeid}::{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _draw_alike(item.nodeid)


def _draw_alike(name):
    """torch draws the same in a test or fixture whatever ran before it in the same worker."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(zlib.crc32(name.encode()))


@pytest.fixture
def call(capsys):
    """Runs a command that must succeed; gives (standard output, standard error)."""
    from command import run

    def succeed(*flags):
        capsys.readouterr()
        code = run(*flags)
        said = capsys.readouterr()
        assert code == 0, said.err
        return said

    return succeed


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with one error, after notes at most; gives its message."""
    from command import run

    from jlora.cli import FAILURE

    def fail(*flags, code=FAILURE):
        capsys.readouterr()
        assert run(*flags) == code
        said = capsys.readouterr()
        *notes, message = re.split("^error: ", said.err, flags=re.MULTILINE)
        assert len(notes) == 1 and all(line.startswith("note: ") for line in notes[0].splitlines())
        assert "Traceback" not in said.err
        return message

    return fail
