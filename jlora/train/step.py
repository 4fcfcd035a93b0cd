"""One jitted training step: gradient of the adapter alone, accumulated by tokens, applied by optax."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jlora._typing import Array, Batch, Int, Key
from jlora.lora import combine
from jlora.train.loss import LossFn


class TrainState(NamedTuple):
    """Everything a step changes."""

    step: Int[Array, ""]
    """Steps done, int32."""
    adapter: Any
    opt_state: optax.OptState


Step: TypeAlias = Callable[[TrainState, Any, Batch, Key[Array, ""]], tuple[TrainState, dict[str, Array]]]


def init_state(adapter: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. The adapter is copied: steps donate their state, and yours stays usable.

    Raises:
        ValueError: when there is nothing to train.
    """
    if not jax.tree.leaves(adapter):
        raise ValueError("`init_state` got no trainable leaves. Pass the adapter half of `jlora.split(params)`.")
    adapter = jax.tree.map(jnp.copy, adapter)
    return TrainState(jnp.zeros((), jnp.int32), adapter, tx.init(adapter))


def make_step(loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1) -> Step:
    """`step(state, base, batch, key) -> (state, metrics)`, jitted; donates `state`, never `base`.

    The loss is differentiated with respect to `state.adapter`; `base` (the frozen half of `split`, or None for full
    fine-tuning) gets no gradient, moment or copy. With `accumulate=k` the batch's rows are cut into k micro-batches, whose
    summed losses and gradients are divided by their supervised tokens once: the result is that of the whole batch.

    Args:
        loss_fn: (params, batch, key) -> (summed loss, supervised tokens).
        tx: any optax transformation, clipping included.
        accumulate: micro-batches in a batch; must divide its rows.

    Returns:
        metrics, float32 []: "loss" (nats a supervised token), "tokens" (supervised), "grad_norm" (before `tx`).
        A batch without supervised tokens has loss 0 and a zero gradient.

    Raises:
        ValueError: on the first call, when `accumulate` does not divide the rows.
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` must be at least 1; got {accumulate}.")

    def summed(adapter, base, batch, key):
        return loss_fn(combine(adapter, base), batch, key)

    gradient = jax.value_and_grad(summed, has_aux=True)

    def accumulated(adapter, base, batch, key):
        if accumulate == 1:
            return gradient(adapter, base, batch, key)
        rows = batch["input_ids"].shape[0]
        if rows % accumulate:
            raise ValueError(
                f"`accumulate` must divide the rows of a batch; got {rows} rows and accumulate={accumulate}."
            )
        micro = jax.tree.map(lambda x: x.reshape(accumulate, rows // accumulate, *x.shape[1:]), dict(batch))
        start = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(gradient, adapter, base, jax.tree.map(lambda x: x[0], micro), key),
        )

        def body(total, inputs):
            index, batch = inputs
            part = gradient(adapter, base, batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(body, start, (jnp.arange(accumulate), micro))[0]

    def step(state: TrainState, base: Any, batch: Batch, key: Key[Array, ""]):
        (loss, tokens), grads = accumulated(state.adapter, base, batch, key)
        weight = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g * weight, grads)
        metrics = {"loss": loss * weight, "tokens": tokens.astype(jnp.float32), "grad_norm": optax.global_norm(grads)}
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        return TrainState(state.step + 1, optax.apply_updates(state.adapter, updates), opt_state), metrics

    return jax.jit(step, donate_argnums=0)
