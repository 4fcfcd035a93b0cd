"""A larger model to learn from beside the data."""

import dataclasses
import math
import os
from collections.abc import Iterator

from jlora.models import Model
from jlora.quant import FormatName, Kept
from jlora.train.loss import Teacher

WEIGHT, TEMPERATURE = 0.5, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """A larger model to learn from beside the data."""

    teacher: str | None = None
    """Distill from this model, a directory, hub id or GGUF file with the same vocabulary: its distribution of every supervised
    token is learned too. Evaluation is of the data alone."""
    teacher_weight: float | None = None
    """Share of the loss that is the divergence from it; default 0.5, 1: the data's tokens count for nothing."""
    teacher_temperature: float | None = None
    """What the logits of both are divided by where they are compared; default 1."""
    teacher_quantize: FormatName | Kept | None = None
    """Pack the teacher's linear kernels, as --quantize the model's."""

    def __post_init__(self):
        if isinstance(self.teacher, os.PathLike):
            object.__setattr__(self, "teacher", os.fspath(self.teacher))

    def problems(self) -> Iterator[str]:
        if self.teacher is None:
            for name in ("teacher_weight", "teacher_temperature", "teacher_quantize"):
                if getattr(self, name) is not None:
                    yield f"`{name}` has no effect without `teacher`; got {getattr(self, name)!r}. Leave it out, or give one."
        if self.teacher_weight is not None and not 0 < self.teacher_weight <= 1:
            yield f"`teacher_weight` must be in (0, 1]; got {self.teacher_weight}."
        if self.teacher_temperature is not None and not 0 < self.teacher_temperature < math.inf:
            yield f"`teacher_temperature` must be positive; got {self.teacher_temperature}."

    def taught_by(self, model: Model) -> Teacher:
        """What the loss is told of a teacher."""
        return Teacher(
            model,
            WEIGHT if self.teacher_weight is None else self.teacher_weight,
            TEMPERATURE if self.teacher_temperature is None else self.teacher_temperature,
        )
