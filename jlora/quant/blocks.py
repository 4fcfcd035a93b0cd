"""Weights as GGUF files store them: rows of ggml's blocks, to and from `QuantizedTensor`."""

import functools

import jax
import jax.numpy as jnp

from jlora._typing import Array, UInt8
from jlora.quant.ggml import GGML
from jlora.quant.tensor import QuantizedTensor


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def from_file(rows: UInt8[Array, "*stack d_out bytes"], spec: GGML, dtype: str) -> QuantizedTensor:
    """A weight [out, in] of a file as the kernel [in, out] that it is, packed.

    Args:
        rows: its blocks, row by row.
        dtype: of `dense()`; products decode to the dtype of the other operand.
    """
    codes, scales = spec.from_file(rows.reshape(*rows.shape[:-1], -1, spec.file_bytes))
    kernel_shape = (rows.shape[-1] // spec.file_bytes * spec.block_size, rows.shape[-2])
    return QuantizedTensor(codes, scales, kernel_shape, spec, jnp.dtype(dtype).name)


@jax.jit
def to_file(q: QuantizedTensor) -> UInt8[Array, "*stack d_out bytes"]:
    """The inverse: the blocks of a tensor that keeps its rows, byte for byte those it was read from."""
    if not isinstance(q.spec, GGML) or not q.has_rows:
        raise ValueError(f"Only rows of whole blocks of a ggml format are blocks of a GGUF file; got {q!r}.")
    return q.spec.to_file(q.codes, q.scales).reshape(*q.codes.shape[:-1], -1)
