"""Runs that are killed or stopped, in processes of their own, and resumed: to the byte what they would have become."""

import dataclasses
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from processes import Child, assert_same, saved

import jlora
from jlora.cli import INTERRUPTED

STEPS, EVERY = 30, 5


def options(model, data, output):
    """With everything that could be lost: dropout, accumulation, a schedule, evaluations apart from checkpoints."""
    return jlora.FinetuneConfig(
        model=str(model), data=str(data), output=str(output), steps=STEPS, rank=4, targets=("c_attn",), dropout=0.2, batch_size=2,
        accumulate=2, max_length=16, learning_rate=1e-2, eval_every=4, checkpoint_every=EVERY, save="best", quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(home, text_file):
    # One layer compiles sooner, and every process here compiles.
    model = tiny.write_checkpoint(home / "gpt2", tiny.GPT2 | {"n_layer": 1})
    config = options(model, text_file, home / "uninterrupted")
    code, said = Child(config, home, batch_seconds=0).end()
    assert code == 0, said
    return config


def logged(output):
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.is_file() else -1


def step_logged(step):
    return lambda output: logged(output) >= step


def checkpoint_begun(step):
    """It is written under a hidden name and renamed; either is seen."""
    return lambda output: any(str(step) in p.name.split(".")[:2] for p in output.glob("checkpoints/*"))


@pytest.mark.slow
def test_interrupted_five_times(uninterrupted, home):
    """Killed before anything is saved, while a checkpoint is written and anywhere; stopped by both signals in between."""
    config = dataclasses.replace(uninterrupted, output=str(home / "interrupted"))
    output, draw = Path(config.output), random.Random(0)
    interruptions = [
        (step_logged(draw.randint(1, 2)), signal.SIGKILL),
        (checkpoint_begun(EVERY), signal.SIGKILL),
        (step_logged(draw.randint(EVERY + 1, 2 * EVERY - 1)), signal.SIGTERM),
        (step_logged(draw.randint(3 * EVERY + 1, 4 * EVERY - 1)), signal.SIGKILL),
        (step_logged(draw.randint(4 * EVERY + 1, STEPS - 7)), signal.SIGINT),
    ]
    for number, (moment, name) in enumerate(interruptions):
        code, said = Child(config, home, resume=number > 0).wait_for(moment).end(name)
        assert not (output / "adapter").exists()
        if name == signal.SIGKILL:
            assert code == -signal.SIGKILL, said
            # A killed process leaves whole lines, each being written at once. A machine that dies may not: done by hand.
            with (output / "metrics.jsonl").open("ab") as log:
                log.write(b'{"step": 3, "los')
        else:
            stopped = len(tiny.read_log(output)) - 1
            assert code == INTERRUPTED, said
            assert said == f"Stopped after step {stopped} of {STEPS}; the state is saved. Continue with --resume.\n"
            assert (output / "checkpoints" / str(stopped)).is_dir()
    code, said = Child(config, home, resume=True, batch_seconds=0).end()
    assert code == 0, said
    assert_same(config, uninterrupted)


@pytest.mark.parametrize("dies_at", [5, *(pytest.param(at, marks=pytest.mark.slow) for at in (30, range(1, 400, 13)))])
def test_killed_at_a_write(uninterrupted, home, dies_at):
    """Whatever was to be written, renamed or removed next: what saved nothing starts again, and the rest goes on."""
    for number in [dies_at] if isinstance(dies_at, int) else dies_at:
        config = dataclasses.replace(uninterrupted, output=str(home / f"write-{number}"))
        code, said = Child(config, home, batch_seconds=0, die_at={"number": number}).end()
        if code == 0:
            assert number > 200, "a run has more writes"
            break
        assert code == -signal.SIGKILL, said
        code, said = Child(config, home, resume=bool(saved(config)), batch_seconds=0).end()
        assert code == 0, (number, said)
        assert_same(config, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere(uninterrupted, home, seed):
    config = dataclasses.replace(uninterrupted, output=str(home / f"anywhere-{seed}"))
    draw, code = random.Random(seed), None
    for _ in range(8):
        running = Child(config, home, resume=bool(saved(config)), batch_seconds=0.05)
        time.sleep(draw.uniform(0, 6))
        code, said = running.end(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        assert code in (0, INTERRUPTED, *(-n for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT))), said
        if code == 0:
            break
    if code != 0:
        code, said = Child(config, home, resume=bool(saved(config)), batch_seconds=0).end()
        assert code == 0, said
    assert_same(config, uninterrupted)
