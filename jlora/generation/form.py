"""The form of a model in which decoding is fast."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora._processor import multiplies_bfloat16
from jlora._typing import Array, DTypeLike, Params, PyTree
from jlora.lora import is_stacked
from jlora.lora.stack import layers_of
from jlora.models import Model, replace
from jlora.quant.matmul import implementation
from jlora.tree.paths import flatten, layer_path, nbytes, nest
from jlora.weight import Weight, dense_matmul, is_adapted, is_weight, materialize, register_node

_SHARE = 0.8
"""Of the memory that is free, which a copy may take."""


def for_decoding(model: Model, params: Params, *, batch: int = 1) -> tuple[Model, PyTree]:
    """The model and its parameters in the form in which `batch` rows are multiplied fastest; what has it already is not copied.

    Stacked layers are taken apart where the copy fits the free memory: a stack would be cut, which copies, for each token.
    Adapters stay beside their kernels. Packed kernels are decoded once, as they would be for each token otherwise,

    - on GPU unless there are so few rows that a product reads packed bytes faster than dense ones (`quant.matmul`);
    - on CPU always, and kernels lie as [out, in] (`Turned`). A bfloat16 model of several rows stays one where the CPU
      multiplies bfloat16; else it is a float32 model of the same weights.

    On other backends all is as it was.

    On two AVX-512 cores with AMX, 60 kernels of 576 x 1536: one row float32 12 ms as [in, out], 9 as [out, in], bfloat16 13;
    eight rows float32 35 and 21, bfloat16 13.
    """
    if jax.default_backend() == "cpu":
        return _on_cpu(model, params, batch)
    return model, _on_gpu(params, model.dtype, batch) if jax.default_backend() == "gpu" else params


def _on_cpu(model: Model, params: Params, batch: int) -> tuple[Model, PyTree]:
    dtype = jnp.dtype(
        jnp.bfloat16 if model.dtype == jnp.bfloat16 and batch > 1 and multiplies_bfloat16() else jnp.float32
    )
    copied = sum(_bytes(leaf, dtype) for leaf in jax.tree.leaves(params, is_leaf=_is_frozen))
    if copied > (room := _SHARE * _free_bytes()):
        warnings.warn(
            f"Decoding without a copy of the kernels in {dtype.name}, which takes {copied / 1e9:.1f} GB where {room / 1e9:.1f} GB "
            "are to spare: packed kernels are decoded anew for each token. Free memory, or generate many rows at once.",
            stacklevel=5,  # the caller of `generate`
        )
        return model, params
    made = _each(functools.partial(_formed, dtype), params)
    return (model if model.dtype == dtype else replace(model, dtype=dtype)), made


def _on_gpu(params: Params, dtype: DTypeLike, batch: int) -> PyTree:
    room = _SHARE * _free_device_bytes()
    if implementation(batch, "gpu") == "dequantize" and _copied(params, dtype) <= room:
        return _each(lambda _, leaf: materialize(leaf, dtype) if _is_frozen(leaf) else leaf, params)
    return _each(lambda _, leaf: leaf, params) if _copied(params, None) <= room else params


def _copied(params: Params, unpacked: DTypeLike | None) -> int:
    """Bytes of the stacked leaves, and of the packed ones in the dtype to which they are unpacked, if they are."""
    size = 0
    for path, value in flatten(params).items():
        for leaf in jax.tree.leaves(value, is_leaf=_is_frozen):
            if unpacked is not None and _is_frozen(leaf):
                size += leaf.size * jnp.dtype(unpacked).itemsize
            elif layer_path(path, 0) is not None:
                size += nbytes(leaf)
    return size


def _each(form: Callable[[tuple[Any, ...], Any], Any], params: PyTree) -> PyTree:
    """`form` of each leaf and its place in the tree, packed ones whole, after the layers were taken apart."""
    made = functools.partial(jax.tree_util.tree_map_with_path, form, is_leaf=_is_frozen)
    if not is_stacked(params):
        return made(params)
    flat = {}
    for path, leaf in flatten(params).items():  # one after the other, so that no more than one is there in three forms
        flat |= flatten(made(nest(layers_of(path, leaf))))
    return nest(flat)


@functools.partial(register_node, data_fields=("rows",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Turned(Weight):
    """Stands for a dense kernel [in, out] that lies in memory as [out, in]."""

    rows: Array

    @property
    def shape(self):
        return self.rows.shape[::-1]

    @property
    def dtype(self):
        return self.rows.dtype

    @property
    def size(self):
        return self.rows.size

    def matmul(self, x, *, transpose, out_dtype):
        if transpose or self.rows.dtype != jnp.bfloat16:
            return dense_matmul(x, self.rows, transpose=not transpose, out_dtype=out_dtype)
        # The kernel goes first: the other way round XLA:CPU turns all kernels back, ahead of the loop over the tokens, and a token
        # of eight rows takes a fifth longer (SmolLM2).
        y = jnp.einsum("oi,ti->ot", self.rows, x.reshape(-1, x.shape[-1]), preferred_element_type=jnp.float32)
        return y.T.astype(out_dtype).reshape(*x.shape[:-1], -1)

    def take(self, ids):
        return jnp.take(self.rows, ids, axis=1, mode="clip").swapaxes(0, -1)

    def dense(self, dtype=None):
        return self.rows.swapaxes(-1, -2).astype(dtype or self.dtype)

    def cast(self, dtype):
        return Turned(self.rows.astype(dtype))


@functools.partial(register_node, data_fields=("table", "bits"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Table(Weight):
    """Stands for a bfloat16 embedding that is kept twice, once as integers, to look rows up in: XLA:CPU makes float32 of all of
    a bfloat16 table for that."""

    table: Array
    bits: Array
    """uint16."""

    @classmethod
    def of(cls, table: Array) -> "Table":
        return cls(table, jax.lax.bitcast_convert_type(table, jnp.uint16))

    @property
    def shape(self):
        return self.table.shape

    @property
    def dtype(self):
        return self.table.dtype

    @property
    def size(self):
        return self.table.size

    def matmul(self, x, *, transpose, out_dtype):
        return dense_matmul(x, self.table, transpose=transpose, out_dtype=out_dtype)

    def take(self, ids):
        return jax.lax.bitcast_convert_type(jnp.take(self.bits, ids, axis=0, mode="clip"), self.dtype)

    def dense(self, dtype=None):
        return self.table.astype(dtype or self.dtype)

    def cast(self, dtype):
        return Table.of(self.table.astype(dtype))


def _formed(dtype: jnp.dtype, path: tuple[Any, ...], leaf: Any) -> Any:
    """A leaf, at its place in the tree, in the form for products in `dtype`."""
    if isinstance(leaf, Turned | Table) or not _is_float(leaf):
        return leaf if leaf.dtype in (dtype, jnp.float32) or not _is_float(leaf) else _formed(dtype, path, leaf.dense())
    of = _place(path)
    if of == "kernel" and leaf.ndim > 1:
        return Turned(_rows(leaf, dtype))
    if is_weight(leaf):
        leaf = materialize(leaf, dtype)
    if of == "embedding" and dtype == jnp.bfloat16:
        return Table.of(leaf.astype(dtype))
    # What is trained, and what norms hold, is float32 in a bfloat16 model too.
    return leaf if leaf.dtype in (dtype, jnp.float32) else leaf.astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _rows(kernel: Array | Weight, dtype: DTypeLike) -> Array:
    dense = kernel.dense(dtype) if isinstance(kernel, Weight) else kernel.astype(dtype)
    return dense.swapaxes(-1, -2)


def _place(path: tuple[Any, ...]) -> str | None:
    """The name under which a frozen weight lies, perhaps below adapters; None: it is a part of an adapter."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    while names and names[-1] == "base":
        names.pop()
    return names[-1] if names and isinstance(names[-1], str) else None


def _is_frozen(leaf: object) -> bool:
    """Whether a leaf is packed and nothing else: what is adapted is looked into."""
    return is_weight(leaf) and not is_adapted(leaf)


def _is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _bytes(leaf: Any, dtype: jnp.dtype) -> int:
    """Of a copy of a leaf, where there may be one."""
    return 0 if isinstance(leaf, Turned | Table) or not _is_float(leaf) else leaf.size * dtype.itemsize


def _free_device_bytes() -> float:
    """Of the default device; 0 where it is not known."""
    stats = jax.devices()[0].memory_stats() or {}
    return max(0, stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))


def _free_bytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
