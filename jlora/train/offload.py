"""The optimizer's state in the host's memory between steps."""

from typing import Any

import jax
import optax

from jlora._typing import PyTree


class Offloaded(optax.GradientTransformationExtraArgs):
    """Made by `offloaded`; `init_state` puts the state where it is kept."""


def offloaded(tx: optax.GradientTransformation) -> Offloaded:
    """`tx` whose state lies in pinned memory of the host between steps. In a step it comes to the device for the update and goes
    back, array by array, as the compiler finds time and room. Scalars, counts among them, stay on the device.

    Only the optimizer: its state is of no use while activations are there, and moving it costs twice its bytes a step. What
    the layers keep for the backward pass is not offloaded: in jax 0.11 residuals of a scan came back from the host in reversed
    order on GPU; `remat` makes less of them. The backend of a CPU has one memory, and runs no program with two.

    Reference: the paged optimizers of Dettmers et al., QLoRA, 2023, arXiv:2305.14314, section 3.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree):
        made, state = tx.update(updates, to_device(state), params, **extra)
        return made, to_host(state)

    return Offloaded(tx.init, update)


def to_host(state: PyTree) -> PyTree:
    """The state with its arrays in the host's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if is_moved(x) else x, state)


def to_device(state: PyTree) -> PyTree:
    """The inverse."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_moved(x) else x, state)


def is_moved(x: Any) -> bool:
    """Whether a leaf of the state is kept on the host."""
    return x.ndim > 0
