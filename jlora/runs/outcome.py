"""What a run leaves: its adapter, and what is said of it."""

import dataclasses
import filecmp
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import optax

from jlora._typing import JsonObject, Params
from jlora.files import save_adapter
from jlora.lora import combine
from jlora.runs.job import Job
from jlora.storage.whole import full_disk_said, whole_directory
from jlora.train import Checkpoints, TrainState, evaluated, perplexity, predict


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    adapter_dir: Path
    """PEFT files and the tokenizer."""
    eval_loss: float | None
    """Of the saved adapter, nats a supervised token; None without evaluation data."""
    base_eval_loss: float | None
    """Before the first step."""
    history: tuple[JsonObject, ...]
    """The entries of metrics.jsonl."""


def finish(job: Job, checkpoints: Checkpoints, state: TrainState, history: Sequence[JsonObject]) -> FinetuneResult:
    """Writes the adapter of the last state, or of the best, and says what came of the run."""
    config, run, display = job.config, job.run, job.display
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    chosen = job.steps
    if config.save == "best" and checkpoints.best is not None:
        chosen = checkpoints.best
        state = checkpoints.restore(state, chosen)
    _write_adapter(job, combine(evaluated(state), job.base))
    result = FinetuneResult(run.adapter, losses.get(chosen), losses.get(0), tuple(history))
    if result.eval_loss is not None and result.base_eval_loss is not None:
        before, after = perplexity(result.base_eval_loss), perplexity(result.eval_loss)
        change = f" ({after / before - 1:+.0%})" if math.isfinite(after / before) else ""
        display.say(
            "\nperplexity ", (f"{before:.2f}", "bold"), " before, ", (f"{after:.2f}", "bold"), f" after{change}"
        )
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    # PEFT has kinds other than LoRA for linear layers alone.
    reader = "PEFT" if job.lora.kind == "lora" or job.model.config.transposed_kernels else "jlora"
    display.say(
        f"adapter of step {chosen}: ", (str(run.adapter), "bold"), f" ({size / 1024:,.0f} KiB, loads in {reader})"
    )
    return result


def _write_adapter(job: Job, params: Params) -> None:
    """`OUTPUT/adapter`, whole or not at all. One that is there already, with the same bytes, is left as it is."""
    path = job.run.adapter
    with full_disk_said(path), TemporaryDirectory(prefix=".partial-", dir=path.parent) as place:
        made = Path(place) / path.name
        save_adapter(made, params, config=job.lora, base_model=job.config.model)
        job.tokenizer.save_pretrained(made)
        job.settings().write(made)
        if path.is_dir() and all(_same(file, path / file.name) for file in made.iterdir()):
            return
        with whole_directory(path, replace=True) as partial:
            shutil.copytree(made, partial, dirs_exist_ok=True)


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def predicted_peak(job: Job, state: TrainState, tx: optax.GradientTransformation) -> int:
    """Of a step of the job, in bytes."""
    accumulate = job.config.accumulate
    rows = {"batch_size": job.layout.rows // accumulate, "length": job.layout.widths[-1], "accumulate": accumulate}
    return predict(job.model, combine(state.adapter, job.base), tx, **rows).peak


def memory_said(predicted: int, compiled: int) -> str:
    """The predicted and the compiled peak of a step, in words; on a GPU the measured one too, of the process up to now."""
    text = f"memory of a step: {predicted / 2**20:,.0f} MiB predicted, {compiled / 2**20:,.0f} MiB in the compiled step"
    measured = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return text + (f", {measured / 2**20:,.0f} MiB measured" if measured else "")
