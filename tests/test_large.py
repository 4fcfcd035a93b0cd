"""A model of a billion parameters in 4 bits stays within the memory that is promised for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_llama_1b_loads_and_trains_within_its_memory(tmp_path):
    out = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "large_model.py"
    subprocess.run([sys.executable, script, "--directory", tmp_path, "--output", out], check=True, cwd=ROOT)
    found = json.loads(out.read_text())["results"]
    assert found["load_peak_above_baseline_bytes"] < min(found["load_limit_bytes"], 1.95e9)
    assert found["step_peak_above_baseline_bytes"] < found["predicted_peak_bytes"]
    assert found["compiled_peak_bytes"] < found["predicted_peak_bytes"]
