"""What became of every weight: the table that `check` prints and errors quote."""

import dataclasses
import json
import os
import sys
from collections import Counter

from jax.extend.core import JaxprEqn

UNHANDLED, MATERIALIZED, UNUSED, RETURNED = "UNHANDLED", "materialized", "UNUSED", "returned"


class UnhandledUse(ValueError):
    """An operation without a rule touches an adapted or quantized weight, under the policy "error"."""


class UnusedTarget(ValueError):
    """An adapted weight has no factored use: its adapter would not train, or not matter."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one leaf."""

    leaf: str
    primitive: str
    status: str
    """"factored", "factored(T)" (contracted over its outputs), "materialized", "UNHANDLED", "UNUSED", or a remark."""
    where: str
    """File and line of the user's code."""
    nesting: str
    """Calls and loops around it, outermost first."""
    nbytes: int
    """Bytes of the dense array that a materialization would form."""
    reason: str = ""
    """Why it is not factored."""

    @property
    def is_factored(self) -> bool:
        return self.status.startswith("factored")


@dataclasses.dataclass(frozen=True)
class Report:
    """One row for each use of each wrapped leaf."""

    uses: tuple[Use, ...]
    adapted: tuple[str, ...]
    """Leaves that must have a factored use."""
    named: frozenset[str] = frozenset()
    """Leaves whose materialization a policy named."""

    @property
    def unhandled(self) -> tuple[Use, ...]:
        return tuple(use for use in self.uses if use.status == UNHANDLED)

    @property
    def materialized(self) -> tuple[Use, ...]:
        return tuple(use for use in self.uses if use.status == MATERIALIZED)

    @property
    def unused(self) -> tuple[str, ...]:
        """Adapted leaves without a factored use."""
        served = {use.leaf for use in self.uses if use.is_factored or use.status == RETURNED}
        served |= {use.leaf for use in self.materialized if use.leaf in self.named}
        return tuple(leaf for leaf in self.adapted if leaf not in served)

    @property
    def ok(self) -> bool:
        """Whether the function can be called."""
        return not self.unhandled and not self.unused

    def totals(self) -> dict[str, int]:
        return {
            "leaves": len({use.leaf for use in self.uses}),
            "factored": sum(use.is_factored for use in self.uses),
            "materialized": len(self.materialized),
            "materialized_bytes": sum(use.nbytes for use in self.materialized),
            "unhandled": len(self.unhandled),
            "unused": len(self.unused),
        }

    def to_json(self) -> str:
        rows = [dataclasses.asdict(use) for use in self.uses]
        return json.dumps({"ok": self.ok, "totals": self.totals(), "uses": rows}, indent=1)

    def raise_if_not_ok(self) -> None:
        """Raises:
        UnhandledUse: listing every use without a rule.
        UnusedTarget: listing every adapted leaf without a factored use.
        """
        if self.unhandled:
            sites = "\n  ".join(
                f"{use.leaf}: {use.primitive} at {use.where}{f' in {use.nesting}' if use.nesting else ''} "
                f"({_size(use.nbytes)} if formed): {use.reason}"
                for use in self.unhandled
            )
            raise UnhandledUse(
                f"`jlora.wrap` has no rule that keeps these weights factored:\n  {sites}\nChange these lines, leave the leaves "
                'out of the adapter, or form them: `wrap(fn, on_unhandled="warn")`, or {path: "materialize"} for single leaves.'
            )
        if self.unused:
            seen = Counter(use.leaf for use in self.materialized)
            listed = ", ".join(f"{leaf}{' (materialized only)' * bool(seen[leaf])}" for leaf in self.unused)
            raise UnusedTarget(
                f"No product, convolution or lookup uses these adapted leaves: {listed}. Take them out of `targets`, or look for "
                "results that are thrown away; one that is only formed is allowed by name, "
                f'`wrap(fn, on_unhandled={{{self.unused[0]!r}: "materialize"}})`.'
            )

    def __str__(self) -> str:
        totals = self.totals()
        head = (
            f"{totals['leaves']} leaves, {totals['factored']} factored uses, {totals['materialized']} materialized "
            f"({_size(totals['materialized_bytes'])}), {totals['unhandled']} unhandled, {totals['unused']} unused"
        )
        columns = [("leaf", "primitive", "status", "where", "nesting", "bytes if materialized")]
        for use in self.uses:
            columns.append((use.leaf, use.primitive, use.status, use.where, use.nesting or "-", _size(use.nbytes)))
        widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in columns
        )
        return "\n".join((head, *lines))


def _size(nbytes: int) -> str:
    if nbytes == 0:
        return "-"
    power = min(int(nbytes).bit_length() - 1, 30) // 10
    return f"{nbytes / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


_OWN = ("wrapping", "weight", "lora")
_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "haiku", "contextlib", "functools")


def where(eqn: JaxprEqn) -> str:
    """ "file.py:41", the innermost line of an equation's traceback that is not of JAX, a layer library or `jlora.linear`, if
    there is one."""
    traceback = eqn.source_info.traceback
    if traceback is None:
        return ""
    package = os.path.dirname(os.path.dirname(__file__))
    skipped = [os.path.join(package, room, "") for room in _OWN]
    for name in _LIBRARIES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            skipped.append(os.path.dirname(file) + os.sep if file.endswith("__init__.py") else file)
    for frame in traceback.frames:
        if not frame.file_name.startswith((*skipped, "<")):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""
