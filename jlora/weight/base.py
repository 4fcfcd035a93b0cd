"""`Weight`: what a stored weight can do, and the one product everything is made of.

A dense weight is a plain `jax.Array`. Every other kind (a LoRA-adapted kernel, a quantized one) is a `Weight`: an
immutable pytree node that knows how to multiply, to be looked up, and to become dense.
"""

import abc
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora._typing import AnyArray, Array, DTypeLike


class Weight(abc.ABC):
    """A stored weight that is not a plain array. Stands for a dense array of `shape` and `dtype`.

    Subclasses are frozen dataclasses registered by `register_node`, so a tree that holds them goes
    through `jit`, `grad`, `scan`, `vmap` and checkpoints. Static metadata describes the trailing axes only: a leading
    axis on every child array makes a stack of such weights.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array this value stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of the dense array this value stands for."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @abc.abstractmethod
    def matmul(self, x: AnyArray, *, transpose: bool, out_dtype: DTypeLike) -> Array:
        """`x @ w`, or `x @ w.T` with `transpose`; float32 accumulation, result in `out_dtype`."""

    @abc.abstractmethod
    def take(self, ids: AnyArray) -> Array:
        """Rows `w[ids]` of an embedding [vocab, d_model]."""

    @abc.abstractmethod
    def dense(self, dtype: DTypeLike | None = None) -> Array:
        """The dense array, computed in float32 and cast to `dtype` (default: `self.dtype`)."""

    @abc.abstractmethod
    def cast(self, dtype: DTypeLike) -> "Weight":
        """The same value standing for an array of another float dtype."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of parameters stored, the adapter's own included."""

    def __jax_array__(self, *args, **kwargs):  # NumPy passes `dtype` and `copy` to `__array__`
        raise TypeError(
            f"A `{type(self).__name__}` of shape {self.shape} was used as an array, which would form the dense weight. "
            "Multiply by it with `jlora.linear(x, w)`, look rows up with `jlora.embed(ids, w)`, call a function that was written "
            "for arrays through `jlora.wrap(fn)` with the weight among its arguments, or ask for the dense array with "
            "`jlora.merge(params)`."
        )

    __array__ = __jax_array__


def as_dense(w: Array | Weight, dtype: DTypeLike) -> Array:
    """The dense array that `w`, of any kind, stands for, in `dtype`."""
    return w.dense(dtype) if isinstance(w, Weight) else w.astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def materialize(w: Weight, dtype: DTypeLike | None = None) -> Array:
    """`w.dense(dtype)` in one compiled pass: operation by operation, a quantized kernel takes many times as long."""
    return w.dense(dtype)


EINSUM = "jlora.einsum"
"""The name scope of `einsum`, by which `wrap` knows it in a jaxpr and a profile shows it."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum(spec: str, out_dtype: DTypeLike, a: AnyArray, b: AnyArray) -> Array:
    """Two-operand einsum that accumulates in float32, forward and backward.

    `b` is cast to `a.dtype` first, so float32 masters can meet bfloat16 activations. The cotangent is cast to `a.dtype`
    before it is multiplied: without that rule a float32-accumulating bfloat16 product has a mixed float32 x bfloat16
    backward product, which is slow on every backend. What is not differentiated costs nothing: no residual is kept
    and no product computed for an operand that has no tangent (a frozen kernel).

    Args:
        spec: explicit, such as "ti,io->to"; each letter occurs in at least two of the three terms.
        out_dtype: dtype of the result.
    """
    with jax.named_scope(EINSUM):
        return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32).astype(out_dtype)


def _einsum_fwd(spec, out_dtype, a, b):
    # Each operand's cotangent needs the other operand; a residual nobody needs is not saved.
    keep_a = a.value if b.perturbed else None
    keep_b = b.value if a.perturbed else None
    # Zero-size carriers of the dtypes, which residuals must be arrays to hold.
    like = (jnp.zeros((0,), a.value.dtype), jnp.zeros((0,), b.value.dtype))
    return einsum(spec, out_dtype, a.value, b.value), (keep_a, keep_b, like)


def _einsum_bwd(spec, out_dtype, residuals, dy):
    a, b, (like_a, like_b) = residuals
    if isinstance(dy, SymbolicZero):
        return None, None
    operands, out = spec.split("->")
    sa, sb = operands.split(",")
    dy = dy.astype(like_a.dtype)

    def product(lhs, rhs, to, x, y, dtype):
        return jnp.einsum(f"{lhs},{rhs}->{to}", x, y, preferred_element_type=jnp.float32).astype(dtype)

    da = None if b is None else product(out, sb, sa, dy, b.astype(like_a.dtype), like_a.dtype)
    db = None if a is None else product(sa, out, sb, a, dy, like_b.dtype)
    return da, db


einsum.defvjp(_einsum_fwd, _einsum_bwd, symbolic_zeros=True)


def dense_matmul(x: AnyArray, w: AnyArray, *, transpose: bool, out_dtype: DTypeLike) -> Array:
    """`x [*, in] @ w [in, out]`, or `x [*, out] @ w.T`, of a plain array."""
    flat = x.reshape(-1, x.shape[-1])
    y = einsum("ti,oi->to" if transpose else "ti,io->to", jnp.dtype(out_dtype), flat, w)
    return y.reshape(*x.shape[:-1], y.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]: a partial `custom_vjp` is typed as object
