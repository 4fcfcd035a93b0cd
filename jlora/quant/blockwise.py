"""Blocks, their absmax and their codes, in pure jnp; every function takes leading (stack) axes and works under jit.

Reference: bitsandbytes' `quantize_blockwise` and `dequantize_blockwise`, bit for bit on the same input.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jlora._typing import Array, DTypeLike, Float
from jlora.quant.formats import DYNAMIC_CODE, Format, look_up, nearest_code

NESTED_BLOCK = 256  # blocks of absmax that share a scale in double quantization, as bitsandbytes fixes it
_TINY = jnp.finfo(jnp.float32).tiny


def in_blocks(x: Array, size: int) -> Array:
    """[*, n] -> [*, blocks, size]: consecutive elements; the last block is filled up with zeros, which raise no absmax."""
    pad = -x.shape[-1] % size
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def absolute_maximum(blocks: Float[Array, "*stack blocks size"]) -> Float[Array, "*stack blocks"]:
    return jnp.max(jnp.abs(blocks), axis=-1)


def scale_to_unit(blocks: Array, absmax: Array, unit: float) -> Array:
    """`blocks * (unit / absmax)` in [-unit, unit]: a reciprocal and a product, as bitsandbytes rounds it."""
    # A block of zeros has absmax 0; CPUs that flush subnormal numbers must not divide by one either.
    inverse = jnp.where(absmax < _TINY, jnp.float32(1e38), jnp.float32(unit) / jnp.maximum(absmax, _TINY))
    return jnp.clip(blocks * inverse[..., None], -unit, unit)


def encode(x: Float[Array, "*stack n"], size: int, format: Format) -> tuple[Array, Array]:
    """(codes, uint8 [*, ceil(n * bits / 8)], high nibble first; absmax, float32 [*, ceil(n / size)])."""
    n = x.shape[-1]
    blocks = in_blocks(x.astype(jnp.float32), size)
    absmax = absolute_maximum(blocks)
    codes = format.encode(scale_to_unit(blocks, absmax, format.unit)).reshape(*x.shape[:-1], -1)
    return (codes if format.bits == 8 else pack(codes))[..., : math.ceil(n * format.bits / 8)], absmax


def pack(codes: Array) -> Array:
    """Two 4-bit codes a byte, the first in the high nibble. The last axis is even."""
    # As 16-bit words with the first code in the low byte: reading every second byte would not vectorize.
    words = lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.uint16)
    return ((words << 4) | (words >> 8)).astype(jnp.uint8)


def unpack_pairs(packed: Array) -> Array:
    """The inverse of `pack`: [*, n / 2] bytes -> [*, n] codes."""
    return jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def unpack_words(packed: Array) -> Array:
    """The same by 32-bit words, eight codes each; the last axis is a multiple of 4.

    XLA:CPU writes the two halves of a stack in two loops, each to every second element, one at a time. Eight shifts of one word
    are a vector that is stored whole.
    """
    words = lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], -1, 4), jnp.uint32)[..., None]
    # Little-endian: code k of a word is nibble k of it, but for the high nibble that comes first in each byte.
    nibble = lax.broadcasted_iota(jnp.uint32, (1,) * packed.ndim + (8,), packed.ndim) ^ 1
    return ((words >> (4 * nibble)) & 15).reshape(*packed.shape[:-1], -1)


UNPACK: Mapping[str, Callable[[Array], Array]] = {"cpu": unpack_words}
"""How 4-bit codes are unpacked, by backend; elsewhere `unpack_pairs`."""


def decode(
    codes: Array, absmax: Float[Array, "*stack blocks"], size: int, format: Format, dtype: DTypeLike
) -> Float[Array, "*stack n"]:
    """The inverse of `encode`, up to the last byte; computed in float32 and rounded once to `dtype`."""
    per_byte = 8 // format.bits
    count = codes.shape[-1] * per_byte
    blocks = in_blocks(codes, size // per_byte)
    if per_byte == 2:
        blocks = UNPACK.get(jax.default_backend(), unpack_pairs)(blocks)
    values = format.decode(blocks) * (absmax / format.unit)[..., None]
    return values.astype(dtype).reshape(*codes.shape[:-1], -1)[..., :count]


def encode_absmax(absmax: Float[Array, "*stack blocks"]) -> tuple[Array, Array, Array]:
    """Double quantization: (codes, uint8 [*, blocks]; nested absmax, float32 [*, ceil(blocks / 256)]; offset, float32 [*])."""
    offset = jnp.mean(absmax, axis=-1)
    blocks = in_blocks(absmax - offset[..., None], NESTED_BLOCK)
    nested = absolute_maximum(blocks)
    codes = nearest_code(scale_to_unit(blocks, nested, 1.0), DYNAMIC_CODE)
    return codes.reshape(*absmax.shape[:-1], -1)[..., : absmax.shape[-1]], nested, offset


def decode_absmax(codes: Array, nested: Array, offset: Array) -> Float[Array, "*stack blocks"]:
    """The inverse of `encode_absmax`, to the bit as bitsandbytes computes it."""
    scale = jnp.repeat(nested, NESTED_BLOCK, axis=-1)[..., : codes.shape[-1]]
    # Without the maximum, which changes no value, XLA contracts product and sum to an FMA, which rounds once, not twice.
    return jnp.maximum(look_up(DYNAMIC_CODE, codes) * scale, jnp.float32(-3e38)) + offset[..., None]
