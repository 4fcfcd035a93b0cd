"""Consumer rules: how a product, a convolution or a lookup uses a weight without forming it."""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Primitive

from jlora._typing import Array, DTypeLike, Json
from jlora.lora import embed, linear
from jlora.weight import einsum
from jlora.wrapping.sides import SideOp
from jlora.wrapping.values import Factored, Packed, Split, Unhandled, Value, is_value, varying_alike
from jlora.wrapping.views import Rule, cut

if TYPE_CHECKING:
    from jlora.wrapping.interpreter import Context


CONSUMERS: dict[str, Rule] = {}
FACTORED, TRANSPOSED = "factored", "factored(T)"
_DEFAULT_PRECISION = (None, lax.Precision.DEFAULT)


def _consumer(*names: str) -> Callable[[Rule], Rule]:
    def register(rule):
        CONSUMERS.update({name: rule for name in names})
        return rule

    return register


def _finished(y: Array, weight: Factored, dtype: DTypeLike) -> Array:
    return (y if weight.scale is None else y * weight.scale).astype(dtype)


# Products


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimension numbers of a product, seen from the weight."""

    contract: tuple[tuple[int, int], ...]
    """Pairs (axis of x, axis of the weight)."""
    batch: tuple[tuple[int, int], ...]
    weight_first: bool
    """Whether the weight is the left operand, whose free axes come first in the result."""

    @classmethod
    def of(cls, numbers: Any, weight_first: bool) -> "Dims":
        contract, batch = ([tuple(map(int, side)) for side in part] for part in numbers)
        turn = slice(None, None, -1 if weight_first else 1)
        return cls(tuple(zip(*contract[turn], strict=True)), tuple(zip(*batch[turn], strict=True)), weight_first)


@_consumer("dot_general")
def _dot_general(ctx, eqn, values):
    weight_first = is_value(values[0])
    if is_value(values[1]) and weight_first:
        raise Unhandled("a product of two weights is not low-rank")
    weight, x = values if weight_first else values[::-1]
    if eqn.params.get("out_sharding") is not None:
        raise Unhandled("a product with an `out_sharding`")
    dims = Dims.of(eqn.params["dimension_numbers"], weight_first)
    return [multiply(ctx, eqn, x, weight, dims, eqn.params["precision"], eqn.outvars[0].aval.dtype)]


def multiply(
    ctx: "Context", eqn: JaxprEqn, x: Array, weight: Value, dims: Dims, precision: lax.PrecisionLike, dtype: DTypeLike
) -> Array:
    """`dot_general` of an array and a weight; the result has `dtype`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Unhandled(f"a product with {x.dtype}")
    if isinstance(weight, Split):
        return _by_parts(ctx, eqn, x, weight, dims, precision, dtype)
    if not isinstance(weight, Factored):  # a plain part of a `Split`
        y = jnp.einsum(_letters(x, weight.ndim, dims).spec(), x, weight, precision=precision)
        return y.astype(dtype)
    x, weight = varying_alike(x, weight)
    side = _side(weight, dims)
    ctx.used(eqn, weight, FACTORED if side == "i" else TRANSPOSED)
    if _is_plain(weight, dims, side, precision):
        return _plain(x, weight, dims, side, dtype)
    return _general(x, weight, dims, side, precision, dtype)


def _side(weight: Factored, dims: Dims) -> str:
    roles = {weight.role(axis) for _, axis in dims.contract}
    if {"i", "o"} <= roles:
        raise Unhandled("the contraction is over inputs and outputs at once")
    side = (roles & {"i", "o"}) or {None}
    (found,) = side
    if found is None:
        raise Unhandled("nothing is contracted but stack axes: the result is as large as the weight")
    return found


def _is_plain(weight: Factored, dims: Dims, side: str, precision: lax.PrecisionLike) -> bool:
    """Whether this is `x @ w` or `x @ w.T`, up to reshapes and the order of axes."""
    whole = len(dims.contract) == len(weight.side(side)) == sum(weight.role(a) == side for _, a in dims.contract)
    others = all(weight.role(axis) in "io" for axis in range(weight.ndim))
    return whole and others and not weight.stack and not dims.batch and precision in _DEFAULT_PRECISION


