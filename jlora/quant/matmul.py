"""The product with a quantized kernel: unpack, multiply, and keep nothing but the packed bytes for the backward pass."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jlora._typing import Array, DTypeLike, Float, PyTree


def by_dequantizing(x: Float[Array, "tokens d"], rows: Callable[[], Array], transpose: bool) -> Array:
    """Unpacks the whole kernel, [out, in] in `x.dtype`, for an ordinary matrix product. One dense matrix is alive."""
    return jnp.einsum("to,oi->ti" if transpose else "ti,oi->to", x, rows(), preferred_element_type=jnp.float32)


def by_reducing(x: Float[Array, "tokens d"], rows: Callable[[], Array], transpose: bool) -> Array:
    """Multiplies and sums element by element, so that unpacking fuses into the sum and no dense kernel is written.

    Reads a quarter of the bytes of a bfloat16 kernel, which is what counts for a few rows (decoding).
    """
    w = rows().astype(jnp.float32)
    products = x.astype(jnp.float32)[:, None, :] * (w.T if transpose else w)[None]
    return jnp.sum(products, axis=-1)


IMPLEMENTATIONS: Mapping[str, Callable] = {"dequantize": by_dequantizing, "reduce": by_reducing}

REDUCE_UP_TO = {"gpu": 1}
"""Rows of x up to which "reduce" is chosen, by backend; elsewhere never.

On an H200 one row takes 15 against 44 us (2048 x 8192) and 41 against 119 us (14336 x 4096), four take 48 against 34 and 204
against 119 us (`benchmarks/gpu.py`, section "products").
"""


def implementation(rows: int, backend: str) -> str:
    """Which of `IMPLEMENTATIONS` multiplies `rows` rows on `backend`."""
    return "reduce" if rows <= REDUCE_UP_TO.get(backend, 0) else "dequantize"


def not_before(x: Array, q: PyTree) -> tuple[Array, PyTree]:
    """The same values, arranged so that `q` is not unpacked before `x` is there.

    Otherwise every kernel of a model could be unpacked at once, as nothing else keeps it waiting, and common subexpression
    elimination would hold the forward pass's dense kernel for the backward pass.
    """
    x, q = lax.optimization_barrier((x, q))
    if jax.default_backend() == "cpu" and x.size:
        # XLA:CPU drops barriers before it schedules. This dependence it keeps, and only LLVM sees that nothing exceeds
        # infinity and leaves it out of the loop.
        never = (x.ravel()[0] > jnp.inf).astype(jnp.uint8)
        q = dataclasses.replace(q, codes=q.codes | never)
    return x, q


@functools.partial(jax.checkpoint, static_argnums=1)
def _rows(q: PyTree, dtype: DTypeLike) -> Array:
    """`q.rows(dtype)`, as a whole.

    JAX takes what depends on no operand out of a `scan` that is differentiated: the constants of decoding became arrays,
    some of the kernel's size, which every layer read from memory. What is under `checkpoint` it calculates in its place.
    """
    return q.rows(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def quantized_matmul(name: str, transpose: bool, dtype: DTypeLike, out_dtype: DTypeLike, x: Array, q: PyTree) -> Array:
    """`x @ w`, or `x @ w.T` with `transpose`, for a quantized kernel that stands for w [in, out].

    The kernel is unpacked again in the backward pass; it gets no gradient.

    Args:
        name: one of `IMPLEMENTATIONS`.
        dtype: that of `x` [tokens, in], and of the cotangent in the backward product.
        out_dtype: dtype of the result [tokens, out]; sums are float32.
    """
    x, q = not_before(x, q)
    return IMPLEMENTATIONS[name](x, lambda: _rows(q, dtype), transpose).astype(out_dtype)


def _forward(name, transpose, dtype, out_dtype, x, q):
    return quantized_matmul(name, transpose, dtype, out_dtype, x, q), q


def _backward(name, transpose, dtype, out_dtype, q, dy):
    dy, q = not_before(dy.astype(dtype), q)
    return IMPLEMENTATIONS[name](dy, lambda: _rows(q, dtype), not transpose).astype(dtype), None


quantized_matmul.defvjp(_forward, _backward)
