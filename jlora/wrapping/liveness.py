"""Which equations of a jaxpr its results need: a use whose result nobody reads is no use."""

from collections.abc import Sequence

from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


def needed(jaxpr: Jaxpr, live: Sequence[bool]) -> tuple[set[int], list[bool], list[list[bool]]]:
    """What the live results of a jaxpr need.

    Returns:
        the numbers of the equations, whether each input is needed, and for each equation which of its results are.
    """
    wanted = {var for var, is_live in zip(jaxpr.outvars, live, strict=True) if is_live and _is_var(var)}
    equations, results = set(), [[] for _ in jaxpr.eqns]
    for number in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[number]
        out = results[number] = [var in wanted for var in eqn.outvars]
        if not any(out) and not eqn.effects:
            continue
        equations.add(number)
        uses = _uses(eqn, out) if any(out) and not eqn.effects else [True] * len(eqn.invars)
        wanted |= {var for var, used in zip(eqn.invars, uses, strict=True) if used and _is_var(var)}
    return equations, [var in wanted for var in jaxpr.invars], results


def _is_var(atom: Var | Literal) -> bool:
    return not isinstance(atom, core.Literal)


def _uses(eqn: JaxprEqn, live: list[bool]) -> list[bool]:
    """Which operands of an equation its live results need."""
    rule = _RULES.get(eqn.primitive.name)
    return [True] * len(eqn.invars) if rule is None else rule(eqn, live)


def _of_body(eqn, live):
    body = eqn.params["jaxpr"]
    return needed(getattr(body, "jaxpr", body), live)[1]


def _of_cond(eqn, live):
    branches = [needed(branch.jaxpr, live)[1] for branch in eqn.params["branches"]]
    return [True, *(any(uses) for uses in zip(*branches, strict=True))]


def _of_scan(eqn, live):
    consts, carry = scan_counts(eqn)
    uses = needed(eqn.params["jaxpr"].jaxpr, [*live_carry(eqn, live), *live[carry:]])[1]
    return [u or (consts <= k < consts + carry and live[k - consts]) for k, u in enumerate(uses)]


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's operands are constants and how many are carried."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # since jax 0.11
    return len(consts), len(carry)


def live_carry(eqn: JaxprEqn, live: Sequence[bool]) -> list[bool]:
    """Which carried values of a scan matter for its live results, be it in a later iteration."""
    consts, carry = scan_counts(eqn)
    kept = list(live[:carry])
    while True:
        uses = needed(eqn.params["jaxpr"].jaxpr, [*kept, *live[carry:]])[1][consts : consts + carry]
        grown = [a or b for a, b in zip(kept, uses, strict=True)]
        if grown == kept:
            return kept
        kept = grown


_RULES = {name: _of_body for name in ("jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint")}
_RULES |= {"cond": _of_cond, "scan": _of_scan}
