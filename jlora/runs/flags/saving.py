"""When a run looks at itself and saves its state, and how it is gone on with."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal

from jlora.runs.flags.checks import counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """When a run looks at itself and saves its state, and how it is gone on with."""

    eval_every: int | None = None
    """Evaluate every so many steps; default: ten times a run. Always before the first step and after the last."""
    checkpoint_every: int | None = None
    """Save the state every so many steps; default: ten times a run, but no oftener than every 25 steps. Always after the last
    step, and when a signal ends the run."""
    keep: int = 2
    """How many of the last checkpoints to keep, besides the best."""
    save: Literal["last", "best"] = "last"
    """Which state becomes OUTPUT/adapter: the last, or that of the lowest evaluation loss."""

    early_stopping_patience: int | None = None
    """End the run after so many evaluations in a row without a better loss than all before; as a run of all its steps ends."""
    early_stopping_threshold: float = 0.0
    """How much lower than the lowest before it a loss must be to count as better."""
    time_limit: str | None = None
    """Save the state and end so early that all is done within this time, such as 55m, 1h30m or 3300 (seconds), from the start of
    the run; exits with 75 and the command to continue."""

    resume: bool = False
    """Continue the run in --output from its last checkpoint, to the same result as if it had not stopped."""
    quiet: bool = False
    """Print nothing."""

    def problems(self) -> Iterator[str]:
        yield from counts(self, "keep", "eval_every", "checkpoint_every", "early_stopping_patience")
        if not 0 <= self.early_stopping_threshold < math.inf:
            yield f"`early_stopping_threshold` must be 0 or positive; got {self.early_stopping_threshold}."
        if self.time_limit is not None and not seconds_of(self.time_limit):
            yield f"`time_limit` must be a time such as 55m, 1h30m, 90s or 3300 (seconds); got {self.time_limit!r}."


def seconds_of(text: str) -> float:
    """Of a time such as "1h30m", "90s" or "3300"; 0: it is none.

    >>> seconds_of("1h30m"), seconds_of("0.5h"), seconds_of("3300"), seconds_of("soon")
    (5400.0, 1800.0, 3300.0, 0.0)
    """
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
    except ValueError:  # two points
        return 0.0
    return sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
