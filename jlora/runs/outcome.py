"""What a run leaves: its adapter, and what is said of it."""

import dataclasses
import filecmp
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from jlora._typing import JsonObject, Params
from jlora.files import find, save_adapter, save_pretrained
from jlora.lora import combine
from jlora.runs.job import Job
from jlora.storage.whole import full_disk_said, whole_directory
from jlora.train import Checkpoints, TrainState, evaluated, perplexity


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    adapter_dir: Path | None
    """PEFT files and the tokenizer; None after full fine-tuning."""
    eval_loss: float | None
    """Of the saved adapter, nats a supervised token; None without evaluation data."""
    base_eval_loss: float | None
    """Before the first step."""
    history: tuple[JsonObject, ...]
    """The entries of metrics.jsonl."""
    model_dir: Path | None = None
    """After full fine-tuning: a transformers checkpoint with its tokenizer."""


def finish(job: Job, checkpoints: Checkpoints, state: TrainState, history: Sequence[JsonObject]) -> FinetuneResult:
    """Writes the adapter of the last state, or of the best, and says what came of the run."""
    config, run, display = job.config, job.run, job.display
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    chosen = int(state.step)
    if config.save == "best" and checkpoints.best is not None:
        chosen = checkpoints.best
        state = checkpoints.restore(state, chosen)
    params = combine(evaluated(state), job.base)
    losses_said = losses.get(chosen), losses.get(0), tuple(history)
    if job.lora is None:
        _write(run.model, lambda made: _save_model(job, params, made))
        result = FinetuneResult(None, *losses_said, model_dir=run.model)
    else:
        _write(run.adapter, lambda made: _save_adapter(job, params, made))
        result = FinetuneResult(run.adapter, *losses_said)
    if result.eval_loss is not None and result.base_eval_loss is not None:
        before, after = perplexity(result.base_eval_loss), perplexity(result.eval_loss)
        change = f" ({after / before - 1:+.0%})" if math.isfinite(after / before) else ""
        display.say(
            "\nperplexity ", (f"{before:.2f}", "bold"), " before, ", (f"{after:.2f}", "bold"), f" after{change}"
        )
    if job.lora is None:
        display.say(f"model of step {chosen}: ", (str(run.model), "bold"), " (loads in transformers)")
        return result
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    # PEFT has kinds other than LoRA for linear layers alone.
    reader = "PEFT" if job.lora.kind == "lora" or job.model.config.transposed_kernels else "jlora"
    display.say(
        f"adapter of step {chosen}: ", (str(run.adapter), "bold"), f" ({size / 1024:,.0f} KiB, loads in {reader})"
    )
    return result


def _save_adapter(job: Job, params: Params, directory: Path) -> None:
    assert job.lora is not None
    save_adapter(directory, params, config=job.lora, base_model=job.config.model)
    job.tokenizer.save_pretrained(directory)
    job.settings().write(directory)


def _save_model(job: Job, params: Params, directory: Path) -> None:
    """A checkpoint as the base is one, in its dtypes."""
    save_pretrained(directory, job.model, params, tokenizer=job.tokenizer, base=find(job.config.model))
    dataclasses.replace(job.settings(), base=None).write(directory)


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """A directory of `OUTPUT`, whole or not at all. One that is there already, with the same bytes, is left as it is."""
    with full_disk_said(path), TemporaryDirectory(prefix=".partial-", dir=path.parent) as place:
        made = Path(place) / path.name
        save(made)
        if path.is_dir() and all(_same(file, path / file.name) for file in made.iterdir()):
            return
        with whole_directory(path, replace=True) as partial:
            shutil.copytree(made, partial, dirs_exist_ok=True)


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def skipped_said(skipped: int, scale: float) -> str:
    """What float16 left out, in words."""
    steps = "step was" if skipped == 1 else "steps were"
    return f"{skipped} {steps} left out, whose gradients overflowed float16; the loss is scaled by {scale:g} now"
