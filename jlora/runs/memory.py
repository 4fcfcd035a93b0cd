"""The memory of a run: what is predicted, planned and measured of it, and what takes less."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import optax

from jlora._typing import JsonObject
from jlora.lora import combine
from jlora.models import replace
from jlora.runs.config import FinetuneConfig
from jlora.runs.endings import what_stays
from jlora.runs.job import Job
from jlora.train import predict
from jlora.train.memory import Memory
from jlora.tree.paths import nbytes

_SHOWN = 160  # characters of the error


def predicted(
    job: Job,
    tx: optax.GradientTransformation,
    *,
    accumulate: int | None = None,
    remat: Literal["layer"] | None = None,
    length: int | None = None,
) -> Memory:
    """Of a step of the job, or of one with other settings."""
    accumulate, rows = accumulate or job.config.accumulate, job.layout.rows
    length = length or job.layout.widths[-1]
    step = predict(
        job.model if remat is None else replace(job.model, remat=remat),
        combine(job.adapter, job.base),
        tx,
        batch_size=max(1, rows // accumulate),
        # Rows that several records share are laid anew, narrower, where there are too few to be cut.
        length=-(-length * min(rows, accumulate) // accumulate),
        accumulate=accumulate,
    )
    return step if job.teacher is None else dataclasses.replace(step, weights=step.weights + nbytes(job.teacher.params))


def measured_peak() -> int | None:
    """Bytes of the device that this process has had in use at most, where the backend counts them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def memory_said(predicted: int, compiled: int) -> str:
    """The predicted and the compiled peak of a step, in words; on a GPU the measured one too, of the process up to now."""
    text = f"memory of a step: {_mib(predicted)} predicted, {_mib(compiled)} in the compiled step"
    measured = measured_peak()
    return text + (f", {_mib(measured)} measured" if measured else "")


def less_memory(
    error: BaseException,
    config: FinetuneConfig,
    saved: int | None,
    command: str,
    prepared: tuple[Job, optax.GradientTransformation] | None,
) -> str:
    """What to do about an error for want of memory: what takes how much less, and how to go on.

    Args:
        saved: the step of the last checkpoint.
        command: that continues the run.
        prepared: None: it did not come so far.
    """
    now = None if prepared is None else predicted(*prepared)
    first = " ".join((str(error) or type(error).__name__).split())
    lines = [f"out of memory ({first if len(first) <= _SHOWN else first[:_SHOWN] + ' …'})."]
    if now is not None:
        listed = ", ".join(f"{field.name} {_mib(getattr(now, field.name))}" for field in dataclasses.fields(now))
        lines.append(f"A step is predicted to take {_mib(now.peak)}: {listed}.")

    def worth(options: Iterator[tuple[str, JsonObject]]) -> list[str]:
        """Those that take less, with how much; all of them where nothing can be said of it."""
        peaks = {
            flags: predicted(*prepared, **instead).peak if prepared is not None and instead else None
            for flags, instead in options
        }
        width = max(map(len, peaks), default=0)
        return [
            f"  {flags:<{width}}  {f'about {_mib(peak)}' if peak else ''}".rstrip()
            for flags, peak in peaks.items()
            if not (peak and now and peak >= now.peak)
        ]

    if same := worth(_same_result(config)):
        lines += ["Less, to the same result up to rounding, and with --resume too:", *same]
    lines += ["Less, as another run:", *worth(_another_run(config, None if prepared is None else prepared[0]))]
    stays = what_stays(saved, config)
    lines.append(f"{stays[0].upper()}{stays[1:]}")
    if saved is not None and same:
        lines.append(f"  {command} {same[0].split('  ')[1]}")
    return "\n".join(lines)


def _same_result(config: FinetuneConfig) -> Iterator[tuple[str, JsonObject]]:
    """(flags, what they are instead of)."""
    rows = config.batch_size * config.accumulate
    halved = next((config.batch_size // n for n in (2, 3, 5) if config.batch_size % n == 0), 1)
    for batch_size in sorted({halved, 1} - {config.batch_size}, reverse=True):
        accumulate = rows // batch_size
        yield f"--batch-size {batch_size} --accumulate {accumulate}", {"accumulate": accumulate}
    if config.remat == "none":
        yield "--remat layer", {"remat": "layer"}


def _another_run(config: FinetuneConfig, job: Job | None) -> Iterator[tuple[str, JsonObject]]:
    if config.quantize is None:
        yield "--quantize nf4 (4.13 bits a parameter of the linear kernels)", {}
    if job is not None and job.max_length > 2:
        half = job.max_length // 2
        yield f"--max-length {half}", {"length": min(half, job.layout.widths[-1])}
    yield f"a smaller --rank (it is {config.rank}) or fewer --targets", {}


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
