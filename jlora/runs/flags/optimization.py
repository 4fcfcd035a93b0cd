"""How the adapter is trained: how long, by which steps."""

import dataclasses
import math
from collections.abc import Iterator

from jlora._numbers import MAX_COUNT, check_seed
from jlora.runs.flags.checks import counts


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
    learning_rate: float = 2e-4
    """Peak learning rate."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the rate rises linearly; then it falls along a cosine to 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    beta1: float = 0.9
    """Decay of AdamW's average of gradients."""
    beta2: float = 0.999
    """Decay of AdamW's average of squared gradients."""
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
        if not 0 <= self.warmup_fraction < 1:
            yield f"`warmup_fraction` must be in [0, 1); got {self.warmup_fraction}."
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"`{name}` must be 0 or positive; got {getattr(self, name)}."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"`{name}` must be in [0, 1); got {getattr(self, name)}."
        try:
            check_seed(self.seed)
        except ValueError as error:
            yield str(error)
