"""What the GPU's sections share: model shapes, random weights made on the device, and what a compiled program really runs."""

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.models import Model, model_from_config
from jlora.quant.blocks import from_file
from jlora.train import adamw, causal_lm_loss, init_state, make_step
from jlora.train.memory import abstract_tree
from jlora.tree.paths import flatten, nest

_LLAMA_3 = {
    "model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1B": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "3B": _LLAMA_3
    | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "tie_word_embeddings": True,
        "num_attention_heads": 24, "head_dim": 128,
    },
    "8B": _LLAMA_3
    | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False,
        "head_dim": 128,
    },
    "tiny": _LLAMA_3
    | {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": True,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
    },
}  # fmt: skip
"""Fields of Llama-3.2-1B and -3B and Llama-3.1-8B, and of a model for `--smoke`."""

LORA = jlora.LoraConfig(rank=16, alpha=32, targets="all-linear")
LEARNING_RATE = 1e-3


def model_of(shape: str, *, dtype: Any = jnp.bfloat16, remat: str = "none") -> Model:
    return model_from_config(SHAPES[shape], dtype=dtype, remat=remat)


def random_params(model: Model, *, dtype: Any = jnp.bfloat16, nf4: bool = False) -> dict[str, Any]:
    """Stacked random weights, N(0, 0.02), made on the device one layer at a time: packing never sees more than one
    dense layer of a kernel."""
    dense = flatten(abstract_tree(model, None, dtype=dtype, quantize=None, stack=True))
    packed = flatten(abstract_tree(model, None, dtype=dtype, quantize=jlora.NF4() if nf4 else None, stack=True))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(dense))
    stacks = "/layers/"
    draw = jax.jit(_draw, static_argnames=("shape", "dtype", "spec", "layers"))
    flat = {}
    for (path, leaf), key in zip(dense.items(), keys, strict=True):
        if path.endswith("scale"):
            flat[path] = jnp.ones(leaf.shape, leaf.dtype)
            continue
        layers = leaf.shape[0] if stacks in path else None
        shape = leaf.shape if layers is None else leaf.shape[1:]
        spec = jlora.NF4() if isinstance(packed[path], jlora.QuantizedTensor) else None
        flat[path] = draw(key, shape=shape, dtype=leaf.dtype, spec=spec, layers=layers)
    return nest(flat)


def _draw(key, *, shape, dtype, spec, layers):
    def one(key):
        w = jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
        return w if spec is None else jlora.quantize(w, spec)

    return one(key) if layers is None else jax.lax.map(one, jax.random.split(key, layers))


def random_blocks(spec: Any, rows: int, columns: int) -> jlora.QuantizedTensor:
    """A kernel [columns, rows] of random blocks of a ggml format, as `quantize="keep"` leaves those of a file."""
    draw = np.random.default_rng(0)
    blocks = []
    for _, kind, count in spec.fields:
        shape = (rows, columns // spec.block_size, count)
        if kind == np.float16:  # random bits may be no numbers
            blocks.append(draw.uniform(1e-4, 1e-3, shape).astype(np.float16).view(np.uint8))
        else:
            blocks.append(draw.integers(0, 256, shape, np.uint8))
    return from_file(np.concatenate(blocks, axis=-1).reshape(rows, -1), spec, "bfloat16")


def random_batch(model: Model, rows: int, length: int, *, segments: int = 0) -> dict[str, jax.Array]:
    """Random tokens, which are also the labels; `segments`: that many records of equal length in every row."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length), np.int32)
    batch = {"input_ids": ids, "labels": ids}
    if segments:
        batch["segment_ids"] = np.broadcast_to(1 + np.arange(length, dtype=np.int32) * segments // length, ids.shape)
    return {name: jnp.asarray(x) for name, x in batch.items()}


def optimizer():
    return adamw(LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0, b1=0.9, b2=0.999)


def training(model: Model, params: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(step, its state, the frozen base) for `params` without an adapter."""
    adapter, base = jlora.split(jlora.add_lora(params, LORA, key=jax.random.key(1)))
    tx = optimizer()
    return make_step(causal_lm_loss(model), tx), init_state(adapter, tx), base


def flops_per_token(model: Model, length: int) -> float:
    """Of a LoRA step, recomputation left out: 4 operations a frozen weight that multiplies, 6 a trained one, and 3.5
    times the forward pass of causal attention."""
    config = model.config
    tree = flatten(abstract_tree(model, LORA, dtype=jnp.bfloat16, quantize=None, stack=True))
    adapted = {path: w for path, w in tree.items() if isinstance(w, jlora.LoraWeight)}
    frozen = sum(int(np.prod(w.shape)) for w in adapted.values())
    trained = sum(w.size for w in adapted.values()) - frozen
    head = config.vocab_size * config.hidden_size
    attention = 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 4 * (frozen + head) + 6 * trained + 3.5 * attention


def attention_of(compiled: Any) -> str:
    """Which attention is in a compiled program: cuDNN's fused one by its custom calls, or plain XLA."""
    found = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', compiled.as_text())
    if not found:
        return "plain XLA"
    return "cudnn fMHA: " + ", ".join(f"{found.count(name)} {name}" for name in sorted(set(found)))


def queued(calls: Iterable[Callable[[], Any]], *, seconds: float = 0.2, turns: int = 5) -> float:
    """Seconds of a call: each turn starts many, in rotation, and waits for the last, so that starting them is hidden behind
    the device's work; the median over the turns. The calls are made once before."""
    calls = list(calls)
    jax.block_until_ready([call() for call in calls])
    start = time.perf_counter()
    jax.block_until_ready([call() for call in calls])
    rounds = max(1, int(seconds / turns / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(rounds):
            out = [call() for call in calls]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / (rounds * len(calls)))
    return float(np.median(times))


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 8) -> list[Any]:
    """`function` of each item, at the same time: most of compiling does not hold Python's lock."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
