"""A random Llama-3.2-1B-shaped model, quantized as it loads, takes a QLoRA step: memory, sampled and predicted.

    python benchmarks/large_model.py --output benchmarks/results/large_model_cpu.json

Writes a bfloat16 checkpoint of the real shape (2.5 GB, removed afterwards), loads it in a process of its own with
`quantize=NF4()` while a thread samples that process's anonymous resident memory, and takes two training steps. File pages
are not counted: the kernel takes them back when it needs them.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import tyro
from bench import machine, write
from rich import print_json

FIELDS = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
WORKER = "--worker"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Memory of loading and training a 1B model in 4 bits."""

    layers: int = 16
    """Of Llama-3.2-1B; fewer make a quick check."""
    length: int = 256
    rank: int = 16
    directory: str | None = None
    """Where to put the checkpoint; default: a temporary directory."""
    output: Path | None = None
    """JSON file for everything measured."""


def write_checkpoint(directory: Path, layers: int) -> None:
    """Random weights, a shard for each layer, so that no more than one is in memory."""
    import jax.numpy as jnp
    import numpy as np

    from jlora.files.names import hf_name
    from jlora.models import abstract_params, model_from_config
    from jlora.storage.safetensors import INDEX, save_tensors
    from jlora.tree.paths import flatten

    fields = {**FIELDS, "num_hidden_layers": layers}
    model = model_from_config(fields, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in flatten(abstract_params(model)).items():
        name = hf_name(path)
        shard = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = (
            leaf.shape[::-1] if path.endswith("/kernel") else leaf.shape
        )
    for file, shapes in shards.items():
        draw = lambda shape: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)  # noqa: E731
        tensors = {
            n: (draw(s) if len(s) > 1 else np.ones(s, np.float32)).astype(jnp.bfloat16) for n, s in shapes.items()
        }
        save_tensors(directory / file, tensors)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(fields))


def anonymous_bytes() -> int:
    """This process's anonymous resident memory, from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this kernel does not report RssAnon")


class Sampler:
    """The largest `anonymous_bytes` seen since it was entered, sampled every 5 ms."""

    def __enter__(self):
        self.start = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def work(directory: str, length: int, rank: int) -> dict[str, Any]:
    """What the measured process prints."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jlora
    from jlora.train.memory import planned, predict

    jax.block_until_ready(jlora.quantize(jnp.ones((256, 256)), jlora.NF4()))  # the baseline has JAX up and running
    with Sampler() as loading:
        started = time.perf_counter()
        model, params = jlora.load(directory, dtype=jnp.bfloat16, quantize=jlora.NF4())
        jax.block_until_ready(params)
        load_seconds = time.perf_counter() - started
    packed = jlora.nbytes(params)
    largest = model.config.vocab_size * model.config.hidden_size * 2
    params = jlora.add_lora(params, jlora.LoraConfig(rank=rank, alpha=2.0 * rank), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    tx = jlora.train.adamw(1e-3, weight_decay=0.0, max_grad_norm=1.0, b1=0.9, b2=0.999)
    predicted = predict(model, params, tx, batch_size=1, length=length)
    state = jlora.train.init_state(adapter, tx)
    del params, adapter
    ids = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length), np.int32))
    batch = {"input_ids": ids, "labels": ids}
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    compiled = step.lower(state, base, batch, jax.random.key(0)).compile()
    with Sampler() as training:
        losses, seconds = [], []
        for _ in range(3):
            started = time.perf_counter()
            state, metrics = compiled(state, base, batch, jax.random.key(0))
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - started)
    assert losses[-1] < losses[0] and float(metrics["grad_norm"]) > 0, losses
    return {
        "parameters": jlora.count(base),
        "packed_bytes": packed,
        "largest_tensor_bytes": largest,
        "load_seconds": load_seconds,
        "load_peak_above_baseline_bytes": loading.peak - loading.start,
        "load_limit_bytes": int(1.25 * (packed + largest)),
        "predicted": dataclasses.asdict(predicted),
        "predicted_peak_bytes": predicted.peak,
        "compiled_peak_bytes": planned(compiled),
        "step_peak_anonymous_bytes": training.peak,
        "step_peak_above_baseline_bytes": training.peak - loading.start,
        "process_peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "step_seconds": seconds,
        "losses": losses,
    }


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        write_checkpoint(Path(directory), args.layers)
        command = [sys.executable, __file__, WORKER, directory, str(args.length), str(args.rank)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The measured process failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print_json(data=result)
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k in ("layers", "length", "rank")}
    write(args.output, {"machine": machine(0), "settings": settings, "results": result})


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        print(json.dumps(work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(tyro.cli(Args, description=__doc__))
