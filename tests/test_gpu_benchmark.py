"""The benchmark that is kept ready for a GPU runs to its end here, on tiny shapes: nobody wants to mend it on a rented card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


@pytest.mark.slow
def test_every_measurement_of_the_plan_is_made(tmp_path):
    command = [sys.executable, gpu.__file__, "--smoke", "--budget", "3600", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())["sections"]
    planned = {task.section for group in gpu.plan(smoke=True, cache=str(tmp_path)) for task in group}
    assert planned == found.keys() and all(found.values())
