"""When a run looks at itself and saves its state, and how it is gone on with."""

import dataclasses
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

    resume: bool = False
    """Continue the run in --output from its last checkpoint, to the same result as if it had not stopped."""
    quiet: bool = False
    """Print nothing."""

    def problems(self) -> Iterator[str]:
        yield from counts(self, "keep", "eval_every", "checkpoint_every")
