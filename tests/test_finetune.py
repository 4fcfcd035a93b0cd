"""Whole runs of `jlora.finetune` on tiny models: what they write, what they refuse, and that they repeat to the byte."""

import dataclasses
import json
import logging
import math
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
import yaml

import jlora
from jlora.data import eval_batches, load_data
from jlora.runs import Stopped, TrainingDiverged, job, steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, WARMUP, PEAK = 12, 3, 1e-2
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def options(**changes):
    """Of a run that is over in two seconds."""
    fields = {
        "steps": STEPS, "rank": 4, "targets": ("c_attn",), "batch_size": 4, "max_length": 32, "learning_rate": PEAK,
        "warmup_fraction": WARMUP / STEPS, "eval_every": 4, "checkpoint_every": 4, "quiet": True,
    }  # fmt: skip
    fields |= changes
    return jlora.FinetuneConfig(**{name: str(v) if isinstance(v, Path) else v for name, v in fields.items()})


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def adapter_bytes(output):
    return [(Path(output) / "adapter" / name).read_bytes() for name in ADAPTER_FILES]


def saved_steps(output):
    return sorted(int(p.name) for p in (Path(output) / "checkpoints").iterdir() if p.name.isdigit())


@dataclasses.dataclass(frozen=True)
class Finished:
    config: jlora.FinetuneConfig
    result: jlora.FinetuneResult
    base_before: bytes

    @property
    def output(self):
        return Path(self.config.output)


@pytest.fixture(scope="module")
def run(tmp_path_factory, gpt2_dir, text_file):
    """A finished run on text, with a base and data of its own."""
    home = tmp_path_factory.mktemp("run")
    shutil.copytree(gpt2_dir, home / "base")
    shutil.copy(text_file, home / "logbook.txt")
    config = options(model=home / "base", data=home / "logbook.txt", output=home / "out", dropout=0.1)
    before = (home / "base" / "model.safetensors").read_bytes()
    return Finished(config, jlora.finetune(config), before)


