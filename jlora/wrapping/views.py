"""View rules: what leaves a weight factored. A rule takes (context, equation, values) and returns the outputs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora._typing import Array
from jlora.wrapping.sides import SideOp, group
from jlora.wrapping.values import Factored, Packed, Split, Unhandled, Value, is_value

if TYPE_CHECKING:
    from jlora.wrapping.interpreter import Context


Rule = Callable[..., list[Value]]
VIEWS: dict[str, Rule] = {}


def _view(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names."""

    def register(rule):
        VIEWS.update({name: rule for name in names})
        return rule

    return register


def _one(value: Value) -> Factored:
    if not isinstance(value, Factored):
        raise Unhandled("of concatenated weights, only products, casts and transposes are known")
    return value


# Elementwise


@_view("convert_element_type")
def _cast(ctx, eqn, values):
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unhandled(f"a cast to {dtype} is not linear")

    def cast(value):
        if not isinstance(value, Factored):
            return value.astype(dtype)
        base = value.base if isinstance(value.base, Packed) else value.base.astype(dtype)
        return value.replace(base=base, dtype=dtype.name)

    (value,) = values
    return [value.each(cast) if isinstance(value, Split) else cast(value)]


def _scaled(value: Value, factor: Value) -> Value:
    def scale(part):
        if not isinstance(part, Factored):
            return (part * factor).astype(part.dtype)
        factor32 = jnp.asarray(factor, jnp.float32)
        return part.replace(scale=factor32 if part.scale is None else part.scale * factor32)

    return value.each(scale) if isinstance(value, Split) else scale(value)


@_view("mul")
def _multiply(ctx, eqn, values):
    weight, factor = values if is_value(values[0]) else values[::-1]
    if is_value(factor) or jnp.ndim(factor):
        raise Unhandled("a weight is multiplied by a scalar, or else it is used in a product")
    return [_scaled(weight, factor)]


@_view("div")
def _divide(ctx, eqn, values):
    weight, divisor = values
    if not is_value(weight) or is_value(divisor) or jnp.ndim(divisor):
        raise Unhandled("a weight is divided by a scalar alone")
    return [_scaled(weight, 1.0 / jnp.asarray(divisor, jnp.float32))]


@_view("neg")
def _negate(ctx, eqn, values):
    return [_scaled(values[0], -1.0)]


@_view("copy", "copy_p", "name", "pvary", "pcast")
def _same(ctx, eqn, values):
    # A name is for policies that save what has it; a weight is an argument and saved anyway. `pvary` is implied.
    return list(values)


@_view("optimization_barrier")
def _barrier(ctx, eqn, values):
    return barred(values)


def barred(values: Sequence[Value]) -> list[Value]:
    """The values behind a barrier. Weights are barred array by array: one barrier for all would give a base a tangent,
    as soon as something beside it has one."""
    plain = iter(lax.optimization_barrier(tuple(v for v in values if not is_value(v))))
    return [jax.tree.map(lax.optimization_barrier, v) if is_value(v) else next(plain) for v in values]


@_view("stop_gradient")
def _stop(ctx, eqn, values):
    ctx.used(eqn, values[0], "stop_gradient: the adapter gets no gradient here")

    def stop(x):
        return lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return [jax.tree.map(stop, values[0])]


@_view("reduce_precision")
def _round(ctx, eqn, values):
    weight = _one(values[0])
    if isinstance(weight.base, Packed):
        raise Unhandled("a quantized weight is rounded where it is unpacked, and nowhere else")
    return [weight.replace(base=lax.reduce_precision(weight.base, **eqn.params))]


@_view("sharding_constraint")
def _constrain(ctx, eqn, values):
    sharding = eqn.params["sharding"]
    return [constrained(_one(values[0]), sharding)]