def _plain(x: Array, weight: Factored, dims: Dims, side: str, dtype: DTypeLike) -> Array:
    other = "o" if side == "i" else "i"
    # The contracted axes of x go last, in the order of the stored side.
    last = [a for a, _ in sorted(dims.contract, key=lambda pair: weight.axes[pair[1]])]
    free = [a for a in range(x.ndim) if a not in last]
    rows = jnp.transpose(x, free + last).reshape(*(x.shape[a] for a in free), math.prod(weight.side(side)))
    y = linear(rows, weight.matrix(), transpose=side == "o", out_dtype=dtype)
    y = y.reshape(*y.shape[:-1], *weight.side(other))
    stored = weight.start(other)
    seen = [len(free) + c - stored for axis, c in enumerate(weight.axes) if weight.role(axis) == other]
    order = (*seen, *range(len(free))) if dims.weight_first else (*range(len(free)), *seen)
    return _finished(jnp.transpose(y, order), weight, dtype)


@dataclasses.dataclass(frozen=True)
class _Letters:
    """The letters of a product, as in einsum.

    Of x [tokens, d_model] and a query kernel [d_model, heads, head_dim] contracted over d_model: x "ab", weight "bcd", out
    "acd". The rest of this file talks of axes by these letters.
    """

    x: str
    weight: str
    out: str

    def spec(self) -> str:
        return f"{self.x},{self.weight}->{self.out}"


def _letters(x: Array, ndim: int, dims: Dims) -> _Letters:
    pool = iter(string.ascii_letters)
    of_x = [next(pool) for _ in range(x.ndim)]
    of_weight: list[str] = ["" for _ in range(ndim)]
    for a, axis in (*dims.contract, *dims.batch):
        of_weight[axis] = of_x[a]
    of_weight = [letter or next(pool) for letter in of_weight]
    contracted, batch = {of_x[a] for a, _ in dims.contract}, "".join(of_x[a] for a, _ in dims.batch)
    free_x = "".join(letter for letter in of_x if letter not in contracted and letter not in batch)
    free_weight = "".join(letter for letter in of_weight if letter not in contracted and letter not in batch)
    out = batch + (free_weight + free_x if dims.weight_first else free_x + free_weight)
    return _Letters("".join(of_x), "".join(of_weight), out)


@dataclasses.dataclass(frozen=True)
class _Product:
    """Two-operand einsum in the dtype of x with float32 accumulation, as a value."""

    spec: str
    precision: lax.PrecisionLike
    dtype: str

    def __call__(self, x: Array, w: Array) -> Array:
        first, second, out = terms = self.spec.replace("->", ",").split(",")
        both_ways = all(sum(letter in term for term in terms) > 1 for letter in first + second)
        batched = set(first) & set(second) & set(out)
        if both_ways and not batched and self.precision in _DEFAULT_PRECISION:
            return einsum(self.spec, jnp.dtype(self.dtype), x, w)
        # Of batched bfloat16 products XLA:CPU lacks some with a float32 result; what the program asked for, it has.
        kept = jnp.dtype(self.dtype) if batched else jnp.float32
        y = jnp.einsum(self.spec, x, w.astype(x.dtype), precision=self.precision, preferred_element_type=kept)
        return y.astype(self.dtype)