def best_options(llama_dir, records_file, output):
    """Of a run that soon learns its few records by heart, so that the best state is neither the last nor checkpointed."""
    return options(
        model=llama_dir, data=records_file, output=output, template="chat", targets=("all-linear",), learning_rate=2e-2,
        eval_every=2, checkpoint_every=5, keep=1, save="best", max_length=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def best_run(tmp_path_factory, llama_dir, records_file):
    config = best_options(llama_dir, records_file, tmp_path_factory.mktemp("best") / "out")
    return Finished(config, jlora.finetune(config), b"")


def best_step(run):
    evaluated = {e["step"]: e["eval_loss"] for e in run.result.history if e["step"] and "eval_loss" in e}
    return min(evaluated, key=evaluated.get)


@contextmanager
def changed(path: Path, content: bytes):
    """Other content in a file, for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


# What a run leaves


@pytest.mark.slow
def test_run_directory(run):
    names = {p.name for p in run.output.iterdir()}
    written = {"config.yaml", "run.json", "metrics.jsonl", "metrics.csv", "report.html", "report.md"}
    assert names == {*written, "checkpoints", "data", "adapter"}
    assert run.result.adapter_dir == run.output / "adapter"
    assert {*ADAPTER_FILES, "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in run.result.adapter_dir.iterdir()
    }
    fields = yaml.safe_load((run.output / "config.yaml").read_text())
    assert jlora.FinetuneConfig(**fields) == run.config
    ran_on = json.loads((run.output / "run.json").read_text())
    assert ran_on["origin"]["steps"] == STEPS
    assert ran_on["versions"]["jax"] == jax.__version__


def test_log_has_every_step_once_with_the_fields_of_the_design(run):
    log = tiny.read_log(run.output)
    assert log == list(run.result.history)
    assert [entry["step"] for entry in log] == list(range(STEPS + 1))
    trained = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    for entry in log:
        evaluated = {"eval_loss", "perplexity"} if entry["step"] % 4 == 0 else set()
        assert set(entry) == ({"step"} if entry["step"] == 0 else trained) | evaluated
        assert all(math.isfinite(value) for value in entry.values())
        if evaluated:
            assert entry["perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
    assert all(entry["tokens_per_second"] > 0 for entry in log[1:])


def test_training_lowers_both_losses(run):
    assert run.result.eval_loss < run.result.base_eval_loss - 0.05
    assert losses(run.result)[-1] < losses(run.result)[0] - 0.05
    log = tiny.read_log(run.output)
    assert (run.result.base_eval_loss, run.result.eval_loss) == (log[0]["eval_loss"], log[-1]["eval_loss"])


def test_learning_rates(run):
    """Linear to the peak, then half a cosine."""
    rising = [PEAK / (WARMUP + 1) + i * PEAK / (WARMUP + 1) for i in range(WARMUP)]
    falling = [PEAK * (1 + math.cos(math.pi * i / (STEPS - WARMUP))) / 2 for i in range(STEPS - WARMUP)]
    logged = [entry["learning_rate"] for entry in run.result.history[1:]]
    np.testing.assert_allclose(logged, rising + falling, rtol=1e-5)


def test_base_is_untouched(run):
    assert (Path(run.config.model) / "model.safetensors").read_bytes() == run.base_before


def test_adapter_gives_the_logged_loss(run, tmp_path):
    model, params = jlora.load(run.config.model, dtype=np.float32)
    params = jlora.load_adapter(run.result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(run.result.adapter_dir)
    _, held_out = load_data(run.config.data, tokenizer, max_length=32, seed=0, directory=tmp_path)
    again = jlora.evaluate(model, params, eval_batches(held_out, batch_size=4))
    assert again.loss == pytest.approx(run.result.eval_loss, rel=1e-6)


def test_adapter_loads_in_peft(run):
    base = transformers.AutoModelForCausalLM.from_pretrained(run.config.model).eval()
    theirs = peft.PeftModel.from_pretrained(base, str(run.result.adapter_dir)).eval()
    model, params = jlora.load(run.config.model, dtype=np.float32)
    params = jlora.load_adapter(run.result.adapter_dir, params)
    ids = np.random.default_rng(0).integers(0, 300, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
        with theirs.disable_adapter():
            plain = theirs(torch.tensor(ids)).logits.numpy()
    logits = model.apply({"params": params}, ids.astype(np.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(expected - plain).max() > 1e-2


def test_same_config_gives_the_same_bytes(run, tmp_path):
    jlora.finetune(dataclasses.replace(run.config, output=str(tmp_path / "again")))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(run.output)


@pytest.mark.slow
def test_another_seed_gives_other_bytes(run, tmp_path):
    jlora.finetune(dataclasses.replace(run.config, output=str(tmp_path / "other"), seed=1, steps=1))
    other = tiny.read_log(tmp_path / "other")
    assert other[0]["eval_loss"] == run.result.base_eval_loss  # an update of zero, and the same held-out text
    assert other[1]["loss"] != run.result.history[1]["loss"]


# Kinds of data, and of batches


@pytest.mark.slow
def test_evaluation_file(gpt2_dir, records_file, tmp_path):
    other = tiny.write_records(tmp_path / "other.jsonl", tiny.records(6, seed=1))
    # 24 records are 3 batches of 8; one and a half times them is 5 steps.
    config = options(
        model=gpt2_dir, data=records_file, eval_data=other, output=tmp_path / "out", steps=None, epochs=1.5,
        batch_size=8, max_length=None,
    )  # fmt: skip
    result = jlora.finetune(config)
    assert [entry["step"] for entry in result.history if "loss" in entry] == [1, 2, 3, 4, 5]
    model, params = jlora.load(gpt2_dir, dtype=np.float32)
    data, _ = load_data(
        other, jlora.load_tokenizer(gpt2_dir), eval_fraction=0, max_length=tiny.POSITIONS, seed=0, directory=tmp_path
    )
    expected = jlora.evaluate(model, params, eval_batches(data, batch_size=8)).loss
    assert result.base_eval_loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_packed_records(llama_dir, records_file, tmp_path):
    """Packing changes the rows, not the loss on the held-out records; without --steps there are three epochs."""
    kind = {"template": "chat", "max_length": 64}
    config = options(model=llama_dir, data=records_file, output=tmp_path / "out", pack=True, steps=None, **kind)
    result = jlora.finetune(dataclasses.replace(config, targets="q_proj", eval_every=9, checkpoint_every=9))
    model, params = jlora.load(llama_dir, dtype=np.float32)
    tokenizer = jlora.load_tokenizer(llama_dir)
    packed, _ = load_data(records_file, tokenizer, seed=0, directory=tmp_path, pack=True, **kind)
    plain, held_out = load_data(records_file, tokenizer, seed=0, directory=tmp_path, **kind)
    assert len(packed) < len(plain)
    assert len(losses(result)) == 3 * math.ceil(len(packed) / 4)
    expected = jlora.evaluate(model, params, eval_batches(held_out, batch_size=4)).loss
    assert result.base_eval_loss == pytest.approx(expected, rel=1e-5)
    assert result.eval_loss < result.base_eval_loss


@pytest.mark.slow
def test_without_evaluation(gpt2_dir, text_file, tmp_path, capsys):
    result = jlora.finetune(options(model=gpt2_dir, data=text_file, output=tmp_path / "out", eval_fraction=0, steps=2))
    assert (result.eval_loss, result.base_eval_loss) == (None, None)
    assert [entry["step"] for entry in tiny.read_log(tmp_path / "out")] == [1, 2]
    assert not any("eval_loss" in entry for entry in result.history)
    assert capsys.readouterr().out == "", "`quiet` prints nothing"


@pytest.fixture(scope="module")
def plain_losses(gpt2_dir, text_file, tmp_path_factory):
    """Of batches of 8 rows, layers unrolled."""
    output = tmp_path_factory.mktemp("plain") / "out"
    return losses(jlora.finetune(same_batches(gpt2_dir, text_file, output)))


def same_batches(model, data, output, **changes):
    fields = {"steps": 5, "batch_size": 8, "eval_fraction": 0, "form": "per-layer"} | changes
    return options(model=model, data=data, output=output, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 2, "accumulate": 4}, {"form": "stacked"}, {"remat": "layer"}],
    ids=["accumulated", "stacked", "remat"],
)
def test_ways_to_compute_the_same_losses(changes, plain_losses, gpt2_dir, text_file, tmp_path):
    result = jlora.finetune(same_batches(gpt2_dir, text_file, tmp_path / "out", **changes))
    np.testing.assert_allclose(losses(result), plain_losses, rtol=2e-5)


@pytest.mark.slow
def test_clipping(run, tmp_path):
    """Gradients cut to far below Adam's epsilon move nothing; the norm in the log is that before clipping."""
    config = dataclasses.replace(run.config, output=str(tmp_path / "out"), steps=3, max_grad_norm=1e-12, dropout=0.0)
    result = jlora.finetune(config)
    assert result.eval_loss == pytest.approx(result.base_eval_loss, abs=1e-4)
    assert all(entry["grad_norm"] > 1e-3 for entry in result.history[1:])


@pytest.mark.slow
def test_one_compilation(gpt2_dir, text_file, tmp_path, caplog):
    config = options(model=gpt2_dir, data=text_file, output=tmp_path / "out", max_length=23, accumulate=2)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        jlora.finetune(config)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    assert sum("jit(step)" in message for message in compiled) == 1
    assert sum("jit(batch_loss)" in message for message in compiled) == 1


# Checkpoints


def test_keeps_the_last_checkpoints(run):
    assert saved_steps(run.output)[-2:] == [8, 12]


@pytest.mark.slow
def test_best_state_becomes_the_adapter(best_run, tmp_path):
    best = best_step(best_run)
    assert best != STEPS and best % best_run.config.checkpoint_every, "the run must overfit between two checkpoints"
    assert best_run.result.eval_loss == tiny.read_log(best_run.output)[best]["eval_loss"]
    assert saved_steps(best_run.output) == [best, STEPS]
    model, params = jlora.load(best_run.config.model, dtype=np.float32)
    params = jlora.load_adapter(best_run.result.adapter_dir, params)
    tokenizer = jlora.load_tokenizer(best_run.result.adapter_dir)
    assert tokenizer.chat_template == tiny.CHATML
    where = {"max_length": tiny.POSITIONS, "seed": 0, "directory": tmp_path}
    _, held_out = load_data(best_run.config.data, tokenizer, template="chat", **where)
    again = jlora.evaluate(model, params, eval_batches(held_out, batch_size=4))
    assert again.loss == pytest.approx(best_run.result.eval_loss, rel=1e-6)


@pytest.mark.slow
def test_a_signal_does_not_change_the_best(best_run, llama_dir, records_file, tmp_path, monkeypatch):
    """Stopped between two checkpoints, at the best state of all: the uninterrupted run must have saved it as well."""
    at = best_step(best_run)
    config = best_options(llama_dir, records_file, tmp_path / "out")
    batch = steps.data_lib.batch

    def batch_and_signal(data, step, **where):
        if step == at:  # counted from 0: the batch of the next step, made while this one runs
            signal.raise_signal(signal.SIGTERM)
        return batch(data, step, **where)

    with monkeypatch.context() as patch:
        patch.setattr(steps.data_lib, "batch", batch_and_signal)
        with pytest.raises(Stopped, match=f"after step {at} of {STEPS}.*--resume"):
            jlora.finetune(config)
    assert saved_steps(tmp_path / "out")[-1] == at
    assert not (tmp_path / "out" / "adapter").exists()
    resumed = jlora.finetune(dataclasses.replace(config, resume=True))
    assert resumed.eval_loss == best_run.result.eval_loss
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(best_run.output)


# Refusals and resuming


def test_existing_output_is_refused(run):
    before = {p: p.stat().st_mtime_ns for p in run.output.rglob("*")}
    with pytest.raises(FileExistsError, match="another --output.*--resume"):
        jlora.finetune(run.config)
    assert {p: p.stat().st_mtime_ns for p in run.output.rglob("*")} == before


def test_nothing_to_resume(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        jlora.finetune(dataclasses.replace(run.config, output=str(tmp_path / "nothing"), resume=True))
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "changes", [{"rank": 8}, {"steps": 13}, {"learning_rate": 0.5}, {"model": "gpt2"}, {"seed": 1}]
)
def test_resuming_with_another_config_is_refused(run, changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match="must not change") as error:
        jlora.finetune(dataclasses.replace(run.config, resume=True, **changes))
    assert f"{name}: was {getattr(run.config, name)!r}, is {value!r}" in str(error.value)


def test_resuming_with_other_data_or_another_base_is_refused(run):
    resumed = dataclasses.replace(run.config, resume=True)
    adapter, log = adapter_bytes(run.output), (run.output / "metrics.jsonl").read_bytes()
    with changed(Path(run.config.data), tiny.text(seed=1).encode()):
        with pytest.raises(ValueError, match="made from must not change:\n  data: was '.*', is '.*'"):
            jlora.finetune(resumed)
    weights = Path(run.config.model) / "model.safetensors"
    with changed(weights, weights.read_bytes()[:-4] + b"\x00\x00\x00\x01"):
        with pytest.raises(ValueError, match="made from must not change:\n  base: was '.*', is '.*'"):
            jlora.finetune(resumed)
    assert (adapter_bytes(run.output), (run.output / "metrics.jsonl").read_bytes()) == (adapter, log)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(run):
    adapter, log = adapter_bytes(run.output), (run.output / "metrics.jsonl").read_bytes()
    result = jlora.finetune(dataclasses.replace(run.config, resume=True))
    assert (adapter_bytes(run.output), (run.output / "metrics.jsonl").read_bytes()) == (adapter, log)
    assert result == run.result


@pytest.mark.slow
def test_a_moved_run_resumes(run, tmp_path):
    shutil.copytree(run.output, tmp_path / "moved")
    result = jlora.finetune(dataclasses.replace(run.config, output=str(tmp_path / "moved"), resume=True))
    assert result.history == run.result.history
    assert adapter_bytes(tmp_path / "moved") == adapter_bytes(run.output)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "./nowhere"}, FileNotFoundError, "not a directory"),
        ({"data": "nowhere.txt"}, FileNotFoundError, "no such data file"),
        ({"targets": "query"}, ValueError, "query"),
        ({"max_length": 65}, ValueError, "at most the model's 64 positions; got 65"),
    ],
)
def test_a_start_that_fails_leaves_no_run(run, tmp_path, changes, error, says):
    """So that the corrected command is not told that its output exists."""
    output = tmp_path / "out"
    with pytest.raises(error, match=says):
        jlora.finetune(dataclasses.replace(run.config, output=str(output), **changes))
    assert not output.exists()


