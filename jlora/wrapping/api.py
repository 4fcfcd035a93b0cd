"""`jlora.wrap(fn)`: the same function, for arguments that may be adapted or quantized."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr

from jlora._typing import PyTree
from jlora.tree.paths import is_weight, path_string
from jlora.weight import is_adapted
from jlora.wrapping.interpreter import Context, Recorder, policy_of
from jlora.wrapping.liveness import needed
from jlora.wrapping.report import RETURNED, UNUSED, Report, Use
from jlora.wrapping.values import Value, factored, stays_factored

P = ParamSpec("P")
R = TypeVar("R")


def wrap(
    fn: Callable[P, R], *, on_unhandled: str | Mapping[str, str] = "error", custom_vjp: str = "error"
) -> "Wrapped[P, R]":
    """`fn` with the same signature, whose arguments may hold `LoraWeight`, `FullWeight` and quantized leaves.

    `fn` is traced on the dense arrays that they stand for, and its jaxpr evaluated with rules that keep `base + scaling *
    lora_A @ lora_B` apart until a product, a convolution or a lookup uses it: casts, transposes, reshapes of one side,
    slices, scalar factors, `jit`, `scan`, `while`, `cond`, `checkpoint` and `shard_map` in between change nothing. Works
    under `jit`, `grad`, `vmap` and the rest from outside. Without such leaves `fn` is called as it is.

    Weights must be arguments: what `fn` closes over is no weight. Only arrays are traced; other leaves (flags,
    strings, functions) reach `fn` as they are. A dropout key (`with_dropout`) gives a leaf one mask, at each of its uses.

    Args:
        fn: any function of pytrees.
        on_unhandled: what to do where an operation without a rule touches a weight (`w.sum()`, `w1 @ w2`): "error" raises
            before anything is computed; "warn" forms the dense array, which is right but costs its memory, and warns;
            "materialize" forms it in silence. {path pattern: one of these} for single leaves, "error" for the others; a
            pattern is a path ("*" for anything) or the end of one.
        custom_vjp: "error", or "inline" to differentiate the definition of a `custom_vjp` that gets a weight, rather than
            by its rule.

    Returns:
        A callable with `.check(*args)`, which tells what would become of every weight.

    Raises (on a call):
        UnhandledUse: under "error", listing every such use.
        UnusedTarget: when an adapted leaf has no factored use, under every policy, unless a pattern names it.
        TypeError: for kinds of weights that it does not know.

    Example:
        >>> import jlora, jax.numpy as jnp
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"].T
        >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((3, 6))}
        >>> config = jlora.LoraConfig(rank=2, targets=["up", "down"])
        >>> params = jlora.add_lora(params, config, key=jax.random.key(0))
        >>> jlora.wrap(model)(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    if custom_vjp not in ("error", "inline"):
        raise ValueError(f'`custom_vjp` is "error" or "inline"; got {custom_vjp!r}.')
    policy_of(on_unhandled if isinstance(on_unhandled, str) else "error", ())
    return Wrapped(fn, on_unhandled, custom_vjp)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A function rewritten for one kind of arguments."""

    jaxpr: ClosedJaxpr
    """Closed, from all arrays of the arguments to the results that are not arguments themselves."""
    results: tuple[tuple[str, int], ...]
    """Each result: ("argument", its leaf's number) or ("value", its number among the jaxpr's results)."""
    treedef: Any
    report: Report


class Wrapped(Generic[P, R]):
    """What `wrap` returns."""

    def __init__(self, fn: Callable[P, R], on_unhandled: str | Mapping[str, str], custom_vjp: str):
        self._fn, self._on_unhandled, self._custom_vjp = fn, on_unhandled, custom_vjp
        self._plans: dict[Hashable, _Plan] = {}
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_weight)
        if not any(map(is_weight, leaves)):
            return self._fn(*args, **kwargs)
        plan = self._plan(args, kwargs)
        plan.report.raise_if_not_ok()
        arrays = jax.tree.leaves([leaf for leaf in leaves if _is_traced(leaf)])
        run = Context(lambda path: "error", "error", Recorder())
        values = run.interpret(plan.jaxpr.jaxpr, plan.jaxpr.consts, arrays, [True] * len(plan.jaxpr.jaxpr.outvars))
        results = [leaves[number] if kind == "argument" else values[number] for kind, number in plan.results]
        return jax.tree.unflatten(plan.treedef, results)

    def check(self, *args: PyTree, strict: bool = False, **kwargs: PyTree) -> Report:
        """What becomes of every weight in a call with these arguments, which may be `jax.ShapeDtypeStruct`s throughout.
        Nothing is computed or compiled.

        Raises:
            UnhandledUse, UnusedTarget: with `strict`, what the call would raise.
        """
        report = self._plan(args, kwargs).report
        if strict:
            report.raise_if_not_ok()
        return report

    def _plan(self, args: tuple, kwargs: dict[str, PyTree]) -> _Plan:
        key = _signature(args, kwargs)
        if key is not None and key in self._plans:
            return self._plans[key]
        plan = self._rewrite(args, kwargs)
        # A closed-over tracer belongs to one trace; a plan that holds it must not outlive it.
        if key is not None and not any(isinstance(const, Tracer) for const in plan.jaxpr.consts):
            self._plans[key] = plan
        return plan

    def _rewrite(self, args: tuple, kwargs: dict[str, PyTree]) -> _Plan:
        found, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
        leaves = [leaf for _, leaf in found]
        traced = [k for k, leaf in enumerate(leaves) if _is_traced(leaf)]
        paths = {k: _path(self._fn, key_path) for k, (key_path, leaf) in enumerate(found) if is_weight(leaf)}
        for k, path in paths.items():
            stays_factored(leaves[k], path)
        shapes = {}

        def flat(*arrays):
            filled = list(leaves)
            for k, array in zip(traced, arrays, strict=True):
                filled[k] = array
            args, kwargs = jax.tree.unflatten(treedef, filled)
            results, shapes["treedef"] = jax.tree.flatten(self._fn(*args, **kwargs))  # pyright: ignore[reportCallIssue]: of the same tree
            return results

        original = jax.make_jaxpr(flat)(*(_logical(leaves[k]) for k in traced))
        policy, named = policy_of(self._on_unhandled, list(paths.values()))
        recorder = Recorder()
        context = Context(policy, self._custom_vjp, recorder)
        passed = _passed_on(original.jaxpr, traced, leaves)
        live = [kind == "value" for kind, _ in passed]

        def rewritten(weights):
            values = [factored(w, paths[k]) if is_weight(w) else w for k, w in zip(traced, weights, strict=True)]
            results = context.interpret(original.jaxpr, original.consts, values, live)
            changed = "a weight is returned after it was changed"
            return [context.plain(None, r, changed) for r in results if r is not None]

        given = [leaves[k] for k in traced]
        jaxpr = jax.make_jaxpr(rewritten)(given)
        uses = list(recorder.uses.values())
        returned = [traced_leaf for kind, traced_leaf in passed if kind == "argument" and traced_leaf in paths]
        uses += [Use(paths[k], "-", RETURNED, "-", "", 0) for k in returned]
        uses += self._unread(original.jaxpr, live, traced, leaves, paths, uses)
        adapted = tuple(paths[k] for k in paths if is_adapted(leaves[k]))
        count = iter(range(len(jaxpr.jaxpr.outvars)))
        results = tuple((kind, k if kind == "argument" else next(count)) for kind, k in passed)
        report = Report(tuple(sorted(uses, key=lambda use: list(paths.values()).index(use.leaf))), adapted, named)
        return _Plan(jaxpr, results, shapes["treedef"], report)

    def _unread(self, jaxpr, live, traced, leaves, paths, uses) -> list[Use]:
        """Rows for leaves that have no other; a `FullWeight` that is read is an array in use."""
        _, read, _ = needed(jaxpr, live)
        rows, seen = [], {use.leaf for use in uses}
        for k, is_read in zip(traced, read, strict=True):
            if k not in paths or paths[k] in seen:
                continue
            whole = is_read and not stays_factored(leaves[k], paths[k])
            rows.append(Use(paths[k], "-", "factored: a dense array" if whole else UNUSED, "-", "", 0))
        return rows


def _passed_on(jaxpr: Jaxpr, traced: list[int], leaves: list[Value]) -> tuple[tuple[str, int], ...]:
    """Which results are arguments, untouched: they come back as the very leaf."""
    numbers = {var: k for var, k in zip(jaxpr.invars, traced, strict=True)}
    found = []
    for var in jaxpr.outvars:
        number = None if isinstance(var, core.Literal) else numbers.get(var)
        weight = number is not None and is_weight(leaves[number])
        found.append(("argument", number) if weight else ("value", -1))
    return tuple(found)


def _is_traced(leaf: object) -> bool:
    """Arrays and weights; Python scalars, strings and functions stay what they are."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or is_weight(leaf)


def _logical(leaf: PyTree) -> PyTree:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_weight(leaf) else leaf


def _path(fn: Callable, key_path: tuple) -> str:
    """The path of a leaf, from the name of its parameter on."""
    (which, first, *rest) = key_path
    if which.idx == 1:
        return path_string((first, *rest))
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        names = []
    name = names[first.idx] if first.idx < len(names) else str(first.idx)
    return "/".join([name, *([path_string(rest)] if rest else [])])


def _signature(args: tuple, kwargs: dict[str, PyTree]) -> Hashable:
    """What a plan depends on, or None when that cannot be compared."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
    kinds = []
    for leaf in leaves:
        if _is_traced(leaf):
            arrays, structure = jax.tree.flatten(leaf)
            kinds.append((structure, tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in arrays)))
        else:
            kinds.append((type(leaf), leaf))
    settings = (
        jax.config.read("jax_enable_x64"),
        jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]: made by `setattr`
        jax.config.jax_numpy_dtype_promotion,  # pyright: ignore[reportAttributeAccessIssue]
        jax.sharding.get_abstract_mesh(),
        jax.default_backend(),
    )
    key = (treedef, tuple(kinds), settings)
    try:
        hash(key)
    except TypeError:
        return None
    return key
