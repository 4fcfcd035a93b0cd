"""`Weight`: what a stored weight can do, and the one product everything is made of.

A dense weight is a plain `jax.Array`. Every other kind (a LoRA-adapted kernel, a quantized one) is a `Weight`: an
immutable pytree node that knows how to multiply, to be looked up, and to become dense, and that answers whatever else is
asked of a weight: nobody outside looks at its type.
"""

import abc
import functools
import math
import string
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora._processor import computed_once, multiplies_bfloat16
from jlora._typing import AnyArray, Array, DTypeLike, Float, Key
from jlora.weight.roles import LINEAR


class Inseparable(TypeError):
    """A weight is not known to be a frozen weight and low-rank updates of it; the message names its kind and says why."""

    def __init__(self, weight: "Weight", reason: str):
        super().__init__(f"a {type(weight).__name__}, which {reason},")
        self.kind, self.reason = type(weight).__name__, reason


class Update(NamedTuple):
    """A low-rank update, `scaling * A @ B`; with a key, of what dropout leaves of the input."""

    A: Float[Array, "..."]
    """[*stack, *in, rank]"""
    B: Float[Array, "..."]
    """[*stack, rank, *out]"""
    scaling: float
    dropout: float = 0.0
    key: Key[Array, "*stack"] | None = None


class Parts(NamedTuple):
    """A weight taken apart: `base` and the sum of the updates; with a magnitude, that with its columns at these norms."""

    base: "Array | Weight | None"
    """Dense or packed, with no parts of its own; None in a half that `split` made."""
    updates: tuple[Update, ...] = ()
    """Innermost first."""
    roles: str = LINEAR
    """What each of the trailing axes of the base is for."""
    magnitude: Float[Array, "*stack d_out"] | None = None
    base_norm: Float[Array, "*stack d_out"] | None = None
    """Norms of the columns of the innermost base but for the last update."""


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

    # What else is asked of a weight. These are the answers of one that is frozen and known as a whole.

    TRAINED: ClassVar[tuple[str, ...]] = ()
    """The children that are trained. A kind that has some is adapted."""

    @property
    def packed_roles(self) -> str | None:
        """What its axes are for, where it was packed under other roles than [in, out]."""
        return None

    @property
    def representative(self) -> Any:
        """What has the weight's number of axes, and the stack's in front, in either half that `split` makes too."""
        return self

    @property
    def per_row(self) -> bool:
        """Whether each row of a batch goes through parameters of its own."""
        return False

    @property
    def unpacked_size(self) -> int:
        """Elements of the dense kernel that a product by it unpacks for a while; 0: none."""
        return 0

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of children that it should have and lacks, such as those that went to the other half in `split`."""
        return ()

    def origin(self) -> "Array | Weight":
        """The weight as it was before it was adapted."""
        return self

    def as_head(self) -> "Array | Weight":
        """What an output head multiplies by that is tied to this embedding: the original, as in PEFT."""
        return self.origin()

    def parts(self) -> Parts:
        """What it is the sum of.

        Raises:
            Inseparable: when it is no sum of a frozen weight and low-rank updates.
        """
        raise Inseparable(self, "does not say what it is the sum of (`parts`)")

    def __jax_array__(self, *args, **kwargs):  # NumPy passes `dtype` and `copy` to `__array__`
        raise TypeError(
            f"A `{type(self).__name__}` of shape {self.shape} was used as an array, which would form the dense weight. "
            "Multiply by it with `jlora.linear(x, w)`, look rows up with `jlora.embed(ids, w)`, call a function that was written "
            "for arrays through `jlora.wrap(fn)` with the weight among its arguments, or ask for the dense array with "
            "`jlora.merge(params)`."
        )

    __array__ = __jax_array__


def is_weight(x: object) -> bool:
    """Whether a leaf is a `Weight`."""
    # The one question that cannot be asked of the leaf itself: it may be an array.
    return isinstance(x, Weight)


def is_adapted(x: Any) -> bool:
    """Whether something in a leaf is trained and something else kept frozen beside it."""
    return is_weight(x) and bool(x.TRAINED)


def origin(w: Any) -> Any:
    """The leaf as it was before it was adapted."""
    return w.origin() if is_weight(w) else w


def parts_of(w: Any, roles: str = LINEAR) -> Parts:
    """`w.parts()`; a plain array, whose trailing axes have these roles, is its own only part."""
    return w.parts() if is_weight(w) else Parts(w, roles=roles)


def as_dense(w: Any, dtype: DTypeLike) -> Array:
    """The dense array that `w`, of any kind, stands for, in `dtype`."""
    return w.dense(dtype) if is_weight(w) else w.astype(dtype)


def cast_to(w: Any, dtype: DTypeLike) -> Array | Weight:
    """`w`, of any kind, standing for an array of another float dtype."""
    return w.cast(dtype) if is_weight(w) else w.astype(dtype)


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
        if len(to) == 2 and lhs[:-1] == rhs[:-1] and set(to) == set(lhs[-1:] + rhs[-1:]):
            return (_over_rows(x, y) if lhs[-1] == to[0] else _over_rows(y, x)).astype(dtype)
        return jnp.einsum(f"{lhs},{rhs}->{to}", x, y, preferred_element_type=jnp.float32).astype(dtype)

    da = None if b is None else product(out, sb, sa, dy, b.astype(like_a.dtype), like_a.dtype)
    db = None if a is None else product(sa, out, sb, a, dy, like_b.dtype)
    return da, db


def _over_rows(x: Array, y: Array) -> Array:
    """The gradient of a kernel, [*rows, d_in], [*rows, d_out] -> [d_in, d_out], float32."""
    x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
    on_cpu = jax.default_backend() == "cpu" and multiplies_bfloat16()
    if x.dtype != jnp.bfloat16 or x.shape[0] % 2 or not x.size or not on_cpu:
        return jnp.einsum("ti,to->io", x, y, preferred_element_type=jnp.float32)
    # XLA:CPU multiplies bfloat16 where the sum runs along the rows of the left operand; here it would convert both to float32.
    # It transposes the left one, the smaller, only if the sum runs over two axes; and it must not turn the product round for
    # a transpose that follows, since of that it makes a product that it cannot run.
    x, y = (z.reshape(2, z.shape[0] // 2, z.shape[1]) for z in (x, y))
    left, right = sorted((x, y), key=lambda z: z.shape[-1])
    pair = computed_once(jnp.einsum("sti,sto->io", left, right, preferred_element_type=jnp.float32))
    return pair if left is x else pair.T


einsum.defvjp(_einsum_fwd, _einsum_bwd, symbolic_zeros=True)


def dense_matmul(x: AnyArray, w: AnyArray, *, transpose: bool, out_dtype: DTypeLike) -> Array:
    """`x [*, in] @ w [in, out]`, or `x [*, out] @ w.T`, of a plain array."""
    kernel, dtype = "oi" if transpose else "io", jnp.dtype(out_dtype)
    if math.prod(x.shape[:-1]) == 1 and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA:CPU has no product of one bfloat16 row: it converts the whole kernel to float32, which takes 20 times as long.
        twice: Any = einsum(f"ti,{kernel}->to", dtype, jnp.stack([x.ravel()] * 2), w)
        return twice[0].reshape(*x.shape[:-1], -1)
    # Not flattened: those who multiply the same x keep the same x for their gradients, not a reshape each.
    rows = string.ascii_uppercase[: x.ndim - 1]
    y: Any = einsum(f"{rows}i,{kernel}->{rows}o", dtype, x, w)
    return y
