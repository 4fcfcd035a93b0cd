"""`jlora finetune` in processes of their own, to be signalled and killed, and what their runs must have become in the end."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import child
import tiny
import yaml

DEADLINE = 600  # seconds until a child that says nothing has failed

# Children are forked from a process that has imported what is slow to import, and started no backend.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["jlora.cli", "orbax.checkpoint", "transformers.models.auto.tokenization_auto"])


class Child:
    """`jlora finetune` in a process, with a config file.

    Args:
        batch_seconds: that the making of a batch takes more, so that there is a middle to be killed in.
        dies: when the process kills itself: arguments of one of the functions `child.die_*`, under its name.
    """

    def __init__(self, config, home, *, resume=False, batch_seconds=0.1, **dies):
        self.output = Path(config.output)
        path, self._stderr = home / f"{self.output.name}.yaml", home / f"{self.output.name}.stderr"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
        flags = ["--config", str(path), *(["--resume"] if resume else [])]
        self.process = FORKS.Process(
            target=child.finetune, args=(flags, str(self._stderr), batch_seconds, dies), daemon=True
        )
        self.process.start()

    def wait_for(self, reached):
        """Until `reached(output)`; the child must be alive then."""
        until = time.monotonic() + DEADLINE
        while not reached(self.output):
            assert self.process.is_alive(), self.end()
            assert time.monotonic() < until, "nothing came of the run"
            time.sleep(0.002)
        return self

    def end(self, number=None):
        """(exit code, stderr), after a signal if it has not ended before."""
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
        self.process.join(DEADLINE)
        return self.process.exitcode, self._stderr.read_text()


def saved(config):
    """The checkpoints of a run: with one it is resumed, without it is started again."""
    return list(Path(config.output).glob("checkpoints/[0-9]*"))


def assert_same(config, expected):
    """Byte for byte what it trained, no step lost or repeated, and nothing left over."""
    output, other = Path(config.output), Path(expected.output)
    assert trained(output) == trained(other)
    assert timeless(output) == timeless(other)
    steps = [entry["step"] for entry in tiny.read_log(output)]
    assert steps == list(range(expected.steps + 1))
    assert [int(row.partition(",")[0]) for row in (output / "metrics.csv").read_text().splitlines()[1:]] == steps
    assert not [path for path in output.rglob(".*")]


def trained(output):
    """Name -> bytes of the files of an adapter, or of a model of which every parameter was trained."""
    files = {path.name: path.read_bytes() for path in (output / "adapter").glob("*")}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files) or not files
    whole = {path.name: path.read_bytes() for path in (output / "model").glob("*")}
    assert bool(files) != ("model.safetensors" in whole)
    return files | whole


def timeless(output):
    """The log, without what a clock says."""
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in tiny.read_log(output)]
