"""Everything that needs a GPU, in one command of at most eight minutes on an H100 or H200: is it right, and how fast is it?

    python benchmarks/gpu.py                # writes benchmarks/results/gpu_<device>.json, after every row
    python benchmarks/gpu.py --smoke        # the same code on tiny shapes, on the CPU, in about two minutes

What it measures, what it needs and how to read it: docs/gpu.md. Every measurement is a process of its own, so that a
peak of memory is its own and a crash ends nothing else; while one works, the next imports its libraries and waits. Once the
budget is spent nothing new starts, and what was left out is listed.
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = "--worker"  # hidden: be a measured process
SMOKE_ENV = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
GRACE = 25.0
"""Seconds past the budget after which what still runs is killed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One process: a function of gpu_checks.py or gpu_speed.py."""

    section: str
    function: str
    options: dict[str, Any]
    limit: float = 150.0
    """Seconds it may take."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    needs_ceiling: bool = False


def plan(smoke: bool, cache: str) -> list[list[Task]]:
    """Groups of tasks, in their order; the tasks of a group, which time nothing, run together."""
    size = {"smoke": smoke}
    cached = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def train(shape, nf4=False, remat="none", rows=4, section="training", env=None, **options):
        shapes = {"shape": "tiny", "rows": 2, "length": 64} if smoke else {"shape": shape, "rows": rows, "length": 2048}
        options = shapes | {"nf4": nf4, "remat": remat} | options
        return [Task(section, "train", options, env=env or {}, needs_ceiling=True)]

    peft = {"shape": "tiny", "rows": 2, "length": 64} if smoke else {"shape": "1B", "rows": 4, "length": 2048}
    new_tokens = {"shape": "tiny", "new_tokens": 8} if smoke else {"shape": "1B", "new_tokens": 256}
    checks = [Task("numbers", "numbers", size), Task("packing", "packing", size)]
    for deterministic in (True,) if smoke else (True, False):
        checks.append(Task("resuming", "resumed", size | {"deterministic": deterministic}))
    first = [
        [Task("ceilings", "ceilings", size, limit=60)],
        *([[task] for task in checks] if smoke else [checks]),
        train("1B", env=cached),
        train("1B", nf4=True),
        *([] if smoke else [train("1B", segments=4)]),
    ]
    if smoke:
        middle = [train("1B", remat="layer", segments=2), [Task("training", "peft", peft)]]
        last = []
    else:
        middle = [train("8B", nf4=True), [Task("training", "peft", peft)], train("8B")]
        last = [
            train("3B"),
            train("3B", nf4=True),
            train("1B", remat="layer"),
            train("8B", nf4=True, remat="layer"),
            train("8B", remat="layer"),
            [Task("training", "peft", peft | {"compiles": True})],
        ]
    return [
        *first,
        *middle,
        [Task("decoding", "decode", new_tokens, needs_ceiling=True)],
        [Task("products", "products", size, needs_ceiling=True)],
        [Task("loss", "loss", size)],
        train("1B", section="warm compilation cache", env=cached),
        *last,
    ]


# ---- the measured processes -----------------------------------------------------------------------------------------


