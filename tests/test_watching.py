"""What watches a run: tables, TensorBoard, trackers, samples, a profile, early stopping, and callbacks of one's own."""

import csv
import dataclasses
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny
import transformers

import jlora
from jlora.data.prompts import Prompt
from jlora.data.records import Record
from jlora.runs import CallbackFailed, View, watchers
from jlora.runs.display import Display
from jlora.runs.experiments import put_row
from jlora.runs.watchers import early_stopping
from jlora.runs.watchers.tensorboard import read_events
from jlora.train import init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 6
PROMPTS = ("The keeper", "Rain and wind and")


def options(model, data, output, **changes):
    fields = {
        "steps": STEPS, "rank": 2, "targets": ("c_attn",), "batch_size": 2, "max_length": 16, "learning_rate": 1e-2,
        "eval_every": 2, "checkpoint_every": 2, "log_to": ("csv", "tensorboard"), "sample_prompts": PROMPTS,
        "sample_tokens": 4, "quiet": True,
    }  # fmt: skip
    return jlora.FinetuneConfig(model=str(model), data=str(data), output=str(output), **fields | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "gpt2", tiny.GPT2 | {"n_layer": 1})


@pytest.fixture(scope="module")
def finished(model, text_file, tmp_path_factory):
    config = options(model, text_file, tmp_path_factory.mktemp("finished") / "out")
    jlora.finetune(config)
    return config


@pytest.fixture
def begun(finished, tmp_path):
    """The same, as a process leaves it that dies after step 5, whose last checkpoint is of step 4."""
    output = tmp_path / "out"
    shutil.copytree(finished.output, output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "6")
    return dataclasses.replace(finished, output=str(output), resume=True)


def log(config):
    return tiny.read_log(config.output)


