"""What the writers and readers of GGUF share: the package gguf, its names of tensors, and the order of rows.

llama.cpp rotates neighbouring pairs in some architectures, such as "llama", where Hugging Face's checkpoints rotate halves, so
the rows of their query and key projections are permuted. Which do is in the families' rows: `jlora.models.families`.
"""

import functools
from typing import Any

import numpy as np

from jlora.models import Model, family_of


def import_gguf() -> Any:
    """The package gguf.

    Raises:
        ImportError: without it.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ImportError("GGUF files are read and written with the package gguf: pip install 'jlora[gguf]'") from error
    return gguf


def tensor_name(module: str, model: Model) -> str:
    """The GGUF name of a module, without ".weight" or ".bias": "blk.3.attn_q" of "model.layers.3.self_attn.q_proj".

    Raises:
        ValueError: when the package gguf has none.
    """
    name = _names(family_of(model.config).gguf.architecture, model.config.depth).get_name(module)
    if name is None:
        raise ValueError(
            f"GGUF has no name for {module!r} in the architecture {family_of(model.config).gguf.architecture!r}. Export with "
            "`save_pretrained`."
        )
    return name


@functools.cache
def _names(architecture: str, depth: int) -> Any:
    """The package's table of tensor names."""
    gguf = import_gguf()
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(
            f"The installed package gguf does not know the architecture {architecture!r}: pip install --upgrade gguf"
        )
    return gguf.get_tensor_name_map(known[architecture], depth)


def permuted(model: Model, module: str, rows: np.ndarray) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: (half, pair) of each head becomes (pair, half)."""
    if not is_permuted(model, module):
        return rows
    heads = len(rows) // model.config.kv_shape[1]
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermuted(model: Model, module: str, rows: np.ndarray) -> np.ndarray:
    """The inverse of `permuted`."""
    return unpermuted_rows(rows, model.config.kv_shape[1]) if is_permuted(model, module) else rows


def unpermuted_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """(pair, half) of each head becomes (half, pair)."""
    return rows.reshape(len(rows) // head_dim, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def is_permuted(model: Model, module: str) -> bool:
    """Whether llama.cpp has the rows of a module in another order than the checkpoint."""
    return family_of(model.config).gguf.rotates_pairs and module.endswith((".q_proj", ".k_proj"))