def work(name: str, options: dict[str, Any]) -> int:
    """Imports, says so, waits for a line with the rest of the options, and prints a line for each row."""

    def say(kind: str, content: dict[str, Any]) -> None:
        print(kind, json.dumps(content), flush=True)

    try:
        start = time.perf_counter()
        if name == "peft":
            import peft  # noqa: F401
            import torch
            import transformers  # noqa: F401

            ready = {"backend": "gpu" if torch.cuda.is_available() else "cpu"}
        else:
            import jax

            import jlora  # noqa: F401

            ready = {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
        import gpu_checks
        import gpu_speed

        say("READY", ready | {"import_s": round(time.perf_counter() - start, 2)})
        options |= json.loads(sys.stdin.readline())
        {**gpu_checks.SECTIONS, **gpu_speed.SECTIONS}[name](
            lambda case, **values: say("ROW", {"case": case} | values), **options
        )
    except BaseException:
        say("ROW", {"case": f"{name} {options}", "error": traceback.format_exc()[-6000:]})
        return 1
    return 0


# ---- the parent -----------------------------------------------------------------------------------------------------


class Worker:
    """A task's process, from its start to its last row."""

    def __init__(self, task: Task, report: "Report", smoke: bool):
        self.task, self.report = task, report
        self.ready: dict[str, Any] | None = None
        self.ready_event = threading.Event()
        self.rows = 0
        self.failed = False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        env |= SMOKE_ENV if smoke else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, WORKER, task.function, json.dumps(task.options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        # A session of its own, so that its children are killed with it.
        self.process = subprocess.Popen(
            command, env=os.environ | env | task.env, text=True, start_new_session=True, **pipes
        )
        atexit.register(self.kill)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            kind, _, content = line.partition(" ")
            if kind == "READY":
                self.ready = json.loads(content)
                self.ready_event.set()
            elif kind == "ROW":
                row = json.loads(content)
                self.rows += 1
                self.failed |= "error" in row
                self.report.add(self.task.section, row)
        self.ready_event.set()

    def go(self, options: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(options) + "\n")
            self.process.stdin.flush()

    def finish(self, seconds: float) -> None:
        try:
            code = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.kill()
            code = f"killed after {seconds:.0f} s"
        self.reader.join(10)
        if code and not self.failed:
            self.errors.seek(0)
            tail = self.errors.read()[-3000:]
            self.report.add(self.task.section, {"case": self._name(), "error": f"ended with {code}\n{tail}"})

    def _name(self) -> str:
        return f"{self.task.function} {self.task.options}"

    def kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Report:
    """What was found, printed and written at once."""

    def __init__(self, output: Path, head: dict[str, Any]):
        self.output, self.head = output, head
        self.started = time.perf_counter()
        self.sections: dict[str, list[dict[str, Any]]] = {}
        self.left_out: list[str] = []
        self.lock = threading.Lock()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def path(self) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "_", str(self.head.get("device") or "unknown").lower()).strip("_")
        return self.output / f"gpu_{slug}.json"

    def add(self, section: str, row: dict[str, Any]) -> None:
        with self.lock:
            self.sections.setdefault(section, []).append(row | {"at_s": round(self.elapsed, 1)})
            shown = [f"{name} {in_words(name, value)}" for name, value in row.items() if name not in ("case", "error")]
            print(f"[{self.elapsed:5.0f} s] {section} | {row['case']} | {'; '.join(shown)}", flush=True)
            if row.get("error"):
                print("    FAILED " + "\n    ".join(row["error"].strip().splitlines()[-12:]), flush=True)
            self._write()

    def leave_out(self, tasks: list[Task]) -> None:
        with self.lock:
            self.left_out += [f"{task.section}: {task.function} {task.options}" for task in tasks]
            self._write()

    def _write(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        content = self.head | {"wall_s": self.elapsed, "sections": self.sections, "left_out": self.left_out}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(finite(content), indent=1) + "\n")
        partial.replace(self.path)

    def ceiling(self) -> dict[str, float]:
        found = {"bytes_per_s": math.nan, "flop_per_s": math.nan}
        for row in self.sections.get("ceilings", []):
            found |= {name: row[name] for name in found if name in row}
        return found


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_words(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(in_words("", x) for x in value) + "]"
    if value is None or isinstance(value, bool | str):
        return str(value)
    if name.endswith("bytes"):
        return f"{value / 1e9:.3f} GB" if value >= 1e6 else f"{value} B"
    if name.endswith(("bytes_per_s", "flop_per_s")):
        return f"{value / 1e9:,.1f} G"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def driver() -> str | None:
    """Name, driver and memory of the GPU, as nvidia-smi says them."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory of the JSON file; default: benchmarks/results")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds after which nothing new starts")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU; writes to a temporary directory")
    parser.add_argument("--only", nargs="*", default=[], metavar="SECTION", help="these sections, after the ceilings")
    parser.add_argument("--commit", help="what to note as the commit, where the checkout is a copy")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from bench import machine

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    default = Path(tempfile.gettempdir()) / "jlora-gpu-smoke" if args.smoke else ROOT / "benchmarks" / "results"
    about = machine(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    about["commit"] = args.commit or about["commit"]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = Report(
        args.output or default,
        {"device": None, "gpu": driver(), "date": date, "smoke": args.smoke, "budget_s": args.budget, "machine": about},
    )
    with tempfile.TemporaryDirectory() as cache:
        groups = plan(args.smoke, cache)
        sections = {task.section for group in groups for task in group}
        if unknown := set(args.only) - sections:
            parser.error(f"There is no section {sorted(unknown)[0]!r}; there are {', '.join(sorted(sections))}.")
        if args.only:
            wanted = {*args.only, "ceilings"}
            groups = [kept for group in groups if (kept := [t for t in group if t.section in wanted])]
        run(groups, report, args)
    failed = sum("error" in row for rows in report.sections.values() for row in rows)
    for text in report.left_out:
        print(f"Left out, the budget is spent: {text}")
    print(f"{report.elapsed:.0f} s, {failed} failed, {len(report.left_out)} left out: {report.path}")
    return 1 if failed else 0


def run(groups: list[list[Task]], report: Report, args: argparse.Namespace) -> None:
    def begin(group: list[Task]) -> list[Worker]:
        return [Worker(task, report, args.smoke) for task in group]

    coming = begin(groups[0])
    for place in range(len(groups)):
        workers, coming = coming, []
        if report.elapsed >= args.budget:
            for worker in workers:
                worker.kill()
            report.leave_out([task for rest in groups[place:] for task in rest])
            return
        for worker in workers:
            worker.ready_event.wait(args.budget + GRACE - report.elapsed)
            if place == 0 and worker.ready is not None:
                report.head["device"] = worker.ready.get("device")
                if worker.ready["backend"] == "cpu" and not args.smoke:
                    worker.kill()
                    raise SystemExit("JAX finds no GPU here. `--smoke` runs the same code on the CPU.")
        for worker in workers:
            worker.go({"ceiling": report.ceiling()} if worker.task.needs_ceiling else {})
        began = report.elapsed
        if place + 1 < len(groups):
            coming = begin(groups[place + 1])
        for worker in workers:
            limit = math.inf if args.smoke else worker.task.limit
            worker.finish(min(began + limit, args.budget + GRACE) - report.elapsed)


if __name__ == "__main__":
    sys.exit(work(sys.argv[2], json.loads(sys.argv[3])) if sys.argv[1:2] == [WORKER] else main())