def _general(
    x: Array, weight: Factored, dims: Dims, side: str, precision: lax.PrecisionLike, dtype: DTypeLike
) -> Array:
    """Any product that contracts axes of one side: that side's factor meets x first, the other's the result.

    With x "ab" and the query kernel "bcd" of roles "ioo", whose factors are A [d_model, rank] "bZ" and B [rank, heads,
    head_dim] "Zcd": the base gives "ab,bcd->acd", the update "ab,bZ->aZ" and then "aZ,Zcd->acd". Contracted over its
    outputs, x "acd" meets B first: "acd,Zcd->aZ", then "aZ,bZ->ab". Stack axes stand in front of both factors, and a letter
    of the weight that the result keeps though neither x nor the base has it is an axis of size 1 repeated.
    """
    if weight.magnitude is not None:
        raise Unhandled("DoRA is known for products with a whole kernel [in, out] alone")
    letters = _letters(x, weight.ndim, dims)
    stored = dict(zip(weight.axes, letters.weight, strict=True))  # canonical axis -> letter; new axes are not stored
    base = "".join(stored[c] for c in range(len(weight.canonical_shape)))
    missing = [letter for letter in letters.out if letter not in letters.x + base]
    out = "".join(letter for letter in letters.out if letter not in missing)
    lead, middle = len(weight.stack), len(weight.stack) + len(weight.ins)
    stack = base[:lead]
    if weight.scale is not None and weight.scale.ndim and not set(stack) <= set(out):
        if not set(stack) <= set(letters.x):
            raise Unhandled("a stack whose rows were scaled differently is summed over")
        # What is summed over is scaled before.
        x, weight = (x * _along(weight.scale, stack, letters.x)).astype(x.dtype), weight.replace(scale=None)
    y = weight.times_base(_Product(f"{letters.x},{base}->{out}", precision, jnp.dtype(dtype).name), x)
    rank = next(c for c in reversed(string.ascii_letters) if c not in letters.x + base)
    terms = {"i": stack + base[lead:middle] + rank, "o": stack + rank + base[middle:]}
    first, second = (terms["i"], terms["o"]) if side == "i" else (terms["o"], terms["i"])
    for k, ((a, b), scaling) in enumerate(zip(weight.factors, weight.scalings, strict=True)):
        dropped = _dropped(x, letters.x, stack, weight) if k == len(weight.factors) - 1 else x
        one, two = (a, b) if side == "i" else (b, a)
        wanted = set(second) | set(out)
        between = "".join(dict.fromkeys(c for c in letters.x + first if c in wanted and c != rank)) + rank
        u = _Product(f"{letters.x},{first}->{between}", precision, x.dtype.name)(dropped, one)
        y = y + (scaling * _Product(f"{between},{second}->{out}", precision, x.dtype.name)(u, two)).astype(dtype)
    if weight.scale is not None and weight.scale.ndim:
        y = y * _along(weight.scale, stack, out)
    elif weight.scale is not None:
        y = y * weight.scale
    if missing:
        size = dict(zip(letters.weight, weight.shape, strict=True))
        sizes = [size[c] if c in missing else y.shape[out.index(c)] for c in letters.out]
        y = lax.broadcast_in_dim(y, sizes, [letters.out.index(c) for c in out])
    return y.astype(dtype)


def _along(scale: Array, stack: str, letters: str) -> Array:
    """A factor for each row of a stack, shaped to multiply an array whose axes have these letters."""
    order = sorted(range(len(stack)), key=lambda k: letters.index(stack[k]))
    return jnp.transpose(scale, order).reshape([scale.shape[stack.index(c)] if c in stack else 1 for c in letters])


def _dropped(x: Array, letters: str, stack: str, weight: Factored) -> Array:
    """x after dropout by the mask of the weight's key; of a stack's keys each drops its own part of x."""
    if weight.key is None or weight.dropout == 0.0:
        return x
    if not set(stack) <= set(letters):
        raise Unhandled("dropout in a stack of weights whose inputs are the same: the masks would differ")
    lead = [letters.index(c) for c in stack]
    order = [*lead, *(k for k in range(x.ndim) if k not in lead)]
    moved = jnp.transpose(x, order)
    keep = functools.partial(jax.random.bernoulli, p=1.0 - weight.dropout, shape=moved.shape[len(lead) :])
    for _ in lead:
        keep = jax.vmap(keep)
    kept = jnp.transpose(keep(weight.key), sorted(range(x.ndim), key=order.__getitem__))
    return jnp.where(kept, x / (1.0 - weight.dropout), jnp.zeros((), x.dtype))


def _by_parts(ctx, eqn, x, split, dims, precision, dtype):
    """A product with concatenated weights: the parts' results in a row, or their sum where x is cut instead."""
    contracted = next((a for a, axis in dims.contract if axis == split.axis), None)
    batched = next((a for a, axis in dims.batch if axis == split.axis), None)
    ends = [0]
    for part in split.parts:
        ends.append(ends[-1] + part.shape[split.axis])

    def product(k, part):
        a = contracted if contracted is not None else batched
        mine = x if a is None else lax.slice_in_dim(x, ends[k], ends[k + 1], axis=a)
        return multiply(ctx, eqn, mine, part, dims, precision, dtype)

    parts = [product(k, part) for k, part in enumerate(split.parts)]
    if contracted is not None:
        return functools.reduce(jnp.add, parts)
    letters = _letters(x, len(split.shape), dims)
    return jnp.concatenate(parts, axis=letters.out.index(letters.weight[split.axis]))


