"""AdamW whose moments are 8-bit codes: a quarter of the optimizer's memory.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, arXiv:2110.02861; blocks, codes and the least
size are those of bitsandbytes' `AdamW8bit`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._processor import not_before
from jlora._typing import Array, Float, Int, PyTree, UInt8
from jlora.quant.blockwise import absolute_maximum, in_blocks, scale_to_unit
from jlora.quant.codes import DYNAMIC_CODE, UNSIGNED_DYNAMIC_CODE, look_up, nearest_code

BLOCK = 256  # elements that share a scale, as in bitsandbytes' `Optimizer2State`
MIN_8BIT_SIZE = 4096
"""Elements of the smallest parameter whose moments are packed, as in bitsandbytes: the codes of small ones would save nothing."""


class Packed(NamedTuple):
    """A moment of one parameter in 8 bits: the elements of each layer in their flattened order, its last block filled up with
    zeros."""

    codes: UInt8[Array, "blocks size"]
    absmax: Float[Array, " blocks"]
    """An element is `code[codes] * absmax`."""


class Adam8bitState(NamedTuple):
    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]: optax's name
    """Updates done, int32."""
    mu: PyTree
    """The first moment: `Packed` in the signed map, or float32 of small parameters."""
    nu: PyTree
    """The second moment, likewise in the unsigned map."""


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float,
    b2: float,
    eps: float = 1e-8,
    weight_decay: float,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    stacked: Callable[[PyTree], PyTree] | None = None,
    min_8bit_size: int = MIN_8BIT_SIZE,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with `scale_by_adam8bit`; the others as of `optax.adamw`."""
    return optax.chain(
        scale_by_adam8bit(b1=b1, b2=b2, eps=eps, stacked=stacked, min_8bit_size=min_8bit_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam8bit(
    *, b1: float, b2: float, eps: float, stacked: Callable[[PyTree], PyTree] | None, min_8bit_size: int
) -> optax.GradientTransformation:
    """Adam's update of moments that are unpacked, moved and packed again in blocks: bitsandbytes' arithmetic.

    Args:
        stacked: a tree -> which of its arrays are stacks of layers, each of which is a parameter; None: none is.
        min_8bit_size: see `MIN_8BIT_SIZE`.
    """

    def layers_of(tree: PyTree) -> list[int]:
        leaves = jax.tree.leaves(tree)
        stacks = [False] * len(leaves) if stacked is None else jax.tree.leaves(stacked(tree))
        return [x.shape[0] if stack else 1 for x, stack in zip(leaves, stacks, strict=True)]

    def start(p: Array, layers: int) -> Packed | Array:
        size = p.size // layers
        if size < min_8bit_size:
            return jnp.zeros(p.shape, jnp.float32)
        blocks = layers * -(-size // BLOCK)
        return Packed(jnp.zeros((blocks, BLOCK), jnp.uint8), jnp.zeros(blocks, jnp.float32))

    def init(params: optax.Params) -> Adam8bitState:
        leaves, treedef = jax.tree.flatten(params)
        layers = layers_of(params)
        # Twice: a donated state must not have a buffer in two places.
        mu, nu = (treedef.unflatten(map(start, leaves, layers)) for _ in range(2))
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        count: Any = optax.safe_increment(state.count)
        corrections = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)
        moved = functools.partial(_moved, b1=b1, b2=b2, eps=eps, corrections=corrections)
        leaves, treedef = jax.tree.flatten(updates)
        moments = (treedef.flatten_up_to(tree) for tree in (state.mu, state.nu))
        found, last = [], None
        for g, layers, mu, nu in zip(leaves, layers_of(updates), *moments, strict=True):
            g = g.astype(jnp.float32)
            # One after the other: the unpacked moments of all parameters are more than 8 bits save.
            update, mu, nu = _leaf(moved, g if last is None else not_before(last, g), layers, mu, nu)
            found.append((update, mu, nu))
            if isinstance(nu, Packed):
                last = nu.absmax
        update, mu, nu = (treedef.unflatten([parts[i] for parts in found]) for i in range(3))
        return update, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _moved(g: Array, mu: Array, nu: Array, *, b1: float, b2: float, eps: float, corrections: tuple[Array, Array]):
    """(update, first moment, second moment) of float32 arrays of one shape."""
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
    return (mu / corrections[0]) / (jnp.sqrt(nu) / jnp.sqrt(corrections[1]) + eps), mu, nu


def _leaf(moved: Callable, g: Array, layers: int, mu: Packed | Array, nu: Packed | Array):
    """(update, first moment, second moment) of one array, its moments as they are kept."""
    if not isinstance(mu, Packed) or not isinstance(nu, Packed):
        return moved(g, mu, nu)

    # Not before there is a gradient: unpacked ahead of time, the moments of all parameters would be float32 at once.
    first, second = (x._replace(codes=not_before(g, x.codes)) for x in (mu, nu))
    blocks = in_blocks(g.reshape(layers, -1), BLOCK).reshape(-1, BLOCK)
    update, m, v = moved(blocks, _unpack(first, DYNAMIC_CODE), _unpack(second, UNSIGNED_DYNAMIC_CODE))
    update = update.reshape(layers, -1)[:, : g.size // layers].reshape(g.shape)
    return update, _pack(m, DYNAMIC_CODE), _pack(v, UNSIGNED_DYNAMIC_CODE)


def _unpack(x: Packed, code: np.ndarray) -> Float[Array, "*blocks size"]:
    return look_up(code, x.codes) * x.absmax[..., None]


def _pack(x: Float[Array, "*blocks size"], code: np.ndarray) -> Packed:
    """As bitsandbytes' `quantize_blockwise`."""
    absmax = absolute_maximum(x)
    return Packed(nearest_code(scale_to_unit(x, absmax, 1.0), code), absmax)
