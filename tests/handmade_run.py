"""The directory of a run of a few steps, written by hand: what `jlora report` reads, without training anything."""

import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

LOG = [
    {"step": 0, "eval_loss": 4.0, "perplexity": 54.598},
    {"step": 1, "loss": 4.25, "learning_rate": 1e-4, "grad_norm": 2.5, "tokens_per_second": 100.0},
    {"step": 2, "loss": 3.5, "learning_rate": 2e-4, "grad_norm": 1.5, "tokens_per_second": 300.0,
     "eval_loss": 3.0, "perplexity": 20.0855},
    {"step": 3, "loss": 3.125, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 250.0},
    {"step": 4, "loss": 2.75, "learning_rate": 0.0, "grad_norm": 0.5, "tokens_per_second": 200.0,
     "eval_loss": 2.5, "perplexity": 12.1825},
]  # fmt: skip
CONFIG = {
    "model": "some/model", "data": "letters.jsonl", "output": "runs/letters", "kind": "lora", "rank": 2, "alpha": 4.0,
    "dropout": 0.0, "targets": ["q_proj", "up_proj"], "learning_rate": 2e-4, "batch_size": 4,
    "quantize": "nf4", "seed": 7, "save": "last",
}  # fmt: skip
ORIGIN = {
    "origin": {"steps": 4, "data": "d1", "evaluation": "e1", "base": "b1"},
    "versions": {"jax": "0.10.2"},
    "id": "c0ffee00",
    "figures": {
        "model": {
            "type": "llama", "layers": 2, "parameters": 20_000, "trained": 500, "bytes": 3 << 20,
            "stored": "nf4 (4.13 bits a parameter) and bfloat16",
        },
        "data": {
            "records": 40, "tokens": 1234, "supervised_tokens": 567, "truncated": 3, "dropped": 1, "evaluation_tokens": 89,
            "template": "chat", "max_length": 96, "efficiency": 0.875,
        },
        "device": "a device",
    },
    "memory": {"predicted": 7 << 20, "compiled": 6 << 20},
    "seconds": 200.4,
    "measured_memory": 13 << 19,
}  # fmt: skip
SAMPLES = [
    {"step": step, "prompt": "Say it.", "text": text} for step, text in ((0, "What?"), (2, "It, it."), (4, "It."))
]
SHAPES = {"self_attn.q_proj": (6, 4), "mlp.up_proj": (6, 8)}
"""Module -> (in, out)."""


def factors(layer: int, module: str, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A [in, rank] and B [rank, out]; those of later layers are larger."""
    rng = np.random.default_rng(layer * 10 + len(module))
    d_in, d_out = SHAPES[module]
    a, b = rng.normal(size=(d_in, rank)), (1 + layer) * rng.normal(size=(rank, d_out))
    return a.astype(np.float32), b.astype(np.float32)


def write_adapter(directory: Path) -> None:
    directory.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "some/model"}))
    tensors = {}
    for layer in range(2):
        for module in SHAPES:
            name = f"base_model.model.model.layers.{layer}.{module}"
            a, b = factors(layer, module)
            tensors |= {f"{name}.lora_A.weight": a.T.copy(), f"{name}.lora_B.weight": b.T.copy()}
    save_file(tensors, directory / "adapter_model.safetensors")


def write_run(directory: Path, *, config=None, log=LOG, origin=None, samples=SAMPLES, adapter: bool = True) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {}), sort_keys=False))
    (directory / "run.json").write_text(json.dumps(ORIGIN | (origin or {})))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (directory / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if adapter:
        write_adapter(directory / "adapter")
    return directory