@_consumer("ragged_dot_general")
def _ragged_dot(ctx, eqn, values):
    x, weight, *groups = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    if not isinstance(weight, Factored) or any(map(is_value, (x, *groups))):
        raise Unhandled("the weight of a grouped product is its right operand")
    roles = [weight.role(axis) for axis in range(weight.ndim)]
    plain = weight.axes == (0, 1, 2) and roles == ["b", "i", "o"] and tuple(contract[1]) == (1,)
    if not plain or any(batch) or list(numbers.rhs_group_dimensions) != [0] or weight.magnitude is not None:
        raise Unhandled("a grouped product takes a stack [groups, in, out]")
    if weight.key is not None:
        raise Unhandled("dropout in a grouped product")
    ctx.used(eqn, weight, FACTORED)
    params = eqn.params | {"preferred_element_type": jnp.dtype(jnp.float32)}

    def product(x, w, *groups):
        return eqn.primitive.bind(x, w.astype(x.dtype), *groups, **params)

    if isinstance(weight.base, Packed):
        raise Unhandled("grouped products of quantized stacks")
    dtype = eqn.outvars[0].aval.dtype
    y = product(x, weight.base, *groups)
    for (a, b), scaling in zip(weight.factors, weight.scalings, strict=True):
        y = y + scaling * product(product(x, a, *groups).astype(x.dtype), b, *groups)
    if weight.scale is not None and weight.scale.ndim:
        raise Unhandled("a stack whose rows were scaled differently, in a grouped product")
    return [_finished(y, weight, dtype)]


# Convolutions


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A convolution as a value. `kernel_order`: from stored axes to those of the program."""

    primitive: Primitive
    params: tuple[tuple[str, Hashable], ...]
    order: tuple[int, ...]

    def __call__(self, x, w):
        params = dict(self.params) | {"preferred_element_type": None}
        return self.primitive.bind(x, jnp.transpose(w, self.order).astype(x.dtype), **params)


@_consumer("conv_general_dilated")
def _convolution(ctx, eqn, values):
    x, weight = values
    numbers = eqn.params["dimension_numbers"]
    if is_value(x) or not isinstance(weight, Factored):
        raise Unhandled("the weight of a convolution is its kernel")
    feature = numbers.rhs_spec[0]
    roles = {axis: weight.role(axis) for axis in range(weight.ndim)}
    if roles.pop(feature) != "o" or set(roles.values()) != {"i"}:
        raise Unhandled('a kernel is an output axis, and input axes for window and channels ("iiio" for HWIO)')
    if (eqn.params["feature_group_count"], eqn.params["batch_group_count"]) != (1, 1):
        raise Unhandled("a convolution in groups")
    if weight.magnitude is not None:
        raise Unhandled("DoRA is known for products with a whole kernel [in, out] alone")
    ctx.used(eqn, weight, FACTORED)
    x, weight = varying_alike(x, weight)
    # The output axis is stored last, where a factor A has its rank: the same convolution takes both.
    convolve = _Convolution(eqn.primitive, tuple(eqn.params.items()), weight.axes)
    y = weight.times_base(convolve, x)
    channel = numbers.out_spec[1]
    for k, ((a, b), scaling) in enumerate(zip(weight.factors, weight.scalings, strict=True)):
        every = string.ascii_letters[: x.ndim]
        dropped = _dropped(x, every, "", weight) if k == len(weight.factors) - 1 else x
        u = jnp.moveaxis(convolve(dropped, a), channel, -1)
        y = y + (scaling * jnp.moveaxis(linear(u, b), -1, channel)).astype(y.dtype)
    return [_finished(y, weight, eqn.outvars[0].aval.dtype)]


# Lookups


@_consumer("gather")
def _gather(ctx, eqn, values):
    weight, indices = values
    if is_value(indices) or not isinstance(weight, Factored):
        raise Unhandled("a lookup in concatenated weights")
    indices, weight = varying_alike(indices, weight)
    axis = _looked_up(weight, eqn.params)
    ids, places = indices[..., 0], eqn.params["dimension_numbers"].offset_dims
    fill = _fill(weight, ids, axis, eqn)
    if weight.role(axis) == "i":
        ctx.used(eqn, weight, FACTORED)
        y = _rows(weight, ids, axis)
        if fill is not None:
            valid, value = fill
            y = jnp.where(valid.reshape(*valid.shape, *[1] * (y.ndim - valid.ndim)), y, jnp.asarray(value, y.dtype))
        batch = [k for k in range(y.ndim) if k not in places]
        return [jnp.transpose(y.astype(eqn.outvars[0].aval.dtype), _inverse([*batch, *places]))]
    taken = cut(weight, axis, SideOp.take(0), ids)
    if fill is not None:
        taken = _filled(taken, weight, axis, *fill)
    return [_placed(taken, axis, ids.ndim, places)]


def _filled(taken: Factored, weight: Factored, axis: int, valid: Array, value: float) -> Factored:
    """The weight after a lookup along a stack axis, with `value` for all of a kernel whose index is out of range."""
    if weight.role(axis) != "b" or not (value == 0 or math.isnan(value)):
        raise Unhandled(
            'a lookup of weights with mode "fill" (the default of take), which can fill with NaN or 0 alone, along a stack axis: '
            'pass mode="clip" or "promise_in_bounds"'
        )
    c = weight.axes[axis]
    factor = jnp.where(valid, jnp.float32(1.0), jnp.float32(value))
    factor = factor.reshape(*[1] * c, *valid.shape, *[1] * (len(weight.stack) - c - 1))
    return taken.replace(scale=jnp.broadcast_to(factor if taken.scale is None else taken.scale * factor, taken.stack))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _looked_up(weight: Factored, params: Mapping[str, Json]) -> int:
    """The one axis that a gather takes single indices of, all others whole."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axes = tuple(numbers.start_index_map)
    whole = all(size == n for axis, (size, n) in enumerate(zip(sizes, weight.shape, strict=True)) if axis not in axes)
    batched = numbers.operand_batching_dims
    if len(axes) != 1 or tuple(numbers.collapsed_slice_dims) != axes or sizes[axes[0]] != 1 or batched or not whole:
        raise Unhandled("a lookup takes whole slices at indices along one axis")
    return axes[0]


