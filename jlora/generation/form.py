"""The form of a model in which decoding is fast."""

import os

import jax
import jax.numpy as jnp

from jlora._typing import DTypeLike, Params, PyTree
from jlora.models import Model, replace
from jlora.weight import is_adapted, is_weight, materialize

_SHARE = 0.8
"""Of the memory that is free, which a copy may take."""


def for_decoding(model: Model, params: Params) -> tuple[Model, PyTree]:
    """The model and its parameters in the form in which a few rows are multiplied fastest; what has it already is not copied.

    On CPU: float32, packed kernels decoded once, adapters beside them as they are, if the copy fits the free memory. XLA:CPU
    multiplies one bfloat16 row 20 times as slowly as a float32 row, which runs at the speed of memory, and a packed kernel
    would be unpacked for each token. What is computed is the model's own function of the same weights, with
    activations in float32. On other backends: as they are.
    """
    if jax.default_backend() != "cpu" or _copied_bytes(params) > _SHARE * _free_bytes():
        return model, params
    dense = jax.tree.map(lambda leaf: _dense(leaf, jnp.float32), params, is_leaf=_is_frozen)
    return (model if model.dtype == jnp.float32 else replace(model, dtype=jnp.dtype(jnp.float32))), dense


def _is_frozen(leaf: object) -> bool:
    """Whether a leaf is packed and nothing else: what is adapted is looked into."""
    return is_weight(leaf) and not is_adapted(leaf)


def _is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _dense(leaf, dtype: DTypeLike):
    if is_weight(leaf):
        return materialize(leaf, dtype)
    return leaf if leaf.dtype == dtype or not _is_float(leaf) else leaf.astype(dtype)


def _copied_bytes(params: PyTree) -> int:
    leaves = jax.tree.leaves(params, is_leaf=_is_frozen)
    return sum(4 * leaf.size for leaf in leaves if is_weight(leaf) or (_is_float(leaf) and leaf.dtype != jnp.float32))


def _free_bytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
