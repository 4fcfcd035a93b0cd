"""How a run ends other than with its last step, and what is said of it then."""

from jlora._start import INTERRUPTED
from jlora.runs.config import FinetuneConfig

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


def diverged(step: int, loss: float, norm: float, saved: int | None, config: FinetuneConfig) -> str:
    kept = f"The checkpoint of step {saved} is kept." if saved is not None else "No checkpoint was saved before it."
    return (
        f"Step {step} has loss {loss} and gradient norm {norm}: training has diverged, and the run stops here. {kept} Try "
        f"a lower --learning-rate (it was {config.learning_rate:g}), a longer --warmup-fraction, or --dtype float32."
    )
