"""Recursion rules: calls, loops, branches and rematerialization are entered, and emitted again around what is inside.

Weights cross them as the pytrees they are. Each rule takes (context, equation, values, which results are needed) and
returns the results, None where one is not needed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from jlora._typing import JsonObject
from jlora.weight import EINSUM
from jlora.wrapping.consumers import Dims, multiply
from jlora.wrapping.liveness import live_carry, scan_counts
from jlora.wrapping.values import Factored, Unhandled, Value, is_value
from jlora.wrapping.views import barred, constrained, rows, specs

if TYPE_CHECKING:
    from jlora.wrapping.interpreter import Context


Rule = Callable[..., list[Value]]
CONTROL: dict[str, Rule] = {}


def _control(*names: str) -> Callable[[Rule], Rule]:
    def register(rule):
        CONTROL.update({name: rule for name in names})
        return rule

    return register


def _merge(live: Sequence[bool], results: Sequence[Value]) -> list[Value]:
    """The needed results at their places."""
    given = iter(results)
    return [next(given) if is_live else None for is_live in live]


def _inner(
    ctx: "Context", eqn: JaxprEqn, name: str, live: Sequence[bool], key: str = "jaxpr"
) -> Callable[..., list[Value]]:
    """The body of an equation as a function of values, which returns what is needed of its results."""
    body = eqn.params[key]
    jaxpr, consts = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
    inside = ctx.inside(name, eqn)

    def run(*values):
        results = inside.interpret(jaxpr, consts, values, live)
        return [r for r, is_live in zip(results, live, strict=True) if is_live]

    return run


# Calls


@_control("jit", "pjit")
def _jit(ctx, eqn, values, live):
    run = _inner(ctx, eqn, "jit", live)
    if eqn.params.get("inline"):
        return _merge(live, run(*values))
    run.__name__ = run.__qualname__ = eqn.params["name"]
    given = [s if isinstance(s, jax.sharding.Sharding) else None for s in eqn.params["in_shardings"]]
    values = [constrained(v, s) if isinstance(v, Factored) and s else v for v, s in zip(values, given, strict=True)]
    plain = [None if is_value(v) else s for v, s in zip(values, given, strict=True)]
    options: JsonObject = {"in_shardings": tuple(plain)} if any(s is not None for s in plain) else {}
    results = jax.jit(run, **options)(*values)
    outs = [s for s, is_live in zip(eqn.params["out_shardings"], live, strict=True) if is_live]
    results = [
        lax.with_sharding_constraint(r, s) if isinstance(s, jax.sharding.Sharding) and not is_value(r) else r
        for r, s in zip(results, outs, strict=True)
    ]
    return _merge(live, results)


@_control("closed_call", "core_call")
def _call(ctx, eqn, values, live):
    key = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
    return _merge(live, _inner(ctx, eqn, "call", live, key)(*values))


@_control("custom_jvp_call")
def _custom_jvp(ctx, eqn, values, live):
    # The rule was written for arrays; the definition it belongs to is differentiated instead.
    return _merge(live, _inner(ctx, eqn, "custom_jvp", live, "call_jaxpr")(*values))


@_control("custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom_vjp(ctx, eqn, values, live):
    key = "call_jaxpr" if "call_jaxpr" in eqn.params else "fun_jaxpr"
    body = eqn.params[key].jaxpr
    if _is_own_einsum(body):
        # `jlora.linear` of what its caller took for an array: the weight's own product.
        numbers = _dimension_numbers(body)
        if numbers is not None and sum(map(is_value, values)) == 1:
            weight_first = is_value(values[0])
            weight, x = values if weight_first else values[::-1]
            return [multiply(ctx, eqn, x, weight, Dims.of(numbers, weight_first), None, eqn.outvars[0].aval.dtype)]
        return _merge(live, _inner(ctx, eqn, "custom_vjp", live, key)(*values))
    if ctx.custom_vjp != "inline":
        raise Unhandled(
            'a `custom_vjp` would lose its rule; `wrap(fn, custom_vjp="inline")` differentiates its definition'
        )
    return _merge(live, _inner(ctx, eqn, "custom_vjp", live, key)(*values))


def _is_own_einsum(body: Jaxpr) -> bool:
    return bool(body.eqns) and all(EINSUM in str(eqn.source_info.name_stack) for eqn in body.eqns)


def _dimension_numbers(body: Jaxpr) -> Value:
    """Those of the one product of a body that has nothing else but casts, of its operands as they come."""
    names = [eqn.primitive.name for eqn in body.eqns]
    if sorted(set(names) - {"convert_element_type"}) != ["dot_general"] or names.count("dot_general") != 1:
        return None
    (product,) = (eqn for eqn in body.eqns if eqn.primitive.name == "dot_general")
    cast_from = {eqn.outvars[0]: eqn.invars[0] for eqn in body.eqns if eqn is not product}
    operands = [cast_from[var] if isinstance(var, Var) and var in cast_from else var for var in product.invars]
    return product.params["dimension_numbers"] if operands == list(body.invars) else None


@_control("remat2", "remat", "checkpoint")
def _remat(ctx, eqn, values, live):
    run, params = _inner(ctx, eqn, "remat", live), eqn.params
    if params["differentiated"]:
        # Inside a gradient that the program itself takes: what is left of a checkpoint there is the barrier before it.
        return _merge(live, run(*(barred(values) if params["prevent_cse"] else values)))
    return _merge(live, jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(*values))


# Loops and branches


def _unchanged(jaxpr: Jaxpr, first: int, carry: int) -> list[bool]:
    """Which carried values a body gives back as it got them; its carried inputs start at `first`."""
    return [jaxpr.outvars[k] is jaxpr.invars[first + k] for k in range(carry)]


def _hoisted(ctx, eqn, carried: Sequence[Value], unchanged: Sequence[bool]) -> tuple[list[Value], list[bool]]:
    """Carried values, those that change made plain; and which are weights, constants in truth."""
    fixed = [is_value(v) and same for v, same in zip(carried, unchanged, strict=True)]
    reason = "a weight in a carry that changes"
    return [v if keep else ctx.plain(eqn, v, reason) for v, keep in zip(carried, fixed, strict=True)], fixed


@_control("scan")
def _scan(ctx, eqn, values, live):
    body = eqn.params["jaxpr"]
    n_consts, n_carry = scan_counts(eqn)
    consts, xs = values[:n_consts], list(values[n_consts + n_carry :])
    carried, fixed = _hoisted(
        ctx, eqn, values[n_consts : n_consts + n_carry], _unchanged(body.jaxpr, n_consts, n_carry)
    )
    kept = live_carry(eqn, live)
    loops = [is_kept and not is_fixed for is_kept, is_fixed in zip(kept, fixed, strict=True)]
    every: dict[int, Value] = {}  # weights that do not depend on the iteration, though they are scanned over
    for k, x in enumerate(xs):
        if isinstance(x, Factored) and x.role(0) == "new":
            every[k], xs[k] = x.replace(axes=x.axes[1:]), None
        elif is_value(x):
            xs[k] = ctx.attempt(eqn, x, rows)
    inside, ys_live = ctx.inside("scan", eqn), list(live[n_carry:])

    def step(carry, xs):
        state = [v if is_fixed else None for v, is_fixed in zip(carried, fixed, strict=True)]
        for k, value in zip([k for k, is_loop in enumerate(loops) if is_loop], carry, strict=True):
            state[k] = value
        inputs = [*consts, *state, *(every.get(k, x) for k, x in enumerate(xs))]
        results = inside.interpret(body.jaxpr, body.consts, inputs, [*loops, *ys_live])
        plain = [inside.plain(eqn, r, "a weight as a result of a scan's body") for r in results]
        return [r for r, is_loop in zip(plain[:n_carry], loops, strict=True) if is_loop], plain[n_carry:]

    options = {
        name: eqn.params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in eqn.params
    }
    init = [v for v, is_loop in zip(carried, loops, strict=True) if is_loop]
    last, ys = lax.scan(step, init, xs, **options)
    done = iter(last)
    final = [
        next(done) if is_loop else (v if is_fixed else None)
        for v, is_loop, is_fixed in zip(carried, loops, fixed, strict=True)
    ]
    return [*final, *ys]


@_control("while")
def _while(ctx, eqn, values, live):
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, start = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    carried, fixed = _hoisted(ctx, eqn, start, _unchanged(body.jaxpr, n_body, len(start)))
    inside = ctx.inside("while", eqn)

    def filled(carry):
        given = iter(carry)
        return [v if is_fixed else next(given) for v, is_fixed in zip(carried, fixed, strict=True)]

    def proceed(carry):
        return inside.interpret(cond.jaxpr, cond.consts, [*cond_consts, *filled(carry)], [True])[0]

    def step(carry):
        wanted = [not is_fixed for is_fixed in fixed]
        results = inside.interpret(body.jaxpr, body.consts, [*body_consts, *filled(carry)], wanted)
        changed = (r for r, is_wanted in zip(results, wanted, strict=True) if is_wanted)
        return [inside.plain(eqn, r, "a weight in a carry that changes") for r in changed]

    init = [v for v, is_fixed in zip(carried, fixed, strict=True) if not is_fixed]
    return filled(lax.while_loop(proceed, step, init))


@_control("cond")
def _cond(ctx, eqn, values, live):
    index, *operands = values
    inside = ctx.inside("cond", eqn)

    def branch(closed):
        def run(*operands):
            results = inside.interpret(closed.jaxpr, closed.consts, operands, live)
            return [inside.plain(eqn, r, "a weight as a result of a branch") for r in results if r is not None]

        return run

    index = ctx.plain(eqn, index, "a branch chosen by a weight")
    return _merge(live, lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *operands))


# Devices


@_control("shard_map")
def _shard_map(ctx, eqn, values, live):
    params = eqn.params
    if "in_specs" not in params:
        raise Unhandled("`shard_map` of a jax older than 0.7")
    in_specs = [_shard_specs(v, spec) for v, spec in zip(values, params["in_specs"], strict=True)]
    run = _inner(ctx, eqn, "shard_map", live)

    def local(*values):
        return run(*(_local(v) for v in values))

    names = params.get("newly_manual_axes", params.get("manual_axes"))
    results = jax.shard_map(
        local,
        mesh=params["mesh"],
        in_specs=tuple(in_specs),
        out_specs=[s for s, is_live in zip(params["out_specs"], live, strict=True) if is_live],
        check_vma=params["check_vma"],
        **({"axis_names": set(names)} if names else {}),
    )(*values)
    return _merge(live, results)


def _shard_specs(value: Value, spec: jax.sharding.PartitionSpec) -> Value:
    """Partition specs of a value's children: A follows the in-axes, B the out-axes, the rank is whole."""
    if not isinstance(value, Factored):
        if is_value(value):
            raise Unhandled("concatenated weights in a `shard_map`")
        return spec
    by_axis = specs(value, spec)
    sharded = any(part is not None for part in spec)
    if sharded and (not isinstance(value.base, jax.Array) or value.magnitude is not None):
        raise Unhandled("in a `shard_map`, quantized weights and DoRA's are whole on every device: their spec is P()")
    whole = jax.sharding.PartitionSpec()
    placed = jax.tree.map(lambda _: whole, value)
    if isinstance(value.base, jax.Array):
        placed = placed.replace(
            base=by_axis["base"], factors=tuple((by_axis["A"], by_axis["B"]) for _ in value.factors)
        )
    return placed


def _local(value: Value) -> Value:
    """A weight as one device sees it: the sizes of its sides are those of its own children."""
    if not isinstance(value, Factored) or not isinstance(value.base, jax.Array):
        return value
    lead, middle = len(value.stack), len(value.stack) + len(value.ins)
    return value.replace(ins=value.base.shape[lead:middle], outs=value.base.shape[middle:])