def test_a_failed_start_in_an_empty_directory_leaves_it_empty(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        jlora.finetune(dataclasses.replace(run.config, output=str(tmp_path), model="./nowhere"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "`steps` must be at least 1; got 0"),
        ({"steps": 1, "epochs": 1.0}, "`steps` and `epochs` exclude each other"),
        ({"max_length": 1}, "`max_length` must be at least 2"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive; got -1.0"),
        ({"warmup_fraction": 1.0}, "`warmup_fraction` must be in"),
        ({"max_grad_norm": math.nan}, "`max_grad_norm` must be 0 or positive; got nan"),
        ({"beta2": 1.0}, "`beta2` must be in"),
        ({"eval_data": "a.txt", "eval_fraction": 0.1}, "`eval_data` and `eval_fraction` exclude each other"),
        ({"save": "best", "eval_fraction": 0.0}, "`save` 'best' needs an evaluation"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_out_of_range(changes, says):
    with pytest.raises(ValueError, match=says):
        jlora.FinetuneConfig(**{"model": "m", "data": "d.txt", "output": "o"} | changes)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match="(?s)`keep` must.*`batch_size`|`batch_size` must.*`keep`"):
        jlora.FinetuneConfig(model="m", data="d.txt", output="o", batch_size=0, keep=0)


# Divergence


def test_divergence_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    make_step, at, output = steps.make_step, 7, tmp_path / "out"

    class Broken:
        """A step, lowered, compiled or to be, whose loss is NaN at one step."""

        def __init__(self, step):
            self.step = step

        def lower(self, *args):
            return Broken(self.step.lower(*args))

        def compile(self):
            return Broken(self.step.compile())

        def memory_analysis(self):
            return self.step.memory_analysis()

        def __call__(self, state, *rest):
            state, metrics = self.step(state, *rest)
            if int(state.step) != at:
                return state, metrics
            return state, metrics | {"loss": np.float32(np.nan), "grad_norms": metrics["grad_norms"].at[1].set(np.inf)}

    def broken(*args, **kwargs):
        return Broken(make_step(*args, **kwargs))

    config = dataclasses.replace(run.config, output=str(output))
    with monkeypatch.context() as patch:
        patch.setattr(steps, "make_step", broken)
        with pytest.raises(
            TrainingDiverged,
            match="Step 7 has loss nan.*that of transformer/.*lora_B, of 2.*step 4 is kept.*lower --learning-rate",
        ) as error:
            jlora.finetune(config)
    assert "it was 0.01" in str(error.value)
    assert saved_steps(output) == [4]
    assert not (output / "adapter").exists()
    assert [entry["step"] for entry in tiny.read_log(output)] == list(range(at))
    jlora.finetune(dataclasses.replace(config, resume=True))
    assert adapter_bytes(output) == adapter_bytes(run.output)


@pytest.mark.slow
def test_a_learning_rate_that_breaks_the_model(run, tmp_path):
    """The loss of step 1 is that of the base; its evaluation shows what the step did, and that state is not kept."""
    config = dataclasses.replace(
        run.config, output=str(tmp_path / "out"), learning_rate=1e30, eval_every=1, checkpoint_every=1
    )
    with pytest.raises(TrainingDiverged, match="Step 1 .*No checkpoint was saved.*lower --learning-rate"):
        jlora.finetune(config)
    assert not saved_steps(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    assert [entry["step"] for entry in tiny.read_log(tmp_path / "out")] == [0]


@pytest.mark.slow
def test_divergence_without_evaluation(run, tmp_path):
    config = dataclasses.replace(run.config, output=str(tmp_path / "out"), learning_rate=1e30, eval_fraction=0.0)
    with pytest.raises(TrainingDiverged, match="Step 2 "):
        jlora.finetune(config)
    assert not (tmp_path / "out" / "adapter").exists()


def test_what_a_run_says(run, capsys):
    jlora.finetune(dataclasses.replace(run.config, resume=True, quiet=False))
    said = " ".join(capsys.readouterr().out.split())
    for part in ("gpt2, 2 layers", "attn.c_attn", "resuming after step 12 of 12", "loads in PEFT", "before,"):
        assert part in said


@pytest.mark.parametrize(
    ("stacked", "stacked_where_widened", "changes"),
    [
        (True, False, {}),
        (True, True, {"remat": "layer"}),
        (False, False, {"targets": ("layers.0.self_attn.q_proj",)}),
        (False, False, {"form": "per-layer"}),
        (True, True, {"form": "stacked"}),
    ],
)
def test_one_layer_is_compiled_where_that_costs_nothing(stacked, stacked_where_widened, changes):
    config = jlora.FinetuneConfig(model="m", data="d", output="o", **changes)
    assert job._form(config, widened=False)[0] == stacked
    assert job._form(config, widened=True)[0] == stacked_where_widened
