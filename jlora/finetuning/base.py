"""What a run asks of its base checkpoint before the first step."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora._tree import path_string
from jlora.data.tokens import largest_id

_SAMPLE_BYTES = 1 << 20  # hashing all of a large model would take longer than loading it
_LISTED = 4


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raises a ValueError when the tokenizer has ids that the model's embedding has no rows for."""
    rows, largest = model.config.vocab_size, largest_id(tokenizer)
    if largest >= rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and ids up to {largest}, the model's embedding {rows} rows (ids up to "
            f"{rows - 1}): they are not of the same checkpoint. Use the tokenizer files that came with the model."
        )


def check_finite(params: Any) -> None:
    """Raises a ValueError that names the tensors with values that are not finite."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    floating = [(path_string(path), x) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jax.device_get([_finite(x) for _, x in floating])  # one wait for all of them
    if wrong := [path for (path, _), good in zip(floating, finite, strict=True) if not good]:
        listed = ", ".join(wrong[:_LISTED]) + (f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else "")
        raise ValueError(
            f"The base model's weights must be finite; NaN or infinity is in {listed}. Download the checkpoint again, or take "
            "another."
        )


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def fingerprint(directory: Path) -> str:
    """Of the base checkpoint: its config, and of each file of weights the name, the size, the start and the end."""
    sha = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            sha.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            sha.update(file.read())
    return sha.hexdigest()
