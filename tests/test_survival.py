"""Runs that meet the worst, over and over: 200 kills at any moment and 40 within the save of a checkpoint, 20 full disks, damage to
each file. None needs a repair by hand: the same command, with --resume where a state was saved, ends at the same bytes."""

import collections
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from signal import SIGKILL

import pytest
import tiny
from processes import Child, assert_same, saved, trained

import jlora

STEPS, EVERY, LAST_SAVE = 24, 3, 8
KILLS = 10  # of a test
HERE = Path(__file__).parent


def chats(count=16):
    rows = tiny.records(count)
    asked = [{"role": "user", "content": row["instruction"]} for row in rows]
    answers = [{"role": "assistant", "content": row["output"]} for row in rows]
    return [
        {"messages": [asked[i], answers[i], *([asked[i - 1], answers[i - 1]] if i % 3 else [])]} for i in range(count)
    ]


def config(home, name, output, **changes):
    """One of the jobs, of which each has other things to lose: states of optimizers, keys of noise, places in streams."""
    base = {
        "steps": STEPS, "batch_size": 2, "accumulate": 2, "max_length": 16, "learning_rate": 1e-2,
        "eval_every": 4, "checkpoint_every": EVERY, "save": "best", "quiet": True, "log_to": ("csv",), "seed": 5,
    }  # fmt: skip
    gpt2, llama, text, records, more, conversations, teacher = (
        str(home / n)
        for n in ("gpt2", "llama", "text.txt", "records.jsonl", "more.jsonl", "conversations.jsonl", "teacher")
    )
    low_rank = {"rank": 4, "dropout": 0.2}
    of_job = {
        "text": low_rank | {"model": gpt2, "data": text, "targets": ("c_attn",)},
        "packed chats, NF4": low_rank | {
            "model": llama, "data": conversations, "template": "auto", "pack": True, "max_length": 128, "quantize": "nf4",
            "optimizer": "adamw8bit", "neftune_alpha": 5.0, "supervise": "last", "schedule": "wsd", "weight_decay": 0.1,
        },
        "a stream of two sources": low_rank | {
            "model": gpt2, "data": (records, more), "data_weights": (1.0, 2.0), "streaming": True, "max_length": 64,
            "label_smoothing": 0.1, "lora_plus_ratio": 8.0, "optimizer": "muon", "template": "plain", "batch_size": 1,
        },
        "every parameter": {
            "model": gpt2, "data": text, "full": True, "optimizer": "schedule_free_adamw", "remat": "layer",
        },
        "float16, with a teacher": low_rank | {
            "model": gpt2, "data": text, "dtype": "float16", "teacher": teacher, "use_dora": True, "optimizer": "adamw",
            "schedule": "inverse_sqrt",
        },
    }[name]  # fmt: skip
    return jlora.FinetuneConfig(output=str(output), **base | of_job | changes)


JOBS = ("text", "packed chats, NF4", "a stream of two sources", "every parameter", "float16, with a teacher")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("survival")
    tiny.write_checkpoint(home / "gpt2", tiny.GPT2 | {"n_layer": 1})
    tiny.write_checkpoint(
        home / "llama", tiny.LLAMA | {"num_hidden_layers": 1, "max_position_embeddings": 128}, chat=tiny.CHATML
    )
    tiny.write_checkpoint(home / "teacher", tiny.GPT2 | {"n_layer": 1, "n_embd": 48}, seed=1)
    (home / "text.txt").write_text(tiny.text())
    tiny.write_records(home / "records.jsonl", tiny.records(20))
    tiny.write_records(home / "more.jsonl", tiny.records(12, seed=1))
    tiny.write_records(home / "conversations.jsonl", chats())
    return home


@pytest.fixture(scope="module")
def references(home):
    """Job -> (config of its run without interruption, the seconds that it took)."""
    made = {}

    def reference(name):
        if name not in made:
            options = config(home, name, home / f"whole-{JOBS.index(name)}")
            started = time.monotonic()
            code, said = Child(options, home).end()
            assert code == 0, said
            made[name] = options, time.monotonic() - started
        return made[name]

    return reference


def found(output):
    """Where a kill has met a run, by what it left."""
    if not (output / "config.yaml").exists():
        return "before the first file"
    if list(output.glob("checkpoints/.*")):
        return "within the save of a checkpoint"
    if not (output / "metrics.jsonl").exists():
        return "before the first step"
    if (output / "adapter").exists() or (output / "model").exists():
        return "behind the adapter"
    return "between steps" if saved_steps(output) < STEPS else "behind the last checkpoint"


