"""What stands for a weight while a jaxpr is evaluated: `Factored`, `Packed` for its quantized base, `Split` for several.

All are pytrees, so they cross `jit`, `scan`, `cond` and `checkpoint` like arrays. A `Factored` keeps its arrays in one
order of axes, stack, in, out (the *canonical* order), and remembers where the program believes each axis to be: a
transpose costs nothing, and reaches the product that uses the weight as dimension numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp

from jlora._typing import Array, DTypeLike
from jlora.lora import LoraWeight
from jlora.quant import QuantizedTensor
from jlora.quant.matmul import not_before
from jlora.weight import Inseparable, Parts, Weight, is_weight, register_node
from jlora.weight.roles import order, sizes
from jlora.wrapping.sides import SideOp

Value: TypeAlias = Any
"""What an equation reads: a `Factored` or `Split` weight, or what JAX has there, an array or a literal number."""

_TINY = 1e-30  # as in `LoraWeight`: a column of zeros has no direction


class Unhandled(Exception):
    """A rule does not cover this use; the message says why. Never leaves `jlora.wrapping`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_product(fn: Callable[..., Array], x: Array, packed: "Packed") -> Array:
    """`fn(x, w)` for a function that is linear in `x` and a quantized `w`, which is unpacked again in the backward pass.

    As `quantized_matmul`, for products other than by a matrix: nothing but the packed bytes is kept, and the weight gets no
    gradient.
    """
    x, q = not_before(x, packed.q)
    return fn(x, dataclasses.replace(packed, q=q).dense(x.dtype))


def _product_fwd(fn, x, packed):
    return packed_product(fn, x, packed), (packed, jnp.zeros((0, *x.shape), x.dtype))  # nothing but shape and dtype


def _product_bwd(fn, residuals, dy):
    packed, like = residuals
    dy, q = not_before(dy, packed.q)
    w = dataclasses.replace(packed, q=q).dense(like.dtype)
    (dx,) = jax.vjp(lambda x: fn(x, w), jnp.zeros(like.shape[1:], like.dtype))[1](dy)
    return dx, None


