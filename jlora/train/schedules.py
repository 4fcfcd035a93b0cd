"""Learning rates over a run: a linear warm-up, then one of these curves.

They are transformers' (`get_scheduler`), one step ahead: the rate of the n-th step is theirs of the (n + 1)-th with one more step
of warm-up, since a first step at rate 0 would be a wasted batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax

ScheduleName = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


class After(NamedTuple):
    """What the curve after the warm-up goes by."""

    peak: float
    floor: float
    """The rate that it ends at, where it falls to one."""
    steps: int
    """From the end of the warm-up to the end of the run, at least 1."""
    warmup_steps: int
    decay_steps: int
    """Those at the end in which wsd falls."""


def _cosine(after: After) -> optax.Schedule:
    return optax.cosine_decay_schedule(after.peak, after.steps, alpha=after.floor / after.peak)


def _wsd(after: After) -> optax.Schedule:
    falling = min(after.decay_steps, after.steps)
    fall = optax.cosine_decay_schedule(after.peak, max(falling, 1), alpha=after.floor / after.peak)
    return optax.join_schedules([optax.constant_schedule(after.peak), fall], [after.steps - falling])


_TIMESCALE = 10_000
"""Of inverse_sqrt without warm-up: `get_inverse_sqrt_schedule`'s."""


def _inverse_sqrt(after: After) -> optax.Schedule:
    scale = after.warmup_steps + 1 if after.warmup_steps else _TIMESCALE
    return lambda count: after.peak / jnp.sqrt((count + scale) / scale)


class Curve(NamedTuple):
    make: Callable[[After], optax.Schedule]
    floor: bool = False
    """Whether it falls to `floor`."""
    decay: bool = False
    """Whether it falls in the last `decay_steps` alone."""


SCHEDULES: Mapping[ScheduleName, Curve] = {
    "constant": Curve(lambda after: optax.constant_schedule(after.peak)),
    "linear": Curve(lambda after: optax.linear_schedule(after.peak, after.floor, after.steps), floor=True),
    "cosine": Curve(_cosine, floor=True),
    "wsd": Curve(_wsd, floor=True, decay=True),
    "inverse_sqrt": Curve(_inverse_sqrt),
}
"""wsd: warm-up, stable, decay (Hu et al., MiniCPM, 2024, arXiv:2404.06395, section 4), the decay a cosine as in transformers."""


def make_schedule(
    name: ScheduleName, *, peak: float, steps: int, warmup_steps: int, floor: float = 0.0, decay_fraction: float = 0.0
) -> optax.Schedule:
    """0 to `peak` over `warmup_steps`, then the named curve up to `steps`. The first step's rate is not 0.

    Args:
        floor: the rate at `steps` of linear, cosine and wsd.
        decay_fraction: the share of the steps in which wsd falls.
    """
    after = After(peak, floor, max(steps - warmup_steps, 1), warmup_steps, math.ceil(decay_fraction * steps))
    curve = SCHEDULES[name].make(after)
    if warmup_steps == 0:
        return curve
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, curve], [warmup_steps])


def warmup_cosine(*, peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """`make_schedule` of a cosine down to 0."""
    return make_schedule("cosine", peak=peak, steps=steps, warmup_steps=warmup_steps)
