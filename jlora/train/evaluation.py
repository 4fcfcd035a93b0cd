"""Token-weighted loss and perplexity over a data set."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax

from jlora._numbers import NotFinite as NotFinite
from jlora._processor import compiler_options
from jlora._typing import Batch, Params
from jlora.models import Model
from jlora.train.loss import causal_lm_loss


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured over how much."""

    loss: float
    """Nats a supervised token: the sum over all batches divided by all tokens."""
    supervised_tokens: int
    batches: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@functools.cache
def _batch_loss():
    """(loss_fn, params, batch) -> what the loss gives; made at the first use, since it depends on the backend."""

    def batch_loss(loss_fn, params, batch):
        return loss_fn(params, batch, None)

    return jax.jit(batch_loss, static_argnames="loss_fn", compiler_options=compiler_options())


def evaluate(model: Model, params: Params, batches: Iterable[Batch]) -> Evaluation:
    """Loss over batches as `causal_lm_loss` takes them, each shape of which is compiled once.

    Raises:
        NotFinite: when the loss is NaN or infinite, a ValueError that names the tensor.
        ValueError: when no token is supervised, or a batch is none that the loss takes.
    """
    loss_fn = causal_lm_loss(model)
    total, tokens, n = 0.0, 0, 0
    for batch in batches:
        loss_fn.check(batch, wait=True)
        loss, supervised = _batch_loss()(loss_fn, params, dict(batch))
        total, tokens, n = total + float(loss), tokens + int(supervised), n + 1
        if not math.isfinite(total):
            raise NotFinite("The loss is", float(loss), params)
    if tokens == 0:
        raise ValueError(
            f"There is nothing to evaluate: {n} batches without a supervised token. Check the data's labels."
        )
    return Evaluation(total / tokens, tokens, n)
