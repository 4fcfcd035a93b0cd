"""The sections of `gpu.py` that compare: numbers against the CPU's, a resumed run against a whole one, packed rows against single.

Each function is the work of one process: it gets `emit`, which takes a row of results as soon as it is known, and its case.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "examples" / "assets"
PRECISIONS = {
    "float32": ("float32", "highest"),
    "float32 default": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}
"""Dtype and precision of products; by default a GPU multiplies float32 as TF32."""


# ---- numbers --------------------------------------------------------------------------------------------------------


def _cases(smoke: bool) -> list[tuple[str, str, bool, bool]]:
    """(family, precision, stacked, nf4)"""
    if smoke:
        return [("tiny-llama", "float32", True, True), ("tiny-llama", "bfloat16", True, False)]
    families, both = ("tiny-gpt2", "tiny-llama"), (False, True)
    cases = list(itertools.product(families, ("float32", "bfloat16"), both, both))
    return cases + list(itertools.product(families, ("float32 default",), (True,), both))


def _compute(smoke: bool) -> dict[str, np.ndarray]:
    """Logits and the adapter's gradients of every case, packed bytes, and unpacked values of NF4 and of the formats of GGUF
    files, by name, of this backend."""
    import jax
    import jax.numpy as jnp
    from gpu_models import in_threads, random_blocks

    import jlora
    from jlora.quant.ggml import GGML_TYPES
    from jlora.quant.scales import NestedAbsmax
    from jlora.train import causal_lm_loss

    found: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for dtype, double in itertools.product(("float32", "bfloat16"), (True, False)):
        # Two scales, and a number of blocks that leaves the last nested block short.
        shape = (256, 72) if smoke else (1024, 776)
        w = (rng.standard_normal(shape) * rng.choice([0.02, 1.0], (shape[0], 1))).astype(np.float32)
        q = jlora.quantize(jnp.asarray(w, dtype), jlora.NF4(double_quant=double))
        name = f"NF4{' double' if double else ''} of {dtype}"
        for path, stored in jax.tree_util.tree_leaves_with_path(q):
            found[f"{name}: {jax.tree_util.keystr(path, simple=True, separator=' ')}"] = np.asarray(stored)
        if double:  # of the same bytes on both sides; quantizing may round a sum otherwise
            q = dataclasses.replace(
                q,
                codes=jnp.asarray(rng.integers(0, 256, q.codes.shape, np.uint8)),
                scales=NestedAbsmax(
                    blocks=jnp.asarray(rng.integers(0, 256, q.scales.blocks.shape, np.uint8)),
                    nested=jnp.asarray(rng.uniform(0.1, 4.0, q.scales.nested.shape).astype(np.float32)),
                    offset=jnp.asarray(np.float32(0.7)),
                ),
            )
        for out in ("float32", "bfloat16"):
            found[f"{name}: values in {out}"] = np.asarray(jlora.dequantize(q, jnp.dtype(out)), np.float32)
    for name, make in GGML_TYPES.items():
        q = random_blocks(make(), 256, 512)
        for out in ("float32", "bfloat16"):
            found[f"{name} kept: values in {out}"] = np.asarray(jlora.dequantize(q, jnp.dtype(out)), np.float32)

    def prepare(case):
        family, precision, stacked, nf4 = case
        dtype = jnp.dtype(PRECISIONS[precision][0])
        model, params = jlora.load(ASSETS / family, dtype=dtype, stack=False)
        if nf4:
            params = jlora.quantize_params(params, jlora.NF4())
        config = jlora.LoraConfig(rank=4, alpha=8, targets="all-linear")
        params = jlora.add_lora(params, config, key=jax.random.key(0))
        adapter, base = jlora.split(params)
        # Drawn by NumPy: the device's own normal numbers may differ in the last bit.
        draw = np.random.default_rng(1)
        adapter = jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape) * 0.02, x.dtype), adapter)
        params = jlora.combine(adapter, base)
        adapter, base = jlora.split(jlora.stack_layers(params) if stacked else params)
        ids = jnp.asarray(np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 64), np.int32))

        def run(adapter, base, ids):
            batch = {"input_ids": ids, "labels": ids}
            total = lambda a: causal_lm_loss(model)(jlora.combine(a, base), batch, None)[0]  # noqa: E731
            logits = model.apply({"params": jlora.combine(adapter, base)}, ids)
            return logits, jax.grad(total)(adapter)

        return run, (adapter, base, ids), PRECISIONS[precision][1]

    def compiled(prepared):
        run, arguments, precision = prepared
        with jax.default_matmul_precision(precision):
            return jax.jit(run).lower(*arguments).compile()

    cases = _cases(smoke)
    prepared = [prepare(case) for case in cases]
    for case, (_, arguments, _), program in zip(cases, prepared, in_threads(compiled, prepared), strict=True):
        family, precision, stacked, nf4 = case
        logits, grads = program(*arguments)
        name = f"{family} {precision} {'stacked' if stacked else 'per-layer'} {'NF4' if nf4 else 'dense'}"
        if stacked:
            grads = jlora.unstack_layers(grads)
        found[f"{name}: logits"] = np.asarray(logits, np.float32)
        leaves = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(grads)]
        found[f"{name}: gradients"] = np.concatenate(leaves)
    return found


def reference(emit, *, smoke: bool, output: str) -> None:
    """The CPU's numbers, to a file."""
    np.savez(output, **_compute(smoke))


