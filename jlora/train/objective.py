"""What the logits of a token are compared with: its successor, all tokens a little (label smoothing), another model's logits."""

import dataclasses

import jax
import jax.numpy as jnp

from jlora._typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Objective:
    """(1 - `teacher_weight`) times the smoothed cross-entropy, and `teacher_weight` times the divergence from a teacher."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary, as transformers' `LabelSmoother` spreads it."""
    teacher_weight: float = 0.0
    temperature: float = 1.0
    """What both logits are divided by where they are compared with each other."""

    def __call__(
        self,
        logits: Float[Array, "tokens vocab"],
        targets: Int[Array, " tokens"],
        teacher: Float[Array, "tokens vocab"] | None,
    ) -> tuple[Float[Array, " tokens"], Float[Array, "tokens vocab"]]:
        """(loss of each token, its gradient with respect to the logits)."""
        loss, gradient = self._cross_entropy(logits, targets)
        if teacher is None:
            return loss, gradient
        divergence, toward = self._divergence(logits, teacher)
        own = 1.0 - self.teacher_weight
        return own * loss + self.teacher_weight * divergence, own * gradient + self.teacher_weight * toward

    def _cross_entropy(self, logits, targets):
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        total = jnp.sum(exp, axis=-1, keepdims=True)
        at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")
        onehot = jnp.arange(logits.shape[-1]) == targets[:, None]
        if smoothing := self.label_smoothing:
            at_target = (1.0 - smoothing) * at_target + smoothing * jnp.mean(logits, axis=-1, keepdims=True)
            onehot = (1.0 - smoothing) * onehot + smoothing / logits.shape[-1]
        return (top + jnp.log(total) - at_target)[:, 0], exp / total - onehot

    def _divergence(self, logits, teacher):
        """T^2 KL(teacher || student) at temperature T, whose gradients are as large at any T (Hinton et al., Distilling the
        Knowledge in a Neural Network, 2015, arXiv:1503.02531, section 2)."""
        ours, theirs = (jax.nn.log_softmax(x / self.temperature) for x in (logits, teacher))
        wanted = jnp.exp(theirs)
        divergence = self.temperature**2 * jnp.sum(wanted * (theirs - ours), axis=-1)
        return divergence, self.temperature * (jnp.exp(ours) - wanted)
