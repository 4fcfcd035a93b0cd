"""Runs that memory, time or a scheduler ends, and what a resumed one may do otherwise: the same steps, up to rounding."""

import dataclasses
import json
import os
import shlex
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tyro

import jlora
import jlora.cli
from jlora.cli.config_file import with_config_file
from jlora.runs import OutOfMemory, Stopped, TimeIsUp, changes, job, steps
from jlora.runs.endings import not_finite
from jlora.runs.flags.saving import seconds_of
from jlora.runs.run import Run
from jlora.runs.signals import StopSignals, TimeLimit
from jlora.train import init_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 6
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes."


def options(model, data, output, **changes):
    fields = {
        "steps": STEPS, "rank": 2, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 2, "checkpoint_every": 2,
        "log_to": ("none",), "experiments_log": "none", "quiet": True,
    }  # fmt: skip
    return jlora.FinetuneConfig(model=str(model), data=str(data), output=str(output), **fields | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "gpt2", tiny.GPT2)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Of lengths that share rows."""
    rows = [{"instruction": "Go on.", "output": "lamp " * (1 + n * 5 % 19)} for n in range(20)]
    return tiny.write_records(tmp_path_factory.mktemp("data") / "records.jsonl", rows)


@pytest.fixture(scope="module")
def finished(model, records, tmp_path_factory):
    config = options(model, records, tmp_path_factory.mktemp("finished") / "out")
    jlora.finetune(config)
    return config


@pytest.fixture
def half(finished, tmp_path, monkeypatch):
    """A run that was stopped after step 3."""
    config = dataclasses.replace(finished, output=str(tmp_path / "half"))
    stop_after(monkeypatch, 3)
    with pytest.raises(Stopped):
        jlora.finetune(config)
    monkeypatch.undo()
    return dataclasses.replace(config, resume=True)


def stop_after(patch, step, number=signal.SIGTERM):
    batch = steps.data_lib.batch

    def batch_and_signal(data, which, **where):
        if which == step:  # counted from 0: the batch of the next step, made while this one runs
            signal.raise_signal(number)
        return batch(data, which, **where)

    patch.setattr(steps.data_lib, "batch", batch_and_signal)


def losses(config):
    return [entry["loss"] for entry in tiny.read_log(config.output) if "loss" in entry]


def noted(config):
    return json.loads((Path(config.output) / "run.json").read_text())["changes"]


def adapter(config):
    return (Path(config.output) / "adapter" / "adapter_model.safetensors").read_bytes()


# What may be changed


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 2, "accumulate": 2},
        {"form": "per-layer"},
        {"remat": "layer"},
        {"offload_optimizer": True},
        {"batch_size": 1, "accumulate": 4, "form": "per-layer", "remat": "layer"},
    ],
    ids=str,
)
def test_another_way_to_compute_the_same_steps(half, finished, change, capsys):
    config = dataclasses.replace(half, **change)
    jlora.finetune(config)
    assert "from here on the run is equal up to rounding" in " ".join(capsys.readouterr().err.split())
    np.testing.assert_allclose(losses(config), losses(finished), rtol=1e-5)
    assert noted(config) == [{"after_step": 3, **change}]
    jlora.finetune(half)
    assert noted(config)[1:] == [{"after_step": 6}], "and back"


def test_dropout_draws_other_values_in_other_micro_batches():
    before = {"batch_size": 4, "accumulate": 1, "dropout": 0.1}
    said = changes.said(before, before | {"batch_size": 2, "accumulate": 2}, ["batch_size", "accumulate"])
    assert said.startswith("batch_size 2 (was 4), accumulate 2 (was 1): from here on the run is equal up to rounding")
    assert said.endswith("no longer to the byte, and dropout drops other values")


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"batch_size": 8, "accumulate": 2}, {"accumulate": 2}])
def test_other_records_in_a_step_are_refused(half, change):
    with pytest.raises(ValueError, match="must not change:\n  (batch_size|accumulate): was"):
        jlora.finetune(dataclasses.replace(half, **change))


@pytest.mark.slow
def test_a_state_of_another_adapter_is_no_other_form(half):
    path = Path(half.output) / "config.yaml"
    path.write_text(path.read_text().replace("rank: 2", "rank: 3"))
    with pytest.raises(ValueError, match="of another adapter or optimizer"):
        jlora.finetune(dataclasses.replace(half, rank=3, form="per-layer"))


# Memory


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError(EXHAUSTED)


@pytest.mark.parametrize(
    ("module", "name"), [(job, "load"), (steps, "make_step"), (job, "evaluate")], ids=["load", "compile", "evaluate"]
)
def test_no_memory_before_the_first_step_is_in_nobodys_way(finished, tmp_path, monkeypatch, module, name):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    monkeypatch.setattr(module, name, exhausted)
    with pytest.raises(OutOfMemory) as error:
        jlora.finetune(config)
    said = str(error.value)
    assert said.startswith(f"out of memory ({EXHAUSTED}).")
    assert "  --batch-size 2 --accumulate 2" in said and "  --quantize nf4" in said
    assert said.endswith("No state is saved yet. Start it again.")
    assert ("A step is predicted to take" in said) == (name != "load")
    monkeypatch.undo()
    with Run(config):
        assert {p.name for p in Path(config.output).iterdir()} == {"config.yaml", ".lock"}, "the next start begins anew"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_no_memory_later_keeps_the_state_and_goes_on(finished, tmp_path, monkeypatch, where):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        if where == "step":
            run = steps.Steps.run
            patch.setattr(steps.Steps, "run", lambda self, s, b, n: exhausted() if n == 4 else run(self, s, b, n))
        else:
            evaluate, calls = job.Job.evaluate, []
            patch.setattr(
                job.Job,
                "evaluate",
                lambda *given: exhausted() if calls.append(1) or len(calls) == 3 else evaluate(*given),
            )
        with pytest.raises(OutOfMemory) as error:
            jlora.finetune(config)
    saved = 2 if where == "step" else 4
    said = str(error.value)
    assert f"The state of step {saved} is saved. Continue with --resume.\n" in said
    command = said.splitlines()[-1].strip()
    assert command == f"jlora finetune --config {config.output}/config.yaml --resume --batch-size 2 --accumulate 2"
    assert "  --remat layer" in said and "MiB" in said
    jlora.finetune(dataclasses.replace(config, resume=True))
    assert adapter(config) == adapter(finished), "with as much as before, to the byte"


# Time and signals


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("55m", 3300), ("1h", 3600), ("1h30m", 5400), ("90s", 90), ("3300", 3300), ("0.5h", 1800), ("2h3m4s", 7384)],
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 m", "-3", "1d", "m", "1.2.3", "30m1h", "0"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="`time_limit` must be a time such as 55m"):
        jlora.FinetuneConfig(model="m", data="d", output="o", time_limit=text)


def test_a_limit_leaves_time_for_a_step_and_a_save():
    now = [100.0]
    limit = TimeLimit(60, clock=lambda: now[0])
    limit.note("step", 5.0)
    limit.note("step", 2.0)
    limit.note("save", 10.0)
    now[0] = 144.9
    assert not limit.is_near
    now[0] = 145.0
    assert limit.is_near, "60 seconds less the longest step and the longest save"
    stop = StopSignals(limit)
    assert not stop.asked, "before there is anything to save"
    stop.defer()
    assert stop.asked and stop.out_of_time and not stop.signalled


@pytest.fixture
def limited(finished, tmp_path, monkeypatch):
    """Stopped by its time limit after step 3; the command to continue."""
    config = dataclasses.replace(finished, output=str(tmp_path / "a run"), time_limit="55m")
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimit, "is_near", property(lambda self: at_of(config) >= 3))
        with pytest.raises(TimeIsUp) as error:
            jlora.finetune(config)
    first, command = str(error.value).split("\n  ")
    assert first == "The time limit of 55m is near: stopped after step 3 of 6; the state is saved. Continue with"
    assert error.value.exit_code == 75
    return config, command


def at_of(config):
    path = Path(config.output) / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.is_file() else -1


def test_a_time_limit_ends_with_the_command_that_goes_on(limited, finished):
    config, command = limited
    words = shlex.split(command)
    assert words == ["jlora", "finetune", "--config", f"{config.output}/config.yaml", "--resume"]
    resumed = tyro.cli(jlora.FinetuneConfig, args=with_config_file(jlora.FinetuneConfig, words[2:]))
    assert resumed == dataclasses.replace(config, resume=True)
    jlora.finetune(resumed)
    assert adapter(resumed) == adapter(finished)


def test_the_command_says_what_is_other_than_when_the_run_began(finished, tmp_path):
    began = changes.plain(dataclasses.asdict(finished))
    (tmp_path / "config.yaml").write_text(json.dumps(began))
    config = dataclasses.replace(
        finished, output=str(tmp_path), batch_size=2, accumulate=2, remat="layer", quiet=False, log_to=("csv", "tensorboard"),
        sample_prompts=("it's a", "b"), time_limit=None, profile=None,
    )  # fmt: skip
    words = shlex.split(changes.command(config, began))
    resumed = tyro.cli(jlora.FinetuneConfig, args=with_config_file(jlora.FinetuneConfig, words[2:]))
    assert resumed == dataclasses.replace(config, resume=True)


def test_the_command_exits_with_a_code_of_its_own(monkeypatch, capsys, finished, tmp_path):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"), time_limit="1h")
    monkeypatch.setattr(TimeLimit, "is_near", property(lambda self: True))
    flags = [
        "--model",
        config.model,
        "--data",
        config.data,
        "--output",
        config.output,
        "--steps",
        "3",
        "--time-limit",
        "1h",
    ]
    with pytest.raises(SystemExit) as error:
        jlora.cli.main(["finetune", *flags, "--rank", "2", "--batch-size", "4", "--quiet"])
    assert error.value.code == 75
    assert (
        "stopped after step 1 of 3; the state is saved. Continue with\n  jlora finetune --config"
        in capsys.readouterr().err
    )


def test_a_signal_that_saves_and_goes_on(finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"), quiet=False, keep=9)
    before = signal.getsignal(signal.SIGUSR1)
    stop_after(monkeypatch, 3, signal.SIGUSR1)
    jlora.finetune(config)
    assert "SIGUSR1: the state of step 3 is saved" in capsys.readouterr().out
    assert sorted(os.listdir(Path(config.output) / "checkpoints")) == ["2", "3", "4", "6"]
    assert adapter(config) == adapter(finished)
    assert signal.getsignal(signal.SIGUSR1) == before


# ---- a gradient that is not finite


def test_the_parameter_whose_gradient_is_not_finite_is_named():
    def loss_fn(params, batch, key):
        return jnp.sum(params["a"]["kernel"]) + jnp.sum(jnp.sqrt(params["b"]["kernel"])), jnp.int32(1)

    adapter, tx = {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.zeros(2)}}, optax.sgd(1.0)
    _, metrics = make_step(loss_fn, tx, grad_norms=True)(init_state(adapter, tx), None, {}, jax.random.key(0))
    norms = metrics["grad_norms"].tolist()
    assert norms == [np.float32(np.sqrt(3)), np.inf] and np.isfinite(metrics["loss"])
    assert not_finite(adapter, norms) == "that of b/kernel, of 2"
    assert not_finite(adapter, [1.0, 1.0]) is None and not_finite(adapter, [np.nan, np.nan]) is None
