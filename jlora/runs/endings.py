"""How a run ends other than with its last step, and what is said of it then."""

import math
from collections.abc import Sequence

import jax

from jlora._start import INTERRUPTED
from jlora._typing import PyTree
from jlora.runs.config import FinetuneConfig
from jlora.tree.paths import path_string

AGAIN = 75
"""The exit code of a run that its time limit ended: `EX_TEMPFAIL` of sysexits.h, by which a job script can tell that the same
command with --resume has more to do."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; its state is saved, or it had none."""

    exit_code = INTERRUPTED


class TimeIsUp(Stopped):
    """The time limit of a run ended it; its state is saved."""

    exit_code = AGAIN


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


class OutOfMemory(RuntimeError):
    """The device or the machine has no more memory; says what takes less."""


class CallbackFailed(RuntimeError):
    """A callback raised an error, which is this one's cause."""


def what_stays(saved: int | None, config: FinetuneConfig) -> str:
    """What there is after a run has ended early, and how to go on."""
    if saved is not None:
        return f"the state of step {saved} is saved. Continue with --resume."
    return "no state is saved yet. " + ("Continue with --resume." if config.resume else "Start it again.")


def diverged(
    step: int, loss: float, norm: float, saved: int | None, config: FinetuneConfig, where: str | None = None
) -> str:
    """`where`: the gradients that are not finite, in words."""
    kept = f"The checkpoint of step {saved} is kept." if saved is not None else "No checkpoint was saved before it."
    found = f" ({where})" if where else ""
    return (
        f"Step {step} has loss {loss} and gradient norm {norm}{found}: training has diverged, and the run stops here. {kept} Try "
        f"a lower --learning-rate (it was {config.learning_rate:g}), a longer --warmup-fraction, or --dtype float32."
    )


def not_finite(adapter: PyTree, norms: Sequence[float]) -> str | None:
    """Which gradients of an adapter are not finite, by the norms of its leaves; None where that tells nothing: none or all."""
    names = [path_string(path) for path, _ in jax.tree.leaves_with_path(adapter)]
    wrong = [name for name, norm in zip(names, norms, strict=True) if not math.isfinite(norm)]
    if not wrong or len(wrong) == len(names):
        return None
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"that of {wrong[0]}{more}, of {len(names)}"