packed_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(register_node, data_fields=("q", "operands"), meta_fields=("ops",))
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized kernel and what is to be done to its sides once it is unpacked: [*stack, *in, *out]."""

    q: QuantizedTensor
    """[*stack, in, out]"""
    operands: tuple[Array | None, ...] = ()
    """Traced indices of the operations, or None."""
    ops: tuple[tuple[str, SideOp], ...] = ()
    """("i" or "o", operation), in order."""

    @property
    def stack(self) -> tuple[int, ...]:
        return self.q.stack

    def dense(self, dtype: DTypeLike) -> Array:
        w, at = self.q.dense(dtype), {"i": len(self.stack), "o": len(self.stack) + 1}
        for (side, op), operand in zip(self.ops, self.operands, strict=True):
            before = w.ndim
            w = op(w, at[side], operand)
            at["o"] += (w.ndim - before) if side == "i" else 0
        return w

    def then(self, side: str, op: SideOp, operand: Array | None) -> "Packed":
        return dataclasses.replace(self, ops=(*self.ops, (side, op)), operands=(*self.operands, operand))


@functools.partial(register_node, data_fields=("packed",), meta_fields=("sides", "logical_dtype"))
@dataclasses.dataclass(frozen=True)
class PackedMatrix(Weight):
    """A `Packed` kernel as a matrix [in, out], for the methods of an adapted weight."""

    packed: Packed
    sides: tuple[int, int]
    logical_dtype: str

    @property
    def shape(self):
        return self.sides

    @property
    def dtype(self):
        return jnp.dtype(self.logical_dtype)

    @property
    def size(self):
        return math.prod(self.shape)

    def matmul(self, x, *, transpose, out_dtype):
        spec = "to,io->ti" if transpose else "ti,io->to"
        fn = _MatrixProduct(spec, self.shape, jnp.dtype(out_dtype).name)
        y = packed_product(fn, x.reshape(-1, x.shape[-1]), self.packed)
        return y.reshape(*x.shape[:-1], y.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]: a partial `custom_vjp` is typed as object

    def take(self, ids):
        if any(side == "i" for side, _ in self.packed.ops):
            raise Unhandled("rows of a quantized kernel are looked up before its rows are cut or reordered")
        rows, at = self.packed.q.take(ids), ids.ndim
        for (_, op), operand in zip(self.packed.ops, self.packed.operands, strict=True):
            rows = op(rows, at, operand)
        return rows.reshape(*ids.shape, self.shape[1]).astype(self.dtype)

    def dense(self, dtype=None):
        return self.packed.dense(dtype or self.dtype).reshape(self.shape)

    def cast(self, dtype):
        return dataclasses.replace(self, logical_dtype=jnp.dtype(dtype).name)


@dataclasses.dataclass(frozen=True)
class _MatrixProduct:
    """`x @ w` in float32; a value, so that equal products share a trace."""

    spec: str
    shape: tuple[int, int]
    out_dtype: str

    def __call__(self, x, w):
        return jnp.einsum(self.spec, x, w.reshape(self.shape), preferred_element_type=jnp.float32).astype(
            self.out_dtype
        )


_DATA = ("base", "factors", "scale", "key", "magnitude", "base_norm")
_META = ("scalings", "axes", "ins", "outs", "dtype", "dropout", "paths")


@functools.partial(register_node, data_fields=_DATA, meta_fields=_META)
@dataclasses.dataclass(frozen=True)
class Factored:
    """`scale * (base + sum of scaling * A B)`, never formed; or a quantized base alone, with no factors."""

    base: Array | Packed
    """[*stack, *ins, *outs]"""
    axes: tuple[int, ...]
    """Canonical axis of each axis that the program sees; -n for an axis of size n that the weight does not depend on."""
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    dtype: str
    paths: tuple[str, ...]
    """The leaves it was made from, several after stacking."""
    factors: tuple[tuple[Array, Array], ...] = ()
    """A [*stack, *ins, rank] and B [*stack, rank, *outs]; innermost first: with PiSSA the residual's, then the trained."""
    scalings: tuple[float, ...] = ()
    scale: Array | None = None
    """A pending scalar factor, float32 [*stack or nothing]."""
    dropout: float = 0.0
    key: Array | None = None
    """Dropout key [*stack], of the last factors, as are the next two."""
    magnitude: Array | None = None
    base_norm: Array | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        if self.factors:
            a = self.factors[0][0]
            return a.shape[: a.ndim - 1 - len(self.ins)]
        return self.base.stack if isinstance(self.base, Packed) else self.base.shape[: -len(self.ins + self.outs)]

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.ins, *self.outs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the program sees."""
        return tuple(self.canonical_shape[c] if c >= 0 else -c for c in self.axes)

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def role(self, axis: int) -> str:
        """ "b", "i" or "o" of an axis that the program sees, "new" for one that the weight does not depend on."""
        return "new" if self.axes[axis] < 0 else self.canonical_role(self.axes[axis])

    def canonical_role(self, axis: int) -> str:
        lead = len(self.stack)
        return "b" if axis < lead else "i" if axis < lead + len(self.ins) else "o"

    def start(self, side: str) -> int:
        """First canonical axis of a side."""
        return len(self.stack) + (len(self.ins) if side == "o" else 0)

    def side(self, side: str) -> tuple[int, ...]:
        return self.ins if side == "i" else self.outs

    def replace(self, **changes: Any) -> "Factored":
        return dataclasses.replace(self, **changes)

    def on_side(self, side: str, op: SideOp, operand: Array | None = None) -> "Factored":
        """`op` done to one side of the base and to the factors that own it; `axes` is the caller's to correct."""
        lead, old = len(self.stack), self.side(side)
        if self.magnitude is not None and side == "i" and not op.keeps_all:
            raise Unhandled("DoRA's norms are over whole columns; this takes a part of them")
        new = op.sizes(old, operand)
        if isinstance(self.base, Packed):
            # Until an operation does more than reshape, `ins` and `outs` are all there is to say.
            keep = not self.base.ops and op.only_shape
            base = self.base if keep else self.shaped(self.base).then(side, op, operand)
        else:
            base = op(self.base, self.start(side), operand)
        at, which = (lead, 0) if side == "i" else (lead + 1, 1)
        factors = tuple(
            tuple(op(part, at, operand) if k == which else part for k, part in enumerate(pair)) for pair in self.factors
        )
        changes = {"ins" if side == "i" else "outs": new}
        if self.magnitude is not None and self.base_norm is not None and side == "o":
            changes |= {"magnitude": op(self.magnitude, lead, operand), "base_norm": op(self.base_norm, lead, operand)}
        return self.replace(base=base, factors=factors, **changes)

    def shaped(self, packed: Packed) -> Packed:
        """A packed base that unpacks to [*stack, *ins, *outs]."""
        if packed.ops or (len(self.ins), len(self.outs)) == (1, 1):
            return packed
        return packed.then("i", SideOp.reshape(1, self.ins), None).then("o", SideOp.reshape(1, self.outs), None)

    def times_base(self, fn: Callable[..., Array], x: Array) -> Array:
        """`fn(x, base)`, for a hashable function that is linear in both."""
        if isinstance(self.base, Packed):
            return packed_product(fn, x, self.shaped(self.base))
        return fn(x, self.base)

    def base_array(self, dtype: DTypeLike) -> Array:
        return self.shaped(self.base).dense(dtype) if isinstance(self.base, Packed) else self.base.astype(dtype)

    def matrix(self) -> Array | Weight:
        """The weight as a kernel [in, out] that knows its own products. `scale` is left to the caller."""
        assert not self.stack
        d_in, d_out = math.prod(self.ins), math.prod(self.outs)
        if not isinstance(self.base, Packed):
            weight = self.base.reshape(d_in, d_out)
        elif self.base.ops:
            weight = PackedMatrix(self.base, (d_in, d_out), self.dtype)
        else:
            weight = self.base.q.cast(jnp.dtype(self.dtype))
        last = len(self.factors) - 1
        flat = {n: None if (m := getattr(self, n)) is None else m.reshape(d_out) for n in ("magnitude", "base_norm")}
        for k, ((a, b), scaling) in enumerate(zip(self.factors, self.scalings, strict=True)):
            trained = {"dropout": self.dropout, "key": self.key, **flat} if k == last else {}
            weight = LoraWeight(weight, a.reshape(d_in, -1), b.reshape(-1, d_out), scaling, **trained)
        return weight

    def materialize(self) -> Array:
        """The dense array that the program sees."""
        stack, d_in, d_out = self.stack, math.prod(self.ins), math.prod(self.outs)
        total = self.base_array(jnp.float32).reshape(*stack, d_in, d_out)
        for (a, b), scaling in zip(self.factors, self.scalings, strict=True):
            rank = a.shape[-1]
            total = total + scaling * jnp.matmul(
                a.reshape(*stack, d_in, rank), b.reshape(*stack, rank, d_out), precision=jax.lax.Precision.HIGHEST
            )
        if self.magnitude is not None:
            norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(jax.lax.stop_gradient(total)), axis=-2), _TINY))
            total = total * (self.magnitude.reshape(norm.shape) / norm)[..., None, :]
        if self.scale is not None:
            total = total * self.scale[..., None, None]
        dense = total.reshape(self.canonical_shape).astype(self.dtype)
        own = [c for c in self.axes if c >= 0]
        dense = jnp.transpose(dense, own)
        if len(own) < len(self.axes):
            places = [k for k, c in enumerate(self.axes) if c >= 0]
            dense = jax.lax.broadcast_in_dim(dense, self.shape, places)
        return dense

    def arrays_along_stack(self, fn: Callable[..., Array]) -> "Factored":
        """`fn` done to every child array, all of which start with the stack axes."""
        whole = self
        if self.scale is not None:
            whole = self.replace(scale=jnp.broadcast_to(self.scale, self.stack))
        return jax.tree.map(fn, whole)


