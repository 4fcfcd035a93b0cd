"""Dynamic loss scaling: training in float16, whose smallest gradients would be zero and whose largest infinite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._typing import Array, Float, Int, PyTree

# Those of `torch.amp.GradScaler`.
INITIAL = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000  # updates without overflow in a row, before the scale grows

LEAST = 1.0
"""Where scaling ends: with a scale below it gradients are infinite without any."""


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`, by which `make_step` knows that losses are scaled, and by how much."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    """Updates since the scale changed, int32."""
    skipped: Int[Array, ""]
    """Updates that were left out so far, int32."""
    inner: optax.OptState


def dynamic_loss_scale(
    tx: optax.GradientTransformation, *, initial: float = INITIAL, growth_interval: int = GROWTH_INTERVAL
) -> optax.GradientTransformationExtraArgs:
    """`tx`, of gradients of a loss that `make_step` multiplies by a scale and divides by it again, in float32.

    Where a gradient is not finite nothing is updated, `tx`'s own count included, and the scale is halved; after `growth_interval`
    updates in a row it is doubled, as by `torch.amp.GradScaler`.

    Reference: Micikevicius et al., Mixed Precision Training, 2018, arXiv:1710.03740, section 3.2.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: PyTree):
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates)]))
        made, inner = tx.update(updates, state.inner, params, **extra)
        made = jax.tree.map(lambda u: jnp.where(finite, u, 0), made)
        inner = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner, state.inner)
        good = jnp.where(finite, state.good_steps + 1, 0)
        grown = good == growth_interval
        scale = state.scale * jnp.where(finite, jnp.where(grown, GROWTH, 1.0), BACKOFF)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        return made, LossScaleState(scale, jnp.where(grown, 0, good), skipped, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: optax.OptState) -> LossScaleState | None:
    """The state of the scale, of an optimizer that has one."""
    return opt_state if isinstance(opt_state, LossScaleState) else None
