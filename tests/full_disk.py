"""Runs in a name space of mounts that is this process's own: a job on file systems of one size after another, each too small."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from command import run

from jlora.train import Checkpoints

BLOCK = 4096


def mount(place, size, *more):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "none", str(place)], check=True)


def used(place):
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextlib.contextmanager
def heard():
    """What libraries write to the file of standard error past Python's."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        noise = []
        try:
            yield noise
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            noise.append(file.read().decode(errors="replace"))


def finetune(config, *flags):
    """(exit code, standard error)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run("finetune", "--config", config, *flags)
    return code, said.getvalue()


def full_disk(config, output, place):
    with heard() as noise:
        code, said = finetune(config)
    steps = Checkpoints(output / "checkpoints", keep=1).steps() if output.exists() else []
    for step in steps:
        Checkpoints(output / "checkpoints", keep=1).verify(step)
    report = {
        "code": code, "said": said, "noise": noise[0], "saved": max(steps, default=0), "adapter": (output / "adapter").exists(),
        "hidden": [str(path) for path in output.rglob(".*")],
    }  # fmt: skip
    mount(place, "100m", "remount")
    resumed, why = finetune(config, *(["--resume"] if steps else []))
    return report | {"resumed": resumed or 0, "why": why}


def main(request):
    place, kept = Path(request["place"]), Path(request["kept"])
    place.mkdir()
    kept.mkdir()
    output, config = place / "out", place.parent / "full_disk.yaml"
    fields = request["config"] | {"output": str(output), "experiments_log": "none"}
    config.write_text(yaml.safe_dump(fields))
    mount(place, "100m")
    assert finetune(config)[0] == 0
    enough = used(place)
    subprocess.run(["umount", str(place)], check=True)
    reports = []
    for number in range(request["sizes"]):
        blocks = 1 + (enough // BLOCK - 1) * number // request["sizes"]
        mount(place, blocks * BLOCK)
        reports.append({"blocks": blocks} | full_disk(config, output, place))
        shutil.copytree(output, kept / str(number))
        subprocess.run(["umount", str(place)], check=True)
    Path(request["reports"]).write_text(json.dumps(reports))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