@functools.partial(register_node, data_fields=("parts",), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class Split:
    """Weights concatenated along one axis, a `Factored` or a plain array each; products take them one by one."""

    parts: tuple[Factored | Array, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> str:
        return str(self.parts[0].dtype)

    def each(self, fn: Callable[..., "Factored | Array"], axis: int | None = None) -> "Split":
        return Split(tuple(fn(part) for part in self.parts), self.axis if axis is None else axis)


def varying_alike(x: Array, weight: Factored) -> tuple[Array, Factored]:
    """Inside `shard_map`: the operands of a product varying over the same mesh axes, which a `custom_vjp` insists on.

    Their cotangents are summed over the axes along which they did not vary, as they are for JAX's own products.
    """
    leaves, treedef = jax.tree.flatten((x, weight))
    axes = frozenset().union(*map(_varying, leaves))
    return jax.tree.unflatten(treedef, [_vary(leaf, axes - _varying(leaf)) for leaf in leaves])


def _varying(x: Array) -> frozenset[str]:
    """The manual mesh axes along which an array differs from device to device."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)  # `vma` before jax 0.10
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    if not axes:
        return x
    names = tuple(sorted(axes))
    return jax.lax.pcast(x, names, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, names)  # pyright: ignore[reportAttributeAccessIssue]


def is_value(x: object) -> TypeGuard["Factored | Split"]:
    return isinstance(x, Factored | Split)


def weights_in(value: object) -> list[Factored]:
    if isinstance(value, Split):
        return [part for part in value.parts if isinstance(part, Factored)]
    return [value] if isinstance(value, Factored) else []


def _seen(lead: int, roles: str) -> tuple[int, ...]:
    """Canonical axis of each axis as stored."""
    places = {axis: k for k, axis in enumerate(order(roles))}
    return (*range(lead), *(lead + places[axis] for axis in range(len(roles))))


def stays_factored(w: Weight, path: str) -> bool:
    """Whether a weight is more to the interpreter than the dense array that it stands for, as a leaf trained whole is not.

    Raises:
        TypeError: for a kind that does not say what it is the sum of, and for the half of a weight that `split` made.
    """
    if w.absent:
        raise TypeError(
            f"{path!r} is one half of a {type(w).__name__}: the other went elsewhere in `split`. Pass "
            "`combine(adapter, base)` to the wrapped function."
        )
    found: list[Parts] = []
    try:
        jax.eval_shape(lambda w: found.append(w.parts()), w)  # it may hold shapes alone
    except Inseparable as error:
        place = "the weight" if error.kind == type(w).__name__ else f"the base of the `{type(w).__name__}`"
        raise TypeError(
            f"`jlora.wrap` does not know how a {error.kind} is used, {place} at {path!r}: it {error.reason}. Use it through "
            "`jlora.linear` and `jlora.embed`, or make it dense with `jlora.merge`."
        ) from None
    return bool(found[0].updates) or is_weight(found[0].base)


def factored(w: Weight, path: str) -> Any:
    """What stands for an argument."""
    parts = w.parts()
    if not stays_factored(w, path):
        return parts.base
    value = _packed(parts, path) if is_weight(parts.base) else _dense(parts, path)
    if not parts.updates:
        return value
    last = parts.updates[-1]
    return value.replace(
        factors=tuple((update.A, update.B) for update in parts.updates),
        scalings=tuple(update.scaling for update in parts.updates),
        dropout=last.dropout,
        key=last.key,
        magnitude=parts.magnitude,
        base_norm=parts.base_norm,
    )


def _packed(parts: Parts, path: str) -> Factored:
    q: Any = parts.base
    if len(q.kernel_shape) == 1:
        raise TypeError(f"`jlora.wrap` takes quantized kernels; {path!r} is a quantized vector of {q.kernel_shape[0]}.")
    sides = q.axes or q.kernel_shape
    return Factored(
        base=Packed(q.linear()),
        axes=_seen(len(q.stack), q.roles),
        ins=sizes(q.roles, "i", sides),
        outs=sizes(q.roles, "o", sides),
        dtype=q.dtype.name,
        paths=(path,),
    )


def _dense(parts: Parts, path: str) -> Factored:
    base: Any = parts.base
    roles, lead = parts.roles, base.ndim - len(parts.roles)
    return Factored(
        base=jnp.transpose(base, (*range(lead), *(lead + axis for axis in order(roles)))),
        axes=_seen(lead, roles),
        ins=sizes(roles, "i", base.shape),
        outs=sizes(roles, "o", base.shape),
        dtype=base.dtype.name,
        paths=(path,),
    )
