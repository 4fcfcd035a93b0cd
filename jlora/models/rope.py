"""Rotary positions: what says them, and the rotation of queries and keys."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora._typing import AnyArray, Array, Float, Int


class Llama3Scaling(NamedTuple):
    """`rope_type: llama3`: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, inv: np.ndarray) -> np.ndarray:
        turns = (
            self.original_max_position_embeddings * inv / (2 * math.pi)
        )  # full rotations within the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return smooth * inv + (1.0 - smooth) * inv / self.factor


class LinearScaling(NamedTuple):
    """`rope_type: linear`: every wavelength is slowed by `factor`."""

    factor: float

    def scaled(self, inv: np.ndarray) -> np.ndarray:
        return inv / self.factor


class Rope(NamedTuple):
    """A rotation of queries and keys by their positions."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | None


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | LinearScaling | None) -> np.ndarray:
    """Inverse frequencies, float32 [head_dim / 2].

    Reference: Su et al. 2021, arXiv:2104.09864; scaling as in transformers' `modeling_rope_utils`.
    """
    inv = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (inv if scaling is None else scaling.scaled(inv)).astype(np.float32)


def rope_angles(positions: Int[AnyArray, "batch seq"], frequencies: np.ndarray):
    """(cos, sin), each float32 [batch, seq, head_dim], halves repeated."""
    # float32: bfloat16 rounds position 257 to 256, a whole radian off in the first pair.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch seq heads head_dim"], rope) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates pairs (i, i + head_dim/2): Hugging Face's half-split convention. `rope` None: not at all."""
    if rope is None:
        return x
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