def numbers(emit, *, smoke: bool) -> None:
    """Logits, gradients, packed bytes and unpacked values of this device against those of a process on the CPU.

    A process of its own, because jlora chooses its kernels by the default backend: in one process the CPU would be given
    the GPU's.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/reference.npz"
        theirs = _start("reference", {"smoke": smoke, "output": path}, {"JAX_PLATFORMS": "cpu"})
        found = _compute(smoke)
        _finish(theirs)
        with np.load(path) as archive:
            expected = dict(archive)
    if found.keys() != expected.keys():
        raise ValueError(f"The processes computed different things: {sorted(found.keys() ^ expected.keys())}")
    for name, mine in found.items():
        other = expected[name]
        if not name.endswith((": logits", ": gradients")):  # bytes, and values of the same bytes
            values = {"different": int(np.sum(mine != other)), "of": int(mine.size)}
            if mine.dtype == np.float32:
                values["largest"] = float(np.max(np.abs(mine - other)))
            emit(name, equal=bool(np.array_equal(mine, other)), **values)
            continue
        # Each against the float32 numbers of the CPU, so that rounding to bfloat16 counts once and not as a difference.
        exact = expected.get(name.replace("bfloat16", "float32").replace("float32 default", "float32"), other)
        scale = float(np.max(np.abs(exact)))
        emit(
            name,
            largest_of_scale=float(np.max(np.abs(mine - other))) / scale,
            relative_error=float(np.linalg.norm(mine - exact) / np.linalg.norm(exact)),
            relative_error_of_cpu=float(np.linalg.norm(other - exact) / np.linalg.norm(exact)),
            scale=scale,
        )


# ---- resuming -------------------------------------------------------------------------------------------------------


def finetune(emit, *, output: str, stop_at: int, resume: bool) -> None:
    """A short run, or the rest of it; `stop_at`: it gets the signal that Ctrl-C sends, in that step."""
    import jlora
    from jlora.runs.log import Log
    from jlora.runs.loop import Stopped

    append = Log.append

    def appended(self, entry):
        if entry["step"] == stop_at and not resume:
            os.kill(os.getpid(), signal.SIGINT)
        return append(self, entry)

    Log.append = appended
    config = jlora.FinetuneConfig(
        model=str(ASSETS / "tiny-llama"), data=str(ASSETS / "style.txt"), output=output, steps=6, batch_size=4,
        max_length=64, eval_fraction=0.0, checkpoint_every=2, learning_rate=1e-3, dropout=0.1, quiet=True, resume=resume,
        targets="all-linear", form="stacked", dtype="bfloat16",
    )  # fmt: skip
    try:
        jlora.finetune(config)
    except Stopped:
        if stop_at == 0:
            raise
    else:
        if stop_at and not resume:
            raise RuntimeError(f"The run was to stop after step {stop_at}, and did not.")


def resumed(emit, *, deterministic: bool, smoke: bool) -> None:
    """A run against the same run stopped and resumed, in three processes, and (not in a smoke run) against itself again."""
    flags = os.environ.get("XLA_FLAGS", "")
    env = {"XLA_FLAGS": f"{flags} --xla_gpu_deterministic_ops=true".strip()} if deterministic else {}
    with tempfile.TemporaryDirectory() as directory:

        def chain(name, *parts):
            for part in parts:
                _finish(_start("finetune", {"output": f"{directory}/{name}"} | part, env))
            adapter = Path(directory, name, "adapter", "adapter_model.safetensors").read_bytes()
            log = Path(directory, name, "metrics.jsonl").read_text().splitlines()
            return hashlib.sha256(adapter).hexdigest(), adapter, [json.loads(line)["loss"] for line in log]

        whole = {"stop_at": 0, "resume": False}
        chains = {"whole": [whole], "resumed": [{"stop_at": 3, "resume": False}, {"stop_at": 0, "resume": True}]}
        if not smoke:
            chains["again"] = [whole]
        with ThreadPoolExecutor() as pool:
            runs = {name: pool.submit(chain, name, *parts) for name, parts in chains.items()}
            runs = {name: run.result() for name, run in runs.items()}
    digest, adapter, losses = runs["whole"]
    for name in runs:
        if name == "whole":
            continue
        emit(
            f"{name}, {'with' if deterministic else 'without'} xla_gpu_deterministic_ops",
            bytes_equal=runs[name][0] == digest,
            bytes_different=int(np.sum(np.frombuffer(adapter, np.uint8) != np.frombuffer(runs[name][1], np.uint8))),
            of=len(adapter),
            largest_loss_difference=float(np.max(np.abs(np.subtract(losses, runs[name][2])))),
            steps=len(losses),
        )


# ---- packing --------------------------------------------------------------------------------------------------------


def packing(emit, *, smoke: bool) -> None:
    """Three records in one row: the loss of one must not move with another's tokens, and all must sum to the unpacked ones."""
    import jax
    import jax.numpy as jnp
    from gpu_models import LORA, SHAPES, attention_of

    import jlora
    from jlora.models import model_from_config
    from jlora.train import causal_lm_loss

    fields = SHAPES["tiny"] | {"num_attention_heads": 4, "num_key_value_heads": 2}
    lengths = np.array([64, 96, 32])
    width = int(lengths.max())
    edges = np.concatenate([[0], np.cumsum(lengths)])
    rng = np.random.default_rng(0)
    records = [rng.integers(0, fields["vocab_size"], n).astype(np.int32) for n in lengths]

    def packed(records, supervised):
        labels = [r if i in supervised else np.full_like(r, -100) for i, r in enumerate(records)]
        segments = np.repeat(np.arange(1, len(records) + 1, dtype=np.int32), lengths)
        batch = {"input_ids": np.concatenate(records), "labels": np.concatenate(labels), "segment_ids": segments}
        return {name: jnp.asarray(x)[None] for name, x in batch.items()}

    def single(records):
        pad = lambda r, value: np.pad(r, (0, width - len(r)), constant_values=value)  # noqa: E731
        batch = {"input_ids": [pad(r, 0) for r in records], "labels": [pad(r, -100) for r in records]}
        return {name: jnp.asarray(np.stack(x)) for name, x in batch.items()}

    for dtype in ("bfloat16", "float32"):
        model = model_from_config(fields, dtype=jnp.dtype(dtype))
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        params = jlora.add_lora(jlora.cast(params, dtype), LORA, key=jax.random.key(1))
        adapter, base = jlora.split(jlora.stack_layers(params))
        draw = np.random.default_rng(1)
        adapter = jax.tree.map(lambda x, draw=draw: jnp.asarray(draw.standard_normal(x.shape) * 0.05, x.dtype), adapter)

        def step(adapter, base, batch, model=model):
            return jax.value_and_grad(lambda a: causal_lm_loss(model)(jlora.combine(a, base), batch, None)[0])(adapter)

        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            whole = packed(records, {0, 1, 2})
            one = jax.jit(step).lower(adapter, base, whole).compile()
            apart = jax.jit(step).lower(adapter, base, single(records)).compile()
        moved = 0.0
        for changed, kept in itertools.permutations(range(3), 2):
            others = list(records)
            others[changed] = (records[changed] + 1 + rng.integers(0, 100, lengths[changed])) % fields["vocab_size"]
            before, after = (one(adapter, base, packed(rows, {kept})) for rows in (records, others))
            flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves((v, g))]) for v, g in (before, after)]
            moved = max(moved, float(np.max(np.abs(flat[0] - flat[1]))))
        (loss, grads), (losses, sums) = one(adapter, base, whole), apart(adapter, base, single(records))
        flat, sums = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (grads, sums))
        emit(
            f"{dtype}, {len(lengths)} records in {edges[-1]} tokens",
            leak=moved,
            packed_loss=float(loss),
            sum_of_unpacked=float(losses),
            loss_difference=abs(float(loss) / float(losses) - 1),
            gradient_difference=float(np.linalg.norm(flat - sums) / np.linalg.norm(sums)),
            attention_packed=attention_of(one),
            attention_unpacked=attention_of(apart),
        )


# ---- processes ------------------------------------------------------------------------------------------------------


def _start(
    name: str, options: dict[str, Any], env: dict[str, str]
) -> tuple[subprocess.Popen, threading.Thread, list[str]]:
    """One of these functions in another process."""
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--worker", name, json.dumps(options)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=os.environ | env, text=True, **pipes)
    said: list[str] = []
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("{}\n")
    process.stdin.flush()
    # Read while it runs: a full pipe would stop it.
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
    reader.start()
    return process, reader, said


def _finish(started: tuple[subprocess.Popen, threading.Thread, list[str]]) -> None:
    process, reader, said = started
    code = process.wait()
    reader.join()
    if code:
        raise RuntimeError(f"{process.args[3]} ended with {code}:\n{''.join(said)[-3000:]}")


SECTIONS: dict[str, Any] = {f.__name__: f for f in (numbers, reference, resumed, finetune, packing)}
