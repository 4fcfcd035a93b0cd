"""How the adapter is trained: how long, by which steps."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import optax

from jlora._numbers import MAX_COUNT, check_seed
from jlora._typing import Json, JsonObject, PyTree
from jlora.runs.flags.checks import counts
from jlora.train.optimizers import OPTIMIZERS, SETTINGS, OptimizerName, idle_settings, make_optimizer
from jlora.train.schedules import SCHEDULES, ScheduleName, make_schedule

WARMUP_FRACTION = 0.03
DECAY_FRACTION = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """How the adapter is trained: how long, by which steps."""

    epochs: float | None = None
    """Passes over the data; default 3 where --steps is not given."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    batch_size: int = 8
    """Records in a micro-batch, short ones together in a row; of raw text and with --pack, rows."""
    accumulate: int = 1
    """Micro-batches in a step."""
    optimizer: OptimizerName = "adamw"
    """optax's. muon: for the matrices, and AdamW for what else is trained. schedule_free_adamw: of an average of its steps, which
    is what is evaluated and saved. adamw8bit: AdamW whose moments are bitsandbytes' 8-bit codes, a quarter of their memory."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: ScheduleName | None = None
    """How the rate goes on after the warm-up: constant; or falling to the end of the run, linear, cosine, or wsd, in its last
    steps alone; or with the inverse square root of the step. Default: cosine; constant for schedule_free_adamw."""
    warmup_fraction: float | None = None
    """Share of the steps in which the rate rises linearly; default 0.03 where --warmup-steps is not given."""
    warmup_steps: int | None = None
    """Steps in which it rises, instead of --warmup-fraction; 0: none."""
    min_learning_rate: float = 0.0
    """The rate at the end of linear, cosine and wsd."""
    decay_fraction: float | None = None
    """Share of the steps in which wsd falls; default 0.1."""
    weight_decay: float = 0.0
    """Decay of matrices a step, times the learning rate (sgd: added to the gradient). Biases, norms and DoRA's magnitudes have
    none."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    beta1: float | None = None
    """Decay of the average of gradients, of adamw, lion, muon, schedule_free_adamw and adamw8bit; default 0.9."""
    beta2: float | None = None
    """Decay of the average of squared gradients; default 0.999. lion: of the average of gradients, 0.99."""
    momentum: float | None = None
    """Decay of the average of gradients of muon, default 0.95, and sgd, and of adafactor's of updates; default 0: none."""
    lora_plus_ratio: float | None = None
    """LoRA+: the learning rate of lora_B over that of lora_A, such as 16; default: one rate."""
    neftune_alpha: float = 0.0
    """NEFTune: noise on the input embeddings in training, at most alpha / sqrt(tokens * width), such as 5; 0: none."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the vocabulary; evaluation is without."""
    seed: int = 0
    """Of initialization, data order and dropout."""

    def problems(self) -> Iterator[str]:
        yield from counts(self, "batch_size", "accumulate", "steps")
        if self.steps is not None and self.epochs is not None:
            yield f"`steps` and `epochs` exclude each other; got steps={self.steps} and epochs={self.epochs}."
        if self.epochs is not None and not 0 < self.epochs <= MAX_COUNT:
            yield f"`epochs` must be positive; got {self.epochs}. At most {MAX_COUNT}."
        if not 0 < self.learning_rate < math.inf:
            yield f"`learning_rate` must be positive; got {self.learning_rate}. It is finite; LoRA runs use 1e-4 to 1e-3."
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in (*known, None):
                yield f"`{name}` must be one of {', '.join(known)}; got {getattr(self, name)!r}."
                return
        yield from self._problems_of_the_schedule()
        for name in ("weight_decay", "max_grad_norm", "neftune_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"`{name}` must be 0 or positive; got {getattr(self, name)}."
        if not 0 <= self.label_smoothing < 1:
            yield f"`label_smoothing` must be in [0, 1); got {self.label_smoothing}."
        if self.lora_plus_ratio is not None and not 0 < self.lora_plus_ratio < math.inf:
            yield f"`lora_plus_ratio` must be positive; got {self.lora_plus_ratio}. The paper's is 16."
        yield from idle_settings(self.optimizer, {name: getattr(self, name) for name in SETTINGS})
        for name in SETTINGS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                yield f"`{name}` must be in [0, 1); got {value}."
        try:
            check_seed(self.seed)
        except ValueError as error:
            yield str(error)

    def _problems_of_the_schedule(self) -> Iterator[str]:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            yield (
                f"`warmup_steps` and `warmup_fraction` exclude each other; got {self.warmup_steps} and {self.warmup_fraction}."
            )
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            yield f"`warmup_fraction` must be in [0, 1); got {self.warmup_fraction}."
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= MAX_COUNT:
            yield f"`warmup_steps` must be 0 or positive; got {self.warmup_steps}. At most {MAX_COUNT}."
        curve = SCHEDULES[self._schedule]
        if not OPTIMIZERS[self.optimizer].falls and self._schedule != "constant":
            yield (
                f"`schedule` must be constant with {self.optimizer}, whose average takes the place of a falling rate; got "
                f"{self.schedule!r}. Leave it out."
            )
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            yield f"`min_learning_rate` must be in [0, `learning_rate`]; got {self.min_learning_rate} and {self.learning_rate}."
        elif self.min_learning_rate and not curve.floor:
            falling = ", ".join(name for name, other in SCHEDULES.items() if other.floor)
            yield (
                f"`min_learning_rate` has no effect on the schedule {self._schedule}; got {self.min_learning_rate}. Leave it "
                f"out, or choose one of {falling}."
            )
        if self.decay_fraction is not None and not curve.decay:
            yield (
                f"`decay_fraction` has no effect on the schedule {self._schedule}; got {self.decay_fraction}. Leave it out, or "
                "choose wsd."
            )
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            yield f"`decay_fraction` must be in (0, 1]; got {self.decay_fraction}."

    @property
    def _schedule(self) -> ScheduleName:
        return self.schedule or _curve_of(self.optimizer)

    def rates(self, steps: int) -> optax.Schedule:
        """The learning rate of each step of a run.

        Raises:
            ValueError: when the run is over before the warm-up is.
        """
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            fraction = WARMUP_FRACTION if self.warmup_fraction is None else self.warmup_fraction
            warmup_steps = math.ceil(fraction * steps)
        elif warmup_steps >= steps:
            raise ValueError(f"`warmup_steps` must be less than the {steps} steps of the run; got {warmup_steps}.")
        return make_schedule(
            self._schedule,
            peak=self.learning_rate,
            steps=steps,
            warmup_steps=warmup_steps,
            floor=self.min_learning_rate,
            decay_fraction=DECAY_FRACTION if self.decay_fraction is None else self.decay_fraction,
        )

    def transformation(self, adapter: PyTree, rates: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The optimizer of `adapter`, arrays or their shapes."""
        return make_optimizer(
            self.optimizer,
            rates,
            adapter,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lora_plus_ratio=self.lora_plus_ratio,
            **{name: getattr(self, name) for name in SETTINGS},
        )


def _curve_of(optimizer: str) -> ScheduleName:
    return "cosine" if OPTIMIZERS[optimizer].falls else "constant"


def resolved(fields: Mapping[str, Json]) -> JsonObject:
    """A run's settings with what those count as that are not given: a run that names a default is the same run."""
    optimizer = fields.get("optimizer")
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
        return dict(fields)
    own = {**OPTIMIZERS[optimizer].defaults, "schedule": _curve_of(optimizer)}
    if fields.get("warmup_steps") is None:
        own["warmup_fraction"] = WARMUP_FRACTION
    return dict(fields) | {name: value for name, value in own.items() if fields.get(name) is None}
