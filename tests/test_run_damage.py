"""Runs under fault: damaged files, full disks, two writers, stops before the first step, and starts that came to nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from safetensors.numpy import load_file, save_file

import jlora
from jlora.files.run_settings import FILE
from jlora.runs import Stopped, TrainingDiverged, halves, job, loop, outcome, steps
from jlora.runs.run import Run
from jlora.storage.lock import InUse, only_writer
from jlora.storage.whole import NoSpace
from jlora.train import checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "gpt2", tiny.GPT2 | {"n_layer": 1})


def options(model, data, output, **changes):
    fields = {
        "steps": STEPS, "rank": 2, "targets": ("c_attn",), "batch_size": 2, "max_length": 16, "learning_rate": 1e-2,
        "dropout": 0.1, "eval_every": 2, "checkpoint_every": 2, "save": "best", "quiet": True,
    }  # fmt: skip
    return jlora.FinetuneConfig(model=str(model), data=str(data), output=str(output), **fields | changes)


@pytest.fixture(scope="module")
def finished(model, text_file, tmp_path_factory):
    config = options(model, text_file, tmp_path_factory.mktemp("finished") / "out")
    jlora.finetune(config)
    return config


@pytest.fixture
def begun(finished, tmp_path):
    """The same, as a process leaves it that dies before it writes the adapter."""
    output = tmp_path / "out"
    shutil.copytree(finished.output, output)
    shutil.rmtree(output / "adapter")
    return dataclasses.replace(finished, output=str(output), resume=True)


def adapter(config):
    return {p.name: p.read_bytes() for p in (Path(config.output) / "adapter").iterdir()}


def log(config):
    return [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in tiny.read_log(config.output)]


def assert_same(config, finished):
    assert adapter(config) == adapter(finished)
    assert log(config) == log(finished)
    written = {"config.yaml", "run.json", "metrics.jsonl", "metrics.csv", "report.html", "report.md"}
    assert {p.name for p in Path(config.output).iterdir()} == {*written, "checkpoints", "data", "adapter"}
    assert not [p for p in Path(config.output).rglob(".*")]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


def first(directory, pattern):
    return sorted(p for p in directory.glob(pattern) if p.is_file())[0]


def tree(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda output: flip(first(output / "checkpoints/6/state", "ocdbt.process_0/d/*")),
        lambda output: (output / "checkpoints/6/state/_METADATA").unlink(),
        lambda output: (output / "checkpoints/6/checkpoint.json").write_bytes(b""),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(begun, finished, damage, capsys):
    damage(Path(begun.output))
    jlora.finetune(dataclasses.replace(begun, quiet=False))
    said = capsys.readouterr()
    assert said.err.startswith("warning: checkpoint 6 is damaged (") and "resuming after step 4 of 6" in said.out
    assert_same(begun, finished)


@pytest.mark.slow
def test_without_a_whole_checkpoint_the_run_begins_again(begun, finished, capsys):
    for step in (Path(begun.output) / "checkpoints").iterdir():
        flip(step / "checkpoint.json")
    jlora.finetune(begun)
    assert "starting from the beginning" in capsys.readouterr().err, "also where nothing else is said"
    assert_same(begun, finished)


@pytest.mark.slow
def test_a_stray_directory_among_the_checkpoints(begun, finished):
    (Path(begun.output) / "checkpoints" / "5").mkdir()
    (Path(begun.output) / "checkpoints" / ".6.partial-xyz").mkdir()
    (Path(begun.output) / ".metrics.jsonl.partial-xyz").touch()
    (Path(begun.output) / "checkpoints" / "9").mkdir()
    jlora.finetune(begun)
    (Path(begun.output) / "checkpoints" / "9").rmdir()
    assert_same(begun, finished)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["r[1]", "a[/b]", "[red]", ":x:"])
def test_names_that_look_like_patterns_or_markup(finished, tmp_path, name, capsys):
    config = dataclasses.replace(finished, output=str(tmp_path / name / "run"), quiet=False)
    jlora.finetune(config)
    assert f"adapter of step {best(finished)}: {tmp_path / name / 'run' / 'adapter'}" in "".join(
        capsys.readouterr().out.splitlines()
    )
    shutil.rmtree(tmp_path / name / "run" / "adapter")
    jlora.finetune(dataclasses.replace(config, resume=True))
    assert_same(config, finished)


def best(config):
    evaluated = {e["step"]: e["eval_loss"] for e in tiny.read_log(config.output) if e["step"] and "eval_loss" in e}
    return min(evaluated, key=evaluated.get)


# The log


def test_a_damaged_log_is_named_and_loses_no_good_line(begun, finished, capsys):
    path = Path(begun.output) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "garbage", *lines[2:], ""]))
    jlora.finetune(begun)
    said = capsys.readouterr().err
    assert "line 4 is left out: it is no JSON ('garbage')" in said
    assert "line 5 is left out: step 2 stands above already" in said
    assert_same(begun, finished)


def test_the_best_is_known_without_the_log(begun, finished):
    """A lost line must not make another state the best."""
    (Path(begun.output) / "metrics.jsonl").write_text("")
    jlora.finetune(begun)
    assert adapter(begun) == adapter(finished)


# config.yaml and run.json

NOT_YAML = {
    "empty": b"",
    "nulls": bytes(300),
    "list": b"- a\n- b\n",
    "text": b"just words",
    "number": b"7",
    "binary": b"\xff\xfe\x00\x01",
    "tag": b"model: !!python/object:os.system {}\n",
    "alias": b"model: &a x\ndata: *a\n",
    "unclosed": b"model: [gpt2\n",
    "keys": b"1: 2\n",
}


@pytest.mark.parametrize("content", NOT_YAML.values(), ids=NOT_YAML)
def test_a_damaged_config_is_named(begun, content):
    (Path(begun.output) / "config.yaml").write_bytes(content)
    before = tree(begun.output)
    with pytest.raises(
        ValueError, match="config.yaml.*It is the settings of the run: put a copy of it back, or start anoth"
    ):
        jlora.finetune(begun)
    assert tree(begun.output) == before


def without(config, *names):
    """Takes fields out of the config.yaml of a run."""
    path = Path(config.output) / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({name: value for name, value in fields.items() if name not in names}))


def test_an_older_version_s_config_goes_on(begun, finished):
    """A field that it does not have counts as its default."""
    without(begun, *(f.name for f in dataclasses.fields(begun) if getattr(begun, f.name) == f.default))
    jlora.finetune(begun)
    assert_same(begun, finished)


def test_an_older_version_s_config_against_another_value(begun):
    without(begun, "remat", "targets")
    with pytest.raises(
        ValueError, match="must not change:\n  targets: was \\['all-linear'\\], is \\['c_attn'\\]\n[^:]*$"
    ):
        jlora.finetune(begun)


def test_a_config_without_what_has_no_default(begun):
    without(begun, "model")
    with pytest.raises(ValueError, match="must not change:\n  model: is '.*', and missing in .*config.yaml"):
        jlora.finetune(begun)


NOT_ORIGIN = {
    "empty": b"",
    "cut": b'{"origin": {"ste',
    "object": b"{}",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "origin": b'{"origin": [1]}',
    "binary": b"\xff\xfe\x00",
    "nulls": bytes(100),
    "deep": b"[" * 100_000,
}


def check_origin(config):
    """What a run does between loading the data and its first step."""
    origin = json.loads((Path(config.output) / "run.json").read_text())["origin"]

    def check(content):
        path = Path(config.output) / "run.json"
        path.unlink() if content is None else path.write_bytes(content)
        with Run(config) as run:
            return run.check_origin(origin)

    return check


@pytest.mark.parametrize("content", [*NOT_ORIGIN.values(), None], ids=[*NOT_ORIGIN, "deleted"])
def test_a_damaged_record_of_the_origin_is_named(begun, content):
    before = tree(begun.output)
    with pytest.raises(
        ValueError, match="run.json.*It is the record of what the run was made from: put a copy of it back"
    ):
        check_origin(begun)(content)
    assert {k: v for k, v in tree(begun.output).items() if k.name != "run.json"} == {
        k: v for k, v in before.items() if k.name != "run.json"
    }


def test_a_run_that_died_before_its_record_was_written_goes_on(begun):
    shutil.rmtree(Path(begun.output) / "checkpoints")
    check_origin(begun)(None)
    assert (Path(begun.output) / "run.json").is_file()


def test_a_whole_record(begun):
    assert check_origin(begun)((Path(begun.output) / "run.json").read_bytes()) is None


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"jax": "0.0.1"}, "this run began with jax 0.0.1 (now "),
        ({"python": "3.0.0", "numpy": "1.0"}, "this run began with numpy 1.0 (now "),
        ({"flax": None}, "flax None"),
        ({"torch": "1.0"}, None),
        ({}, None),
        (None, None),
        ([1], None),
    ],
)
def test_other_versions_of_libraries_are_said(begun, versions, says):
    """And are no reason not to go on."""
    record = json.loads((Path(begun.output) / "run.json").read_text())
    said = check_origin(begun)(json.dumps({**record, "versions": versions}).encode())
    assert said is None if says is None else said.count("began with") == 1 and says in said


def test_a_resumed_run_says_so_once(begun, capsys):
    path = Path(begun.output) / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "versions": {**record["versions"], "optax": "0.1"}}))
    jlora.finetune(begun)
    assert capsys.readouterr().err.count("this run began with optax 0.1") == 1


# Data


def test_damaged_shards_are_made_again(begun, finished):
    data = Path(begun.output) / "data"
    tokens = np.load(data / "train-00000.npy")
    np.save(data / "train-00000.npy", tokens[::-1])
    (data / "meta.json").write_text((data / "meta.json").read_text()[:40])
    shutil.rmtree(Path(begun.output) / "checkpoints")
    with pytest.warns(UserWarning, match="meta.json is not what was written; the text is tokenized again"):
        jlora.finetune(begun)
    assert_same(begun, finished)


def test_output_below_the_data(model, text_file, tmp_path, finished):
    def weights(config):
        return {name: content for name, content in adapter(config).items() if name != FILE}  # which names the data

    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(text_file, folder)
    config = dataclasses.replace(finished, data=str(folder), output=str(folder / "runs" / "a"))
    jlora.finetune(config)
    assert weights(config) == weights(finished)
    (folder / "runs" / "a" / "checkpoints" / "note.txt").write_text("Checkpoint commit was successful.")
    shutil.rmtree(folder / "runs" / "a" / "adapter")
    with pytest.warns(UserWarning, match=r"left out of the text in .*`\.txt` files of runs \(.*runs/a\)"):
        jlora.finetune(dataclasses.replace(config, resume=True))
    assert weights(config) == weights(finished)
    meta = json.loads((folder / "runs" / "a" / "data" / "meta.json").read_text())
    assert meta["documents"] == 1


# Two writers


HOLD = """
import sys
from pathlib import Path
from jlora.storage.lock import only_writer
with only_writer(Path(sys.argv[1]), "trained"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Holds a directory, until it is killed or the test ends."""
    started = []

    def start(directory):
        command = [sys.executable, "-c", HOLD, str(directory)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_writer(begun, finished, other_process):
    """Neither a second start nor a second resume touches a run that another process trains; when that is killed, both may."""
    other = other_process(begun.output)
    before = tree(begun.output)
    for config in (begun, dataclasses.replace(begun, resume=False)):
        with pytest.raises(
            InUse, match=rf"is being trained by process {other.pid} on \S+\. Wait until it ends, or stop it"
        ):
            jlora.finetune(config)
    assert tree(begun.output) == before
    other.kill()
    other.wait()
    assert (Path(begun.output) / ".lock").exists()
    jlora.finetune(begun)
    assert_same(begun, finished)


def test_one_writer_of_a_new_directory(begun, tmp_path):
    """Held by this very process, between the making of the directory and its first file."""
    output = tmp_path / "new"
    output.mkdir()
    with only_writer(output, "trained"):
        with pytest.raises(InUse, match=f"by process {os.getpid()} "):
            jlora.finetune(dataclasses.replace(begun, output=str(output), resume=False))
    assert not list(output.iterdir())


def test_a_lock_lets_go_after_an_error(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path, "trained"):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        raise KeyError
    with only_writer(tmp_path, "trained"):
        pass
    assert not list(tmp_path.iterdir())


# Starts that came to nothing


def state_of_a_start(begun, leave):
    """A run's directory with the files of `leave` only."""
    for path in Path(begun.output).iterdir():
        if path.name not in leave:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Path(begun.output)


@pytest.mark.parametrize(
    "leave",
    [
        (),
        ("config.yaml",),
        ("config.yaml", "data"),
        ("config.yaml", "data", "run.json"),
        ("config.yaml", "data", "run.json", "metrics.jsonl"),
    ],
    ids=lambda leave: " ".join(leave) or "nothing",
)
def test_a_start_replaces_a_run_that_saved_nothing(begun, leave):
    output = state_of_a_start(begun, leave)
    (output / ".lock").write_text("1 elsewhere")
    (output / "config.yaml.partial").touch()
    (output / ".config.yaml.partial-abc").touch()
    if "data" in leave:
        (output / "data" / ".partial-77").mkdir()
        (output / "data" / ".partial-77" / "tokens.bin").touch()
    if "metrics.jsonl" in leave:
        (output / "checkpoints" / ".2.partial-x" / "state").mkdir(parents=True)
        (output / "checkpoints" / "4").mkdir()
    other = dataclasses.replace(begun, resume=False, rank=3, batch_size=1)
    with Run(other) as run:
        assert run.replaces == ("config.yaml" in leave)
        assert {p.name for p in output.iterdir()} == {"config.yaml", ".lock"}
        assert "rank: 3" in (output / "config.yaml").read_text()
    assert {p.name for p in output.iterdir()} == {"config.yaml"}


THEIRS = (
    """notes.txt .env data/my.npy data/train.npy data/sub/train-00000.npy checkpoints/6/x checkpoints/mine adapter/x"""
)


@pytest.mark.parametrize("theirs", THEIRS.split())
def test_a_start_replaces_nothing_that_is_somebodys(begun, theirs):
    output = state_of_a_start(begun, ("config.yaml", "data", "run.json", "metrics.jsonl"))
    (output / theirs).parent.mkdir(parents=True, exist_ok=True)
    (output / theirs).write_text("mine")
    before = tree(output)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        jlora.finetune(dataclasses.replace(begun, resume=False))
    assert tree(output) == before


def test_data_without_a_config_is_somebodys(begun):
    output = state_of_a_start(begun, ("data",))
    with pytest.raises(FileExistsError):
        jlora.finetune(dataclasses.replace(begun, resume=False))
    assert tree(output)


@pytest.mark.slow
def test_after_a_run_that_failed_before_its_first_checkpoint_others_settings_are_free(finished, tmp_path, monkeypatch):
    """As where memory does not suffice: a smaller batch is what the message asks for."""
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    larger = dataclasses.replace(config, batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "planned", raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")))
        with pytest.raises(RuntimeError, match="Out of memory"):
            jlora.finetune(larger)
    with pytest.raises(ValueError, match="must not change:\n  batch_size: was 4, is 2\n.*start again without --resume"):
        jlora.finetune(dataclasses.replace(config, resume=True))
    jlora.finetune(config)
    assert_same(config, finished)


@pytest.mark.slow
def test_after_divergence_another_rate_may_be_tried(finished, tmp_path):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"), save="last")
    with pytest.raises(TrainingDiverged):
        jlora.finetune(dataclasses.replace(config, learning_rate=1e30, eval_every=1))
    assert [e["step"] for e in tiny.read_log(config.output)] == [0], "what there was to see is kept until then"
    jlora.finetune(config)
    assert log(config) == log(finished)


# Stops


def at(patch, name, number, *, call=1):
    """A signal at the n-th call of a name in a module of the run."""
    module = next(module for module in (loop, job, halves, outcome, steps) if hasattr(module, name))
    function, calls = getattr(module, name), []

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*args, **kwargs)

    patch.setattr(module, name, signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["find", "load", "add_lora", "evaluate", "make_step", "planned"])
def test_a_stop_before_the_first_step_takes_everything_back(finished, tmp_path, monkeypatch, number, name):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at(patch, name, number)
        with pytest.raises(Stopped, match="^Stopped; no state is saved yet. Start it again.$"):
            jlora.finetune(config)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_a_library_that_swallows_the_interrupt(finished, tmp_path, monkeypatch):
    """As an extension module does whose import is interrupted."""

    def load(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(job, "load", load)
    with pytest.raises(Stopped):
        jlora.finetune(dataclasses.replace(finished, output=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["load", "planned"])
def test_a_stop_before_the_first_step_of_a_resumed_run_keeps_it(begun, finished, monkeypatch, name):
    with monkeypatch.context() as patch:
        at(patch, name, signal.SIGTERM)
        with pytest.raises(Stopped, match="^Stopped; the state of step 6 is saved. Continue with --resume.$"):
            jlora.finetune(begun)
    jlora.finetune(begun)
    assert_same(begun, finished)


@pytest.mark.few(1)
@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_stop_during_an_evaluation_waits_for_one_batch(finished, tmp_path, monkeypatch, call):
    """The state is saved, and its evaluation is made when the run is resumed. Call 1 is before the first step; the last of the
    run is the fourth."""
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    step = 2 * (call - 1)
    with monkeypatch.context() as patch:
        at(patch, "evaluate", signal.SIGTERM, call=call)
        with pytest.raises(Stopped, match=f"after step {step} of 6; the state is saved. Continue with --resume"):
            jlora.finetune(config)
    assert [e["step"] for e in tiny.read_log(config.output)] == list(range(step))
    with monkeypatch.context() as patch:  # and again
        at(patch, "evaluate", signal.SIGINT)
        with pytest.raises(Stopped, match=f"after step {step} of 6"):
            jlora.finetune(dataclasses.replace(config, resume=True))
    jlora.finetune(dataclasses.replace(config, resume=True))
    assert_same(config, finished)


def test_a_second_signal_does_not_wait(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    perplexity, calls = loop.perplexity, []

    def twice(loss):
        calls.append(loss)
        if len(calls) == 3:  # behind the evaluation of step 4
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return perplexity(loss)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "perplexity", twice)
        with pytest.raises(Stopped, match="^Stopped; the state of step 2 is saved. Continue with --resume.$"):
            jlora.finetune(config)
    jlora.finetune(dataclasses.replace(config, resume=True))
    assert_same(config, finished)


# Before the first step


def test_a_tokenizer_that_cannot_be_saved_is_found_before_the_training(finished, tmp_path, monkeypatch):
    tokenizer = jlora.load_tokenizer(finished.model)
    tokenizer.save_pretrained = raising(OSError("bad template name"))
    monkeypatch.setattr(job, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(job, "load", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(OSError, match="bad template name"):
        jlora.finetune(dataclasses.replace(finished, output=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["attn.c_attn.weight", "wte.weight", "ln_f.bias"])
@pytest.mark.parametrize("share", [None, 0.0], ids=["evaluated", "not evaluated"])
def test_a_base_that_is_not_finite_is_named(finished, tmp_path, tensor, value, share):
    base = shutil.copytree(finished.model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if n.endswith(tensor))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[3] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = dataclasses.replace(
        finished, model=str(base), output=str(tmp_path / "out"), eval_fraction=share, save="last"
    )
    with pytest.raises(ValueError, match=rf"are NaN or infinite: \S*{tensor.split('.')[-2]}"):
        jlora.finetune(config)
    assert not (tmp_path / "out").exists()


def test_the_log_is_json_where_a_perplexity_overflows(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    monkeypatch.setattr(loop, "perplexity", lambda loss: float("inf"))
    result = jlora.finetune(config)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [e["perplexity"] for e in entries if "eval_loss" in e] == [None] * 4
    assert list(result.history) == entries


# Full disks

FULL = OSError(28, "No space left on device")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("module", "name", "error", "saved"),
    [
        (checkpoints, "_text", FULL, None),
        (checkpoints, "_file_digests", ValueError("RESOURCE_EXHAUSTED: No space left on device"), None),
        (outcome, "save_adapter", FULL, 6),
        (outcome, "save_adapter", RuntimeError("I/O error: No space left on device (os error 28)"), 6),
        (outcome.shutil, "copytree", FULL, 6),
    ],
)
def test_a_full_disk_says_what_is_saved_and_goes_on(finished, tmp_path, monkeypatch, module, name, error, saved):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, raising(error))
        with pytest.raises(NoSpace) as caught:
            jlora.finetune(config)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"no space left on {jlora_disk(tmp_path)} for '{tmp_path}/out/")
    assert said.endswith(
        "the state of step 6 is saved. Continue with --resume." if saved else "no state is saved yet. Start it again."
    )
    assert "memory" not in said and not (tmp_path / "out" / "adapter").exists()
    jlora.finetune(dataclasses.replace(config, resume=saved is not None))
    assert_same(config, finished)


def jlora_disk(path):
    return next(p for p in (path, *path.parents) if p.is_mount())


def test_a_full_disk_while_the_text_is_prepared(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("jlora.data.shards.write_shards", raising(FULL))
        with pytest.raises(
            NoSpace, match="for '.*/out/data': needs about .* free. Make room; no state is saved yet. Start it"
        ):
            jlora.finetune(config)
    assert not (tmp_path / "out").exists()


# The adapter


def test_an_adapter_appears_whole_or_not_at_all(begun, finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(outcome.shutil, "copytree", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            jlora.finetune(begun)
    assert not (Path(begun.output) / "adapter").exists()
    jlora.finetune(begun)
    assert_same(begun, finished)


def test_a_damaged_adapter_is_written_again_and_a_whole_one_left(begun, finished):
    jlora.finetune(begun)
    directory = Path(begun.output) / "adapter"
    (directory / "README.md").write_text("mine")
    jlora.finetune(begun)
    assert (directory / "README.md").read_text() == "mine"
    flip(directory / "adapter_model.safetensors")
    jlora.finetune(begun)
    assert_same(begun, finished)