def _fill(weight: Factored, ids: Array, axis: int, eqn: JaxprEqn) -> tuple[Array, float] | None:
    """(which indices are in range, what the others give), for the mode that has it."""
    mode = eqn.params["mode"]
    if mode != lax.GatherScatterMode.FILL_OR_DROP:
        return None
    value = eqn.params["fill_value"]
    return (ids >= 0) & (ids < weight.shape[axis]), float("nan") if value is None else value


def _rows(weight: Factored, ids: Array, axis: int) -> Array:
    """[*ids, *the other axes in the order of the program]."""
    if weight.role(axis) == "i" and not weight.stack and len(weight.ins) == 1 and "new" not in _roles(weight):
        y = embed(ids, weight.matrix()).reshape(*ids.shape, *weight.outs)
        seen = [c - 1 for c in weight.axes if c > 0]
        y = jnp.transpose(y, (*range(ids.ndim), *(ids.ndim + k for k in seen)))
        return _finished(y, weight, weight.dtype)
    if weight.magnitude is not None or isinstance(weight.base, Packed):
        raise Unhandled("rows of a DoRA or quantized weight are looked up in a table [vocab, features] alone")
    taken = cut(weight.replace(axes=tuple(range(len(weight.canonical_shape)))), weight.axes[axis], SideOp.take(0), ids)
    lead, middle = len(taken.stack), len(taken.stack) + len(taken.ins)
    letters = string.ascii_lowercase[: len(taken.canonical_shape)]
    a_term, b_term = letters[:middle] + "Z", letters[:lead] + "Z" + letters[middle:]
    y = taken.base_array(jnp.float32)
    for (a, b), scaling in zip(taken.factors, taken.scalings, strict=True):
        y = y + scaling * jnp.einsum(f"{a_term},{b_term}->{letters}", a, b)
    if taken.scale is not None:
        y = y * taken.scale.reshape(*taken.scale.shape, *[1] * (y.ndim - taken.scale.ndim))
    # The indices' axes stand where the axis stood; they go first, the others follow in the program's order.
    c, grown = weight.axes[axis], ids.ndim - 1
    others = [a + (grown if a > c else 0) for k, a in enumerate(weight.axes) if k != axis and a >= 0]
    y = jnp.transpose(y, (*range(c, c + ids.ndim), *others))
    for k, a in enumerate(a for j, a in enumerate(weight.axes) if j != axis):
        if a < 0:
            y = jnp.repeat(jnp.expand_dims(y, ids.ndim + k), -a, axis=ids.ndim + k)
    return y


def _roles(weight: Factored) -> set[str]:
    return {weight.role(axis) for axis in range(weight.ndim)}


def _placed(taken: Factored, axis: int, batch: int, places: tuple[int, ...]) -> Factored:
    """Axes after a lookup that left the weight factored: the indices' axes stand in for `axis`, then as the gather says."""
    c = taken.axes[axis]
    others = [a + (batch - 1 if a > c else 0) for k, a in enumerate(taken.axes) if k != axis]
    rest, fresh = iter(others), iter(range(c, c + batch))
    return taken.replace(axes=tuple(next(rest) if k in places else next(fresh) for k in range(len(others) + batch)))