def read_table(path: Path) -> list[dict[str, float | None]]:
    """The rows of a metrics.csv, None where nothing is."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(text) if text else None for name, text in row.items()} for row in csv.DictReader(file)]


def scalars(config):
    """step -> name -> value, of all events; each name of a step once."""
    found = {}
    for step, _, values in read_events(Path(config.output) / "tensorboard"):
        assert not found.setdefault(step, {}).keys() & values.keys(), f"step {step} stands twice"
        found[step] |= values
    return found


def samples(config):
    return [json.loads(line) for line in (Path(config.output) / "samples.jsonl").read_text().splitlines()]


def assert_watched(config):
    """Table and events say what the log says, by its names."""
    entries = log(config)
    table = read_table(Path(config.output) / "metrics.csv")
    assert [{k: v for k, v in row.items() if v is not None} for row in table] == entries
    events = scalars(config)
    assert list(events) == [entry["step"] for entry in entries]
    for entry in entries:
        expected = {k: np.float32(v) for k, v in entry.items() if k != "step"}
        assert events[entry["step"]] == expected


def test_the_log_stands_in_the_table_and_in_the_events(finished):
    assert [entry["step"] for entry in log(finished)] == list(range(STEPS + 1))
    assert_watched(finished)


@pytest.mark.slow
def test_samples_are_greedy_at_every_evaluation(finished):
    assert [(s["step"], s["prompt"]) for s in samples(finished)] == [(n, p) for n in (0, 2, 4, 6) for p in PROMPTS]
    model, base = jlora.load(finished.model, stack=True)
    params = jlora.load_adapter(Path(finished.output) / "adapter", base)
    tokenizer = jlora.load_tokenizer(finished.model)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    rows = jlora.generate(model, params, ids, max_new_tokens=4, temperature=0)
    said = [sample["text"] for sample in samples(finished) if sample["step"] == 6]
    assert [" ".join(text.split()) for text in said] == [" ".join(tokenizer.decode(row).split()) for row in rows]


def test_watching_changes_no_byte_and_compiles_nothing_anew(finished, tmp_path, caplog):
    none = {"log_to": ("none",), "sample_prompts": (), "report": "none"}
    plain = dataclasses.replace(finished, output=str(tmp_path / "plain"), **none)
    jlora.finetune(plain)
    names = {p.name for p in Path(plain.output).iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "data", "adapter"}
    weights = [Path(c.output, "adapter", "adapter_model.safetensors").read_bytes() for c in (plain, finished)]
    assert weights[0] == weights[1]
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        jlora.finetune(dataclasses.replace(finished, output=str(tmp_path / "again")))
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    assert not [m for m in compiled if "begin" in m or "advance" in m], (
        "the samples' programs are those of the run before"
    )


def test_a_resumed_run_goes_on_without_a_step_twice(begun, finished):
    times = {step: time for step, time, _ in read_events(Path(begun.output) / "tensorboard")}
    with (Path(begun.output) / "metrics.csv").open("a") as table:
        table.write("7,1")
    with (Path(begun.output) / "samples.jsonl").open("a") as lines:
        lines.write('{"step": 6, "pro')
    jlora.finetune(begun)
    assert_watched(begun)
    assert samples(begun) == samples(finished)
    again = {step: time for step, time, _ in read_events(Path(begun.output) / "tensorboard")}
    assert all(again[step] == times[step] for step in range(5)) and again[6] > times[6]


def test_a_table_that_was_damaged_is_the_logs_again(begun):
    (Path(begun.output) / "metrics.csv").write_bytes(b"\x00\xff")
    for file in (Path(begun.output) / "tensorboard").iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    jlora.finetune(begun)
    assert_watched(begun)


# Trackers


class Tracker(types.ModuleType):
    """A module like `wandb` and `trackio` that records what it is given, and what of it is not lost with a process."""

    def __init__(self, name):
        super().__init__(name)
        self.inits, self.kept, self.finished, self._next_step = [], {}, 0, 0

    @property
    def step(self):
        return self._next_step

    def init(self, **given):
        self.inits.append(given)
        self._next_step = max(self.kept, default=-1) + 1
        return self

    def log(self, values, *, step):
        assert step not in self.kept, f"step {step} is sent twice"
        self.kept[step] = values

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_each_entry_once(begun, monkeypatch, name):
    """Also where the process before was killed before it sent the last ones, or had sent more than it saved."""
    for kept in (range(3), range(6)):
        tracker = Tracker(name)
        tracker.kept = dict.fromkeys(kept, "before")
        monkeypatch.setitem(sys.modules, name, tracker)
        config = dataclasses.replace(begun, log_to=(name,), run_name="mine", output=begun.output)
        jlora.finetune(config)
        expected = {e["step"]: {k: v for k, v in e.items() if k != "step"} for e in log(config)}
        assert {**expected, **dict.fromkeys(kept, "before")} == tracker.kept
        assert tracker.finished == 1
        (given,) = tracker.inits
        assert given["resume"] == "allow" and given["name"].startswith("mine") and given["config"]["rank"] == 2
        assert given["project"] == "jlora"
        run_id = json.loads((Path(config.output) / "run.json").read_text())["id"]
        assert run_id in (given.get("id"), given["name"].removeprefix("mine-")), "by which it is found again"
        shutil.rmtree(Path(begun.output) / "checkpoints" / "6")


@pytest.mark.parametrize(
    ("extra", "package"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "tensorboardX")]
)
def test_a_package_that_is_not_there_is_named_before_anything_is_done(finished, tmp_path, monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = dataclasses.replace(finished, output=str(tmp_path / "out"), log_to=("csv", extra))
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'jlora\[{extra}\]'"):
        jlora.finetune(config)
    assert not list(tmp_path.iterdir())


# The table of runs


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_run_that_has_ended(finished, begun, tmp_path):
    (first,) = rows(Path(finished.output).parent / "experiments_log.csv")
    assert (first["name"], first["model"], first["data"]) == ("out", finished.model, finished.data)
    assert (first["rank"], first["steps"], first["batch_size"]) == ("2", "6", "2")
    last = log(finished)[-1]
    assert (float(first["final_loss"]), float(first["eval_loss"])) == (last["loss"], last["eval_loss"])
    assert 0 < float(first["adapter_memory_gib"]) < float(first["peak_memory_gib"]) < 1
    table = tmp_path / "table.csv"
    table.write_text("id,name,mine\nabc,earlier,a note\n")
    config = dataclasses.replace(begun, experiments_log=str(table))
    jlora.finetune(config)
    jlora.finetune(config)
    earlier, row = rows(table)
    assert (earlier["name"], earlier["mine"]) == ("earlier", "a note"), "what is there stays, columns too"
    assert row["id"] == first["id"] and row["mine"] == "", "one row, however often it is resumed"
    saved = json.loads((Path(begun.output) / "checkpoints" / "6" / "checkpoint.json").read_text())["seconds"]
    before = json.loads((Path(begun.output) / "checkpoints" / "4" / "checkpoint.json").read_text())["seconds"]
    assert float(row["runtime_seconds"]) + 0.1 >= saved > before > 0, "all processes' time"
    jlora.finetune(dataclasses.replace(config, experiments_log="none"))


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe", b'id\n"open'])
def test_a_file_that_is_no_table_of_runs_is_left_alone(begun, content, tmp_path, capsys):
    path = tmp_path / "theirs.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is no .*Move it away, or name another with --experiments-log"):
        put_row(path, {"id": "x"})
    assert path.read_bytes() == content and not list(tmp_path.glob(".theirs*"))


@pytest.mark.slow
def test_a_table_that_cannot_be_written_ends_no_run(begun, tmp_path, capsys):
    path = tmp_path / "theirs.csv"
    path.write_text("not a table\n")
    jlora.finetune(dataclasses.replace(begun, experiments_log=str(path)))
    assert f"warning: this run is not in '{path}': it is no table of runs" in " ".join(capsys.readouterr().err.split())
    assert (Path(begun.output) / "adapter").is_dir()


# Early stopping


@pytest.mark.few(1)
@pytest.mark.parametrize("patience", [2, 1, 3])
@pytest.mark.parametrize("threshold", [0.05, 0.0])
def test_early_stopping_is_transformers(patience, threshold):
    draw = np.random.default_rng(patience)
    arguments = types.SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
    for _ in range(50):
        losses = (3 - np.cumsum(draw.normal(0.02, 0.1, 12)).round(2)).tolist()
        theirs = transformers.EarlyStoppingCallback(patience, threshold)
        state, control = transformers.TrainerState(), transformers.TrainerControl()
        stopped = None
        for number, loss in enumerate(losses, 1):
            theirs.on_evaluate(arguments, state, control, {"eval_loss": loss})
            if control.should_training_stop:
                stopped = number
                break
            state.best_metric = (
                loss if state.best_metric is None else min(loss, state.best_metric)
            )  # as the Trainer does
        waits = [early_stopping.evaluations_without_gain(losses[:n], threshold) for n in range(1, len(losses) + 1)]
        assert stopped == next((n for n, waited in enumerate(waits, 1) if waited >= patience), None)


@pytest.fixture(scope="module")
def stopped_early(finished, tmp_path_factory):
    """A run whose loss soon gets worse."""
    config = dataclasses.replace(
        finished, output=str(tmp_path_factory.mktemp("early") / "out"), steps=40, learning_rate=0.3, eval_every=1,
        early_stopping_patience=2, save="best", checkpoint_every=3, log_to=("csv",), sample_prompts=(),
    )  # fmt: skip
    return config, jlora.finetune(config)


def losses_of(config):
    return {e["step"]: e["eval_loss"] for e in log(config) if e["step"]}


def test_early_stopping_ends_a_run_like_any_other(stopped_early):
    config, result = stopped_early
    losses = losses_of(config)
    last, best = max(losses), min(losses, key=losses.get)
    assert last < 40 and last == best + 2, "two evaluations without a better one"
    assert result.eval_loss == losses[best] and (Path(config.output) / "adapter").is_dir()
    assert rows(Path(config.output).parent / "experiments_log.csv")[0]["steps"] == str(last)


def test_early_stopping_ends_a_resumed_run_at_the_same_step(stopped_early, tmp_path, capsys):
    config, _ = stopped_early
    weights = Path(config.output, "adapter", "adapter_model.safetensors").read_bytes()
    for number, lost in enumerate(
        ((), (max(losses_of(config)),), "all")
    ):  # killed after, before and long before the last state
        output = tmp_path / str(number)
        shutil.copytree(config.output, output)
        shutil.rmtree(output / "adapter")
        for step in output.glob("checkpoints/*"):
            if lost == "all" or int(step.name) in lost:
                shutil.rmtree(step)
        jlora.finetune(dataclasses.replace(config, output=str(output), resume=True, quiet=number > 0))
        assert losses_of(config) == {e["step"]: e["eval_loss"] for e in tiny.read_log(output) if e["step"]}
        assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_early_stopping_needs_evaluations():
    with pytest.raises(ValueError, match="`early_stopping_patience` needs evaluations"):
        jlora.FinetuneConfig(model="m", data="d", output="o", eval_fraction=0.0, early_stopping_patience=1)


# Callbacks of one's own


class Recorder(jlora.Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, view):
        self.calls.append(("start", view.step, len(view.history)))

    def on_step(self, view, entry):
        assert view.history[-1] is entry and "eval_loss" not in entry
        self.calls.append(("step", view.step))

    def on_evaluation(self, view, entry):
        assert view.history[-1]["eval_loss"] == entry["eval_loss"]
        self.calls.append(("evaluation", view.step))

    def on_log(self, view, entry):
        assert view.history[-1] == entry == tiny.read_log(view.directory)[-1]
        self.calls.append(("log", view.step))

    def on_end(self, view):
        self.calls.append(("end", view.step))


def bare(finished, output, **changes):
    fields = {"log_to": ("none",), "sample_prompts": (), "experiments_log": "none", "output": str(output)} | changes
    return dataclasses.replace(finished, **fields)


def test_the_order_of_the_calls(finished, begun, tmp_path):
    recorder = Recorder()
    jlora.finetune(bare(finished, tmp_path / "new", steps=2), callbacks=[recorder])
    assert recorder.calls == [
        ("start", 0, 0), ("evaluation", 0), ("log", 0), ("step", 1), ("log", 1), ("step", 2), ("evaluation", 2), ("log", 2),
        ("end", 2),
    ]  # fmt: skip
    recorder = Recorder()
    jlora.finetune(bare(begun, begun.output), callbacks=[recorder])
    assert recorder.calls == [
        ("start", 4, 5), ("step", 5), ("log", 5), ("step", 6), ("evaluation", 6), ("log", 6), ("end", 6)
    ]  # fmt: skip


def test_a_callback_that_ends_the_run(finished, tmp_path, capsys):
    """Between two evaluations: the last state is evaluated all the same."""

    class Enough(jlora.Callback):
        def on_step(self, view, entry):
            return "three are enough" if view.step == 3 else None

    config = bare(finished, tmp_path / "out", quiet=False)
    result = jlora.finetune(config, callbacks=[Enough()])
    assert "ending after step 3 of 6: Enough: three are enough" in capsys.readouterr().out
    assert [e["step"] for e in log(config)] == [0, 1, 2, 3] and result.eval_loss == log(config)[-1]["eval_loss"]
    jlora.finetune(dataclasses.replace(config, resume=True))
    assert [e["step"] for e in log(config)] == [0, 1, 2, 3], "and it has ended there"


@pytest.mark.parametrize("method", ["on_step", "on_evaluation", "on_log"])
def test_a_callback_that_fails_saves_the_state_and_is_named(finished, tmp_path, method):
    class Fragile(jlora.Callback):
        pass

    def fails(self, view, entry):
        if view.step == 4:
            raise KeyError("oops")

    setattr(Fragile, method, fails)
    config = bare(finished, tmp_path / "out")
    with pytest.raises(CallbackFailed) as error:
        jlora.finetune(config, callbacks=[Fragile()])
    assert str(error.value) == (
        f"The callback Fragile failed in {method} of step 4 (KeyError: 'oops'); the state of step 4 is saved. Continue with "
        "--resume."
    )
    assert isinstance(error.value.__cause__, KeyError)
    recorder = Recorder()
    jlora.finetune(dataclasses.replace(config, resume=True), callbacks=[recorder])
    assert [call for call in recorder.calls if call[1] == 4][-3:] == [("step", 4), ("evaluation", 4), ("log", 4)]
    weights = [Path(c.output, "adapter", "adapter_model.safetensors").read_bytes() for c in (config, finished)]
    assert weights[0] == weights[1]
    assert [e["step"] for e in log(config)] == list(range(STEPS + 1))


def test_what_is_no_callback_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="derived from jlora.Callback; got <function"):
        jlora.finetune(bare(finished, tmp_path / "out"), callbacks=[lambda: None])
    assert not list(tmp_path.iterdir())


# Samples and profile


@pytest.mark.parametrize("template", ["chat", None])
def test_prompts_are_encoded_as_the_data_is(llama_dir, tmp_path, template):
    tokenizer = jlora.load_tokenizer(llama_dir)
    watcher = watchers.Samples(
        [Prompt("Write rain.", Record(instruction="Write rain."))], max_new_tokens=4, display=Display(quiet=True)
    )
    model, params = jlora.load(llama_dir)
    watcher.on_start(
        View(
            config=jlora.FinetuneConfig(model="m", data="d", output="o"), directory=tmp_path, id="x", step=0, steps=1, history=[],
            model=model, tokenizer=tokenizer, template=template, state=init_state({"w": params}, optax.sgd(1.0)), base=params,
        )
    )  # fmt: skip
    turns = [{"role": "user", "content": "Write rain."}]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert watcher._ids == [chat if template else tokenizer("Write rain.").input_ids]


def test_samples_that_are_too_long_are_refused(finished, tmp_path):
    config = dataclasses.replace(finished, output=str(tmp_path / "out"), sample_tokens=tiny.POSITIONS)
    with pytest.raises(ValueError, match="at most the model's 64 positions; .*Lower --sample-tokens"):
        jlora.finetune(config)


@pytest.mark.slow
def test_a_profile_of_a_few_steps(finished, tmp_path, capsys):
    config = bare(finished, tmp_path / "out", profile=2, quiet=False)
    jlora.finetune(config)
    (trace,) = (tmp_path / "out" / "profile").rglob("perfetto_trace.json.gz")
    assert list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))
    said = "".join(capsys.readouterr().out.split())
    assert str(trace) in said and "ui.perfetto.dev" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"log_to": ("none", "csv")}, "`log_to` 'none' stands alone"),
        ({"sample_tokens": 0}, "`sample_tokens` must be at least 1"),
        ({"profile": 0}, "`profile` must be at least 1"),
        ({"run_name": ""}, "`run_name` must not be empty"),
        ({"early_stopping_patience": 0}, "`early_stopping_patience` must be at least 1"),
        ({"early_stopping_threshold": -1.0}, "`early_stopping_threshold` must be 0 or positive"),
    ],
)
def test_flags_out_of_range(changes, says):
    with pytest.raises(ValueError, match=says):
        jlora.FinetuneConfig(model="m", data="d", output="o", **changes)
