"""Token-weighted loss and perplexity over a data set."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax

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


@functools.partial(jax.jit, static_argnames="model")
def _batch_loss(model, params, batch):
    return causal_lm_loss(model)(params, batch, None)


def evaluate(model: Model, params: Params, batches: Iterable[Batch]) -> Evaluation:
    """Loss over batches of `input_ids` and `labels` (and `segment_ids`), int32 [batch, seq] of one shape.

    Raises:
        ValueError: when no token is supervised.
    """
    total, tokens, n = 0.0, 0, 0
    for batch in batches:
        loss, supervised = _batch_loss(model, params, dict(batch))
        total, tokens, n = total + float(loss), tokens + int(supervised), n + 1
    if tokens == 0:
        raise ValueError(
            f"There is nothing to evaluate: {n} batches without a supervised token. Check the data's labels."
        )
    return Evaluation(total / tokens, tokens, n)
