"""The recipe's optimizer: AdamW after global-norm clipping, linear warm-up and cosine decay."""

import optax


def warmup_cosine(*, peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """0 to `peak` over `warmup_steps`, then a cosine down to 0 at `steps`. The first step's rate is not 0.

    As transformers' `get_cosine_schedule_with_warmup`, one step ahead: a first step at rate 0 would be a wasted batch.
    """
    cosine = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1))
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, max_grad_norm: float, b1: float, b2: float
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with torch's epsilon; `max_grad_norm=0` clips nothing."""
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm > 0 else []
    return optax.chain(*clip, optax.adamw(learning_rate, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay))
