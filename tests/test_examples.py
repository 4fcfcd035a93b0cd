"""The examples, as their first lines say to run them without a network, for a few steps each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITES = {
    "gpt2_style.py --tiny --steps 3": ["curve.png", "metrics.jsonl", "adapter/adapter_model.safetensors"],
    "gpt2_alpaca.py --tiny --epochs 0.1 --preset large": ["evaluation.json", "compare.md", "compare.json"],
    "qwen_qlora.py --tiny --epochs 0.1": ["adapter.zip", "adapter/tokenizer.json"],
    "llama_finetome.py --smol --mode try": ["T1/compare.md", "T1/merged/model.safetensors", "T1/model-q8_0.gguf"],
}


def run(command: str, *more: str) -> subprocess.CompletedProcess:
    name, *flags = command.split()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name, *flags, *more],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITES)
def test_an_example_runs_to_its_end_and_writes_what_it_says(command, tmp_path):
    done = run(command, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for name in WRITES[command]:
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    (log,) = (tmp_path / "run").rglob("metrics.jsonl")
    losses = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("eval_loss" in entry for entry in losses)


@pytest.mark.slow
def test_models_that_know_nothing_of_lora_learn_through_wrap():
    done = run("lora_any_model.py")
    assert done.returncode == 0, done.stdout + done.stderr