def constrained(weight: Factored, sharding: jax.sharding.Sharding) -> Factored:
    """The factors take the specs of their axes, rank unsharded; a dense base its own. Packed codes lie where they lay."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise Unhandled("only constraints by a `NamedSharding` are known")
    by_axis = specs(weight, sharding.spec)

    def put(x, spec):
        return lax.with_sharding_constraint(x, jax.sharding.NamedSharding(sharding.mesh, spec))

    base = weight.base if isinstance(weight.base, Packed) else put(weight.base, by_axis["base"])
    factors = tuple((put(a, by_axis["A"]), put(b, by_axis["B"])) for a, b in weight.factors)
    return weight.replace(base=base, factors=factors)


def specs(weight: Factored, spec: jax.sharding.PartitionSpec) -> dict[str, jax.sharding.PartitionSpec]:
    """Partition specs of the base and the factors in canonical order, from that of the weight as the program sees it."""
    given = [*spec, *[None] * (weight.ndim - len(spec))]
    canonical: list[Value] = [None] * len(weight.canonical_shape)
    for axis, part in zip(weight.axes, given, strict=True):
        if axis >= 0:
            canonical[axis] = part
    lead, middle = len(weight.stack), len(weight.stack) + len(weight.ins)
    spec_of = jax.sharding.PartitionSpec
    return {
        "base": spec_of(*canonical),
        "A": spec_of(*canonical[:middle], None),
        "B": spec_of(*canonical[:lead], None, *canonical[middle:]),
        "outs": spec_of(*canonical[:lead], *canonical[middle:]),
        "stack": spec_of(*canonical[:lead]),
    }


# Axes


@_view("transpose")
def _transpose(ctx, eqn, values):
    permutation = eqn.params["permutation"]

    def transpose(part):
        if not isinstance(part, Factored):
            return jnp.transpose(part, permutation)
        return part.replace(axes=tuple(part.axes[axis] for axis in permutation))

    (value,) = values
    if isinstance(value, Split):
        return [value.each(transpose, list(permutation).index(value.axis))]
    return [transpose(value)]


def without(weight: Factored, axis: int) -> Factored:
    """The weight less an axis of size 1."""
    c = weight.axes[axis]
    axes = tuple(a - (a > c >= 0) for k, a in enumerate(weight.axes) if k != axis)
    role = weight.role(axis)
    if role == "b":
        weight = weight.arrays_along_stack(lambda x: jnp.squeeze(x, c))
    elif role != "new":
        old = weight.side(role)
        at = c - weight.start(role)
        weight = weight.on_side(role, SideOp.reshape(len(old), old[:at] + old[at + 1 :]))
    return weight.replace(axes=axes)


_WORDS = {"b": "stack", "i": "input", "o": "output", "new": "broadcast"}


def reshape(weight: Factored, shape: Sequence[int]) -> Factored:
    """A reshape that splits or merges axes of one kind, or adds and drops axes of size 1."""
    for axis in reversed(range(weight.ndim)):
        if weight.shape[axis] == 1:
            weight = without(weight, axis)
    sizes = [n for n in shape if n != 1]
    runs = group(weight.shape, tuple(sizes))
    changed = {weight.role(axis) for old, new in runs if len(old) != 1 or len(new) != 1 for axis in old}
    for role in changed - {"new"}:
        weight = _in_order(weight, role)
    names = _names(weight)
    seen: list[tuple[str, int]] = []  # the axes of the result, as in `_names`
    sides: dict[str, list[int]] = {role: [] for role in changed}
    for old, new in runs:
        roles = {names[axis][0] for axis in old}
        if len(roles) > 1:
            before, after = [weight.shape[axis] for axis in old], [sizes[k] for k in new]
            kinds = " and ".join(_WORDS[role] for role in sorted(roles))
            raise Unhandled(f"a reshape of {before} to {after} mixes {kinds} axes")
        (role,) = roles
        if role not in changed:
            seen.append(names[old[0]])
            continue
        for k in new:
            seen.append((role, -sizes[k] if role == "new" else len(sides[role])))
            sides[role].append(sizes[k])
    for role in changed - {"new"}:
        if role == "b":
            lead = len(weight.stack)
            weight = weight.arrays_along_stack(lambda x, lead=lead: x.reshape(*sides["b"], *x.shape[lead:]))
        else:
            weight = weight.on_side(role, SideOp.reshape(len(weight.side(role)), tuple(sides[role])))
    kept = iter(_numbered(weight, seen))
    return weight.replace(axes=tuple(-1 if n == 1 else next(kept) for n in shape))


def _names(weight: Factored) -> list[tuple[str, int]]:
    """Each axis that the program sees as (role, number within its kind); of a new axis, minus its size."""
    start = {"b": 0, "i": weight.start("i"), "o": weight.start("o")}
    roles = [weight.role(axis) for axis in range(weight.ndim)]
    return [(role, c if role == "new" else c - start[role]) for role, c in zip(roles, weight.axes, strict=True)]


def _numbered(weight: Factored, names: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """The inverse of `_names`, for a weight whose sides may have other axes by now."""
    start = {"b": 0, "i": weight.start("i"), "o": weight.start("o"), "new": 0}
    return tuple(start[role] + k for role, k in names)


def _in_order(weight: Factored, role: str) -> Factored:
    """The same weight with the axes of one kind stored in the order in which the program sees them."""
    names = _names(weight)
    permutation = [k for r, k in names if r == role]
    if permutation == sorted(permutation):
        return weight
    if role == "b":
        weight = weight.arrays_along_stack(lambda x: jnp.transpose(x, (*permutation, *range(len(permutation), x.ndim))))
    else:
        weight = weight.on_side(role, SideOp.permute(tuple(permutation)))
    seen = [(r, permutation.index(k) if r == role else k) for r, k in names]
    return weight.replace(axes=_numbered(weight, seen))


@_view("reshape")
def _reshape(ctx, eqn, values):
    if eqn.params.get("dimensions") is not None:
        raise Unhandled("a reshape with `dimensions` also transposes")
    return [_settled(ctx, eqn, reshape(_one(values[0]), eqn.params["new_sizes"]))]


def _settled(ctx: "Context", eqn: JaxprEqn, weight: Factored) -> Value:
    """A weight of which a single row or column is left is that row or column: `w[3]`."""
    if weight.ins and weight.outs:
        return weight
    ctx.used(eqn, weight, "factored")
    return weight.materialize()


@_view("squeeze")
def _squeeze(ctx, eqn, values):
    weight = _one(values[0])
    for axis in sorted((d % weight.ndim for d in eqn.params["dimensions"]), reverse=True):
        weight = without(weight, axis)
    return [_settled(ctx, eqn, weight)]


@_view("expand_dims")
def _expand(ctx, eqn, values):
    weight = _one(values[0])
    for axis in sorted(eqn.params["dimensions"]):
        weight = inserted(weight, axis)
    return [weight]


@_view("broadcast_in_dim")
def _broadcast(ctx, eqn, values):
    if len(values) > 1:
        raise Unhandled("a broadcast to a traced shape")
    weight, shape, places = _one(values[0]), eqn.params["shape"], eqn.params["broadcast_dimensions"]
    for axis in reversed(range(weight.ndim)):
        if weight.shape[axis] == 1 and shape[places[axis]] != 1:
            weight, places = without(weight, axis), places[:axis] + places[axis + 1 :]
    axes = [-n for n in shape]
    for axis, place in enumerate(places):
        axes[place] = weight.axes[axis]
    return [weight.replace(axes=tuple(axes))]


# Parts


def cut(weight: Factored, axis: int, op: SideOp, operand: Array | None = None) -> Factored:
    """`op`, which works on axis 0 of a side of one axis, done to one axis that the program sees."""
    role, c = weight.role(axis), weight.axes[axis]
    if role == "b":
        return weight.arrays_along_stack(lambda x: op(x, c, operand))
    if role == "new":
        (size,) = op.sizes((weight.shape[axis],), operand)
        return weight.replace(axes=(*weight.axes[:axis], -size, *weight.axes[axis + 1 :]))
    at = c - weight.start(role)
    first = tuple(at + k for k in op.arguments[0]) if op.name == "reverse" else at + op.arguments[0]
    return weight.on_side(role, SideOp(op.name, (first, *op.arguments[1:])), operand)


def _sliced(weight: Value, axis: int, start: int, limit: int, stride: int = 1) -> Value:
    if (start, limit, stride) == (0, weight.shape[axis], 1):
        return weight
    return cut(weight, axis, SideOp.slice(0, start, limit, stride))


@_view("slice")
def _slice(ctx, eqn, values):
    weight = _one(values[0])
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        weight = _sliced(weight, axis, start, limit, stride)
    return [weight]


@_view("dynamic_slice")
def _dynamic_slice(ctx, eqn, values):
    weight, starts = _one(values[0]), values[1:]
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size != weight.shape[axis]:
            weight = cut(weight, axis, SideOp.dynamic_slice(0, size), start)
    return [weight]


@_view("split")
def _split(ctx, eqn, values):
    axis, start, parts = eqn.params["axis"], 0, []
    for size in map(int, eqn.params["sizes"]):
        parts.append(_sliced(_one(values[0]), axis, start, start + size))
        start += size
    return parts


@_view("rev")
def _reverse(ctx, eqn, values):
    weight = _one(values[0])
    for axis in eqn.params["dimensions"]:
        weight = cut(weight, axis, SideOp.reverse((0,)))
    return [weight]


# Several


def inserted(weight: Factored, axis: int, size: int = 1) -> Factored:
    """The weight with a new axis, on which it does not depend."""
    return weight.replace(axes=(*weight.axes[:axis], -size, *weight.axes[axis:]))


@_view("concatenate")
def _concatenate(ctx, eqn, values):
    axis = eqn.params["dimension"]
    weights = [v for v in values if is_value(v)]
    if any(isinstance(w, Split) and w.axis != axis for w in weights):
        raise Unhandled("weights are concatenated along two axes")
    roles = {
        part.role(axis)
        for w in weights
        for part in (w.parts if isinstance(w, Split) else (w,))
        if isinstance(part, Factored)
    }
    if roles <= {"b", "new"}:
        return [_stacked(values, axis)]
    if len(roles) > 1:
        raise Unhandled("weights are concatenated along an axis that is an input of one and an output of another")
    return [Split(tuple(p for v in values for p in (v.parts if isinstance(v, Split) else (v,))), axis)]


@_view("stack")
def _stack(ctx, eqn, values):
    axis = eqn.params["axis"]
    if not all(isinstance(v, Factored) for v in values):
        raise Unhandled("a stack holds adapted weights only, or none")
    return [_stacked([inserted(weight, axis) for weight in values], axis)]


def _stacked(weights: Sequence[Value], axis: int) -> Factored:
    """Weights of one kind in a row, along a stack axis of each or a new one."""
    if not all(isinstance(w, Factored) for w in weights):
        raise Unhandled("a stack holds adapted weights only, or none")
    weights = [_as_stack(w, axis) for w in weights]
    first = weights[0]
    if any(w.axes != first.axes for w in weights):
        raise Unhandled("weights are stacked only in the same order of axes")
    paths = tuple(dict.fromkeys(path for w in weights for path in w.paths))
    rows = [w.replace(paths=paths) for w in _of_one_kind(weights)]
    if len({jax.tree.structure(row) for row in rows}) > 1:
        raise Unhandled("weights of several kinds (quantized and dense, DoRA and plain) are not stacked")
    at = first.axes[axis]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=at), *rows)


def _as_stack(weight: Factored, axis: int) -> Factored:
    """The weight with a new axis of size 1 as its first stack axis in truth."""
    if weight.role(axis) != "new":
        return weight
    if weight.shape[axis] != 1:
        raise Unhandled("weights are stacked one by one, not in repetitions")
    grown = weight.arrays_along_stack(lambda x: x[None])
    return grown.replace(axes=tuple(0 if k == axis else c + (c >= 0) for k, c in enumerate(weight.axes)))


def _of_one_kind(weights: Sequence[Factored]) -> list[Factored]:
    """The same weights with equal ranks and scalings: zeros pad the smaller factors, and B takes scalings that differ."""
    first = weights[0]
    if any(len(w.factors) != len(first.factors) for w in weights):
        raise Unhandled("weights of several kinds (with and without an adapter or a residual) are not stacked")
    if any(w.scale is not None for w in weights):
        ones = [w.scale if w.scale is not None else jnp.float32(1.0) for w in weights]
        weights = [w.replace(scale=jnp.broadcast_to(s, w.stack)) for w, s in zip(weights, ones, strict=True)]
    lead = len(first.stack)
    for k in range(len(first.factors)):
        rank = max(w.factors[k][0].shape[-1] for w in weights)
        alike = len({w.scalings[k] for w in weights}) == 1
        if alike and all(w.factors[k][0].shape[-1] == rank for w in weights):
            continue
        weights = [_padded(w, k, rank, lead, alike) for w in weights]
    return list(weights)


def _padded(weight: Factored, k: int, rank: int, lead: int, keep_scaling: bool) -> Factored:
    a, b = weight.factors[k]
    more, scaling = rank - a.shape[-1], weight.scalings[k]
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
    b = jnp.pad(b, [(0, more if axis == lead else 0) for axis in range(b.ndim)])
    pair, one = (a, b if keep_scaling else scaling * b), scaling if keep_scaling else 1.0
    factors, scalings = list(weight.factors), list(weight.scalings)
    factors[k], scalings[k] = pair, one
    return weight.replace(factors=tuple(factors), scalings=tuple(scalings))


def rows(weight: Factored) -> Factored:
    """A weight whose axis 0 is a stack axis, prepared for `scan`: every child starts with that axis, and the static fields
    are those of one row.

    Raises:
        Unhandled: when axis 0 is no stack axis.
    """
    if weight.role(0) != "b":
        raise Unhandled(f"a scan goes over a stack of weights; axis 0 of this one is an {_WORDS[weight.role(0)]} axis")
    c = weight.axes[0]
    moved = weight.arrays_along_stack(lambda x: jnp.moveaxis(x, c, 0) if c else x)
    return moved.replace(axes=tuple(a - (a > c >= 0) for a in weight.axes[1:]))