def saved_steps(output):
    return max((int(path.name) for path in output.glob("checkpoints/[0-9]*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("job", JOBS)
def test_killed_at_random_moments(references, home, job, seed, record_property):
    """200 in all. A process is killed at a moment drawn from the time that a whole run takes; a run that ends before is the
    same as the one that was never killed, and another begins."""
    whole, seconds = references(job)
    draw, kills, runs, where = random.Random(f"{job} {seed}"), 0, 0, collections.Counter()
    while kills < KILLS:
        options = dataclasses.replace(whole, output=str(home / f"{JOBS.index(job)}-{seed}-{runs}"))
        runs += 1
        code = None
        while code != 0:
            running = Child(options, home, resume=bool(saved(options)))
            if kills == KILLS:
                code, said = running.end()
                assert code == 0, said
                break
            before, started = saved_steps(Path(options.output)), time.monotonic()
            running.process.join(draw.uniform(0, seconds))
            code, said = running.end(SIGKILL)
            assert code in (0, -SIGKILL), said
            if code == 0:  # it compiles no more, as the first did
                seconds = min(seconds, time.monotonic() - started)
            if code == -SIGKILL:
                kills += 1
                where[found(Path(options.output))] += 1
                assert saved_steps(Path(options.output)) >= before, "a saved step is never lost"
        assert_same(options, whole)
        shutil.rmtree(options.output)
    record_property("kills", dict(where))


IN_SAVE = [
    *({"save": 1 + n % LAST_SAVE, "write": 1 + n} for n in range(20)),
    *({"save": 2 + n % (LAST_SAVE - 1), "share": round(n / 20, 2)} for n in range(20)),
]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_within_the_save_of_a_checkpoint(references, home, job, record_property):
    """40 in all: before one write after another of a save, and between them, where threads of Orbax and tensorstore write."""
    whole, _ = references(job)
    where = collections.Counter()
    for number, moment in enumerate(IN_SAVE[JOBS.index(job) :: len(JOBS)]):
        options = dataclasses.replace(whole, output=str(home / f"save-{JOBS.index(job)}-{number}"))
        code, said = Child(options, home, batch_seconds=0, die_in_save=moment).end()
        assert code == -SIGKILL, (moment, said)
        where[found(Path(options.output))] += 1
        code, said = Child(options, home, batch_seconds=0, resume=bool(saved(options))).end()
        assert code == 0, (moment, said)
        assert_same(options, whole)
        shutil.rmtree(options.output)
    record_property("kills", dict(where))


# Full disks

SIZES = 20


@pytest.mark.slow
def test_full_disks(home, references, record_property):
    """File systems of as many sizes, from one block to nearly enough: each run ends with one line that names the disk and what is
    saved, and goes on when there is room."""
    whole, _ = references("text")
    options = config(home, "text", home / "unused", keep=12)  # all of them: more to write
    request = {
        "config": json.loads(json.dumps(dataclasses.asdict(options))),
        "sizes": SIZES,
        "place": str(home / "disk"),
        "reports": str(home / "reports.json"),
        "kept": str(home / "kept"),
    }
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, str(HERE / "full_disk.py"), json.dumps(request)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"no file system of a given size could be mounted, or:\n{done.stderr}"
    reports = json.loads((home / "reports.json").read_text())
    assert len(reports) == SIZES
    ends = collections.Counter()
    for number, report in enumerate(reports):
        code, said, step = report["code"], report["said"], report["saved"]
        assert code == 1 and said.count("\n") == 1 and said.startswith("error: no space left on "), report
        assert str(home / "disk") in said and "Traceback" not in report["noise"], report
        if step:
            assert said.endswith(f"the state of step {step} is saved. Continue with --resume.\n"), report
        else:
            assert said.endswith((" Start it again.\n", " Run the same command after making room.\n")), report
        assert not report["adapter"] and not report["hidden"], report
        assert report["resumed"] == 0, report
        assert_same(dataclasses.replace(options, output=str(home / "kept" / str(number))), whole)
        ends[f"step {step}"] += 1
    record_property("saved", dict(ends))
    assert len(ends) > 3, "in the middle of a run too"


# Damage

FILES = (
    "config.yaml", "run.json", "metrics.jsonl", "metrics.csv", "data/meta.json", "data/*.npy", "checkpoints/{}/checkpoint.json",
    "checkpoints/{}/state/_METADATA", "checkpoints/{}/state/manifest.ocdbt", "checkpoints/{}/state/ocdbt.process_0/d/*",
    "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json",
)  # fmt: skip
DAMAGE = {
    "a bit": lambda content: bytes([*content[:-9], content[-9] ^ 4, *content[-8:]]),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "nulls": lambda content: bytes(len(content)),
    "gone": None,
}


@pytest.fixture(scope="module")
def finished(home):
    options = config(home, "text", home / "to damage")
    jlora.finetune(options)
    return options


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file(finished, tmp_path, pattern, how, capsys):
    """65 in all: it is named and nothing is changed, and with the file put back the run goes on; or what it held is known
    otherwise, and the run goes on to the same bytes."""
    options = dataclasses.replace(finished, output=str(tmp_path / "out"), resume=True)
    output = Path(shutil.copytree(finished.output, options.output))
    file = sorted(output.glob(pattern.format(STEPS)))[0]
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[how](content))
    if not pattern.startswith("adapter"):
        shutil.rmtree(output / "adapter")
    before = tree(output)
    try:
        with warnings.catch_warnings(record=True, action="always") as warned:
            jlora.finetune(options)
    except (ValueError, FileNotFoundError) as error:
        assert pattern in ("config.yaml", "run.json") and (file.name in str(error) or how == "gone"), error
        assert tree(output) == before
        file.write_bytes(content)
        jlora.finetune(options)
    else:
        said = capsys.readouterr().err + "".join(str(warning.message) for warning in warned)
        if pattern.startswith("checkpoints"):
            assert f"checkpoint {STEPS} is damaged" in said and file.name in said
        if pattern.startswith("data") and (pattern, how) != ("data/meta.json", "gone"):
            assert f"{file.name} is not what was written; the text is tokenized again" in said
        if pattern == "metrics.jsonl" and how != "a bit":  # a digit that is another is a number like any
            assert "metrics.jsonl: " in said
    assert trained(output) == trained(Path(finished.output))
    if pattern != "metrics.jsonl":  # whose lines nothing else has
        assert_same(options, finished)


def tree(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
