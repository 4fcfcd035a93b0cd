"""`experiments_log.csv`: a row for each run that has ended, over all runs of a directory."""

import csv
import datetime
import io
from collections.abc import Mapping
from pathlib import Path

from jlora._typing import Json, JsonObject
from jlora.data import InstructDataset
from jlora.runs.flags.watching import NONE
from jlora.runs.job import Job
from jlora.runs.memory import measured_peak
from jlora.runs.outcome import FinetuneResult
from jlora.storage.history import EXPERIMENTS
from jlora.storage.lock import alone
from jlora.storage.whole import whole_file
from jlora.tree.paths import nbytes

_GIB = 2**30


def note_experiment(job: Job, result: FinetuneResult, *, seconds: float, planned: int) -> None:
    """Puts the row of a run into the table, in place of one that it has there already.

    A table that cannot be written is said, and ends no run that has trained.
    """
    path = experiments_log(job)
    if path is None:
        return
    try:
        put_row(path, _row(job, result, seconds, planned))
    except (OSError, ValueError) as error:
        job.display.warn(f"this run is not in {str(path)!r}: {error}")


def experiments_log(job: Job) -> Path | None:
    """The table's path."""
    given = job.config.experiments_log
    if given == NONE:
        return None
    return job.run.directory.absolute().parent / EXPERIMENTS if given is None else Path(given)


def _row(job: Job, result: FinetuneResult, seconds: float, planned: int) -> JsonObject:
    config, last = job.config, next((e for e in reversed(result.history) if "loss" in e), {})
    peak = measured_peak() or planned
    return {
        "name": config.run_name or job.run.directory.absolute().name,
        "id": job.run.id,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": config.model,
        "quantize": config.quantize,
        "data": config.data,
        "samples": len(job.train) if isinstance(job.train, InstructDataset) else None,
        "kind": "full" if job.lora is None else job.lora.kind,
        "rank": job.lora and job.lora.rank,
        "alpha": job.lora and job.lora.alpha,
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "max_length": job.max_length,
        "seed": config.seed,
        "steps": last.get("step"),
        "final_loss": last.get("loss"),
        "eval_loss": result.eval_loss,
        "base_eval_loss": result.base_eval_loss,
        "runtime_seconds": round(seconds, 1),
        "peak_memory_gib": round(peak / _GIB, 4),
        # As the notes count it: what training takes beside the weights of the base.
        "adapter_memory_gib": round(max(0, peak - nbytes(job.base)) / _GIB, 4),
        "result": str(result.adapter_dir or result.model_dir),
    }


def put_row(path: Path, row: Mapping[str, Json]) -> None:
    """The table with the row at its end, and no other of its `id`; whole or not at all, one process at a time.

    Columns that the table has besides stay, empty in this row.

    Raises:
        ValueError: when there is a file that is no such table; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path):
        columns, rows = _read(path)
        columns += [name for name in row if name not in columns]
        rows = [other for other in rows if other.get("id") != row["id"]]
        text = io.StringIO()
        table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows([*rows, {name: "" if value is None else value for name, value in row.items()}])
        with whole_file(path) as partial:
            partial.write_text(text.getvalue(), encoding="utf-8")


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows)."""
    if not path.exists() or not path.stat().st_size:
        return [], []
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        columns, rows = list(table.fieldnames or ()), list(table)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"it is no CSV table ({error}). Move it away, or name another with --experiments-log."
        ) from error
    if "id" not in columns or any(None in row for row in rows):
        raise ValueError("it is no table of runs. Move it away, or name another with --experiments-log.")
    return columns, rows
