"""The evaluation of a jaxpr whose inputs may be weights: equations without one are bound as they are."""

import contextlib
import dataclasses
import fnmatch
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jlora._typing import Array
from jlora.wrapping.consumers import CONSUMERS
from jlora.wrapping.control import CONTROL
from jlora.wrapping.liveness import needed
from jlora.wrapping.report import MATERIALIZED, UNHANDLED, Use, where
from jlora.wrapping.values import Factored, Split, Unhandled, Value, is_value, weights_in
from jlora.wrapping.views import VIEWS

POLICIES = ("error", "warn", "materialize")


@dataclasses.dataclass
class Recorder:
    """The uses found so far, each once, though a body may be traced twice."""

    uses: dict[tuple, Use] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
    """What rules need to know: the policy, where they are, and where to write down what they did."""

    policy: Callable[[str], str]
    """Leaf path -> "error", "warn" or "materialize"."""
    custom_vjp: str
    recorder: Recorder
    nesting: tuple[str, ...] = ()
    site: str = "?"
    """The line of the innermost call around."""

    def inside(self, name: str, eqn: JaxprEqn) -> "Context":
        return dataclasses.replace(self, nesting=(*self.nesting, name), site=self.where(eqn))

    def where(self, eqn: JaxprEqn) -> str:
        return where(eqn) or self.site

    def used(self, eqn: JaxprEqn | None, value: Value, status: str, reason: str = "") -> None:
        """Writes down a use by an equation, or by the end of the function where `eqn` is None."""
        primitive, line = ("return", self.site) if eqn is None else (eqn.primitive.name, self.where(eqn))
        for weight in weights_in(value):
            for path in weight.paths:
                use = Use(path, primitive, status, line, ">".join(self.nesting), weight.nbytes, reason)
                self.recorder.uses.setdefault((id(eqn), self.nesting, path, use.is_factored, status), use)

    def dense(self, eqn: JaxprEqn | None, value: Value, reason: str) -> Array:
        """The array that a weight stands for, formed under the policy of its leaf. `eqn`: as in `used`."""
        for weight in weights_in(value):
            policies = [self.policy(path) for path in weight.paths]
            self.used(eqn, weight, UNHANDLED if "error" in policies else MATERIALIZED, reason)
            if "warn" in policies:
                names = ", ".join(weight.paths)
                site = "the end of the function" if eqn is None else f"{eqn.primitive.name} at {self.where(eqn)}"
                warnings.warn(f"{names} is formed ({weight.nbytes} bytes) by {site}: {reason}.", stacklevel=2)
        if isinstance(value, Split):
            parts = [p.materialize() if isinstance(p, Factored) else p for p in value.parts]
            return jax.numpy.concatenate(parts, axis=value.axis)
        return value.materialize()

    def plain(self, eqn: JaxprEqn | None, value: Value, reason: str) -> Value:
        """The value, if a weight then formed."""
        return self.dense(eqn, value, reason) if is_value(value) else value

    def attempt(self, eqn: JaxprEqn | None, value: Value, rule: Callable[[Value], Value]) -> Value:
        """`rule(value)`, or the weight formed where the rule does not cover it."""
        try:
            if isinstance(value, Split):
                raise Unhandled("concatenated weights are scanned over")
            return rule(value)
        except Unhandled as refusal:
            return self.dense(eqn, value, str(refusal))

    def interpret(
        self, jaxpr: Jaxpr, consts: Sequence[Value], values: Sequence[Value], live: Sequence[bool]
    ) -> list[Value]:
        """The results of a jaxpr that are needed, None for the others."""
        env: dict[Var, Value] = {}

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        equations, _, results = needed(jaxpr, live)
        for number, eqn in enumerate(jaxpr.eqns):
            if number in equations:
                inputs = [None if (v := _peek(atom, env)) is _ABSENT else v for atom in eqn.invars]
                with _named(eqn):
                    env.update(zip(eqn.outvars, self._evaluate(eqn, inputs, results[number]), strict=True))
        return [read(var) if is_live else None for var, is_live in zip(jaxpr.outvars, live, strict=True)]

    def _evaluate(self, eqn: JaxprEqn, values: Sequence[Value], live: Sequence[bool]) -> Sequence[Value]:
        if not any(map(is_value, values)):
            return bind(eqn, values)
        name = eqn.primitive.name
        try:
            if name in CONTROL:
                return CONTROL[name](self, eqn, values, live)
            rule = VIEWS.get(name) or CONSUMERS.get(name)
            if rule is None:
                raise Unhandled(f"`{name}` is not linear in a weight, or not known")
            return rule(self, eqn, values)
        except Unhandled as refusal:
            return bind(eqn, [self.plain(eqn, value, str(refusal)) for value in values])


_ABSENT = object()


def _peek(atom: Var | Literal, env: Mapping[Var, Value]) -> Value:
    return atom.val if isinstance(atom, core.Literal) else env.get(atom, _ABSENT)


def bind(eqn: JaxprEqn, values: Sequence[Value]) -> Sequence[Value]:
    """The equation as it is, on arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)  # a tuple before jax 0.10
    result = eqn.primitive.bind(*subfuns, *values, **params)
    return result if eqn.primitive.multiple_results else [result]


@contextlib.contextmanager
def _named(eqn: JaxprEqn):
    """The name scope and the settings under which the equation was traced."""
    name = str(eqn.source_info.name_stack)
    with contextlib.ExitStack() as stack:
        if name:
            stack.enter_context(jax.named_scope(name))
        if eqn.ctx is not None:
            stack.enter_context(eqn.ctx.manager)
        yield


def policy_of(
    on_unhandled: str | Mapping[str, str], paths: Sequence[str]
) -> tuple[Callable[[str], str], frozenset[str]]:
    """(leaf path -> policy, leaves whose materialization is named).

    Raises:
        ValueError: for a word that is no policy, and for a pattern that matches no leaf.
    """
    words = {on_unhandled} if isinstance(on_unhandled, str) else set(on_unhandled.values())
    if not words <= set(POLICIES):
        raise ValueError(
            f"`on_unhandled` is one of {', '.join(map(repr, POLICIES))}, or {{path pattern: one of them}}; got {on_unhandled!r}."
        )
    if isinstance(on_unhandled, str):
        return lambda path: on_unhandled, frozenset()
    dead = [pattern for pattern in on_unhandled if not any(path_matches(pattern, path) for path in paths)]
    if dead:
        raise ValueError(f"`on_unhandled` {dead[0]!r} matches none of the wrapped leaves: {', '.join(paths)}.")

    def policy(path):
        return next((word for pattern, word in on_unhandled.items() if path_matches(pattern, path)), "error")

    return policy, frozenset(path for path in paths if policy(path) != "error")


def path_matches(pattern: str, path: str) -> bool:
    """Whether a pattern, with `*` for anything, is the path or its end."""
    return re.fullmatch(rf"(.*/)?({fnmatch.translate(pattern)})", path) is not None
