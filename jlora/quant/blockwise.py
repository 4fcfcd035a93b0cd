"""Blocks of consecutive elements, and 4-bit codes in bytes; every function takes leading (stack) axes and works under jit."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jlora._typing import Array, Float

_TINY = jnp.finfo(jnp.float32).tiny


def in_blocks(x: Array, size: int) -> Array:
    """[*, n] -> [*, blocks, size]: consecutive elements; the last block is filled up with zeros, which raise no absmax."""
    pad = -x.shape[-1] % size
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def absolute_maximum(blocks: Float[Array, "*blocks size"]) -> Float[Array, "*blocks"]:
    return jnp.max(jnp.abs(blocks), axis=-1)


def scale_to_unit(blocks: Array, absmax: Array, unit: float) -> Array:
    """`blocks * (unit / absmax)` in [-unit, unit]: a reciprocal and a product, as bitsandbytes rounds it."""
    # A block of zeros has absmax 0; CPUs that flush subnormal numbers must not divide by one either.
    inverse = jnp.where(absmax < _TINY, jnp.float32(1e38), jnp.float32(unit) / jnp.maximum(absmax, _TINY))
    return jnp.clip(blocks * inverse[..., None], -unit, unit)


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
    # Little-endian: code k of a word is nibble k of it once the two of each byte have changed places.
    words = (words >> 4 & 0x0F0F0F0F) | (words & 0x0F0F0F0F) << 4
    return (words >> _shifts(4, packed.ndim) & 15).reshape(*packed.shape[:-1], -1)


def _shifts(bits: int, axis: int) -> Array:
    """0, bits, 2 bits, …, 7 bits as uint32 [1, …, 8], `axis` the last.

    Every `bits`-th of a count, rather than a product: what XLA has to calculate it takes out of a loop over layers, and then
    gathers it from memory for each element, which takes four times as long.
    """
    count = lax.broadcasted_iota(jnp.uint32, (1,) * axis + (8 * bits,), axis)
    return lax.slice_in_dim(count, 0, None, bits, axis)


UNPACK: Mapping[str, Callable[[Array], Array]] = {"cpu": unpack_words}
"""How 4-bit codes are unpacked, by backend; elsewhere `unpack_pairs`."""


def unpack(packed: Array) -> Array:
    """The inverse of `pack`, as is fastest on the backend; the last axis is a multiple of 4."""
    return UNPACK.get(jax.default_backend(), unpack_pairs)(packed)


_WORDS = {1: jnp.uint8, 2: jnp.uint16}
"""Bits of a code -> the word of eight of them."""


def pack_bits(codes: Array, bits: int) -> Array:
    """Codes of 1 or 2 bits by eight, in little-endian words of one or two bytes, the first code lowest."""
    words = codes.reshape(*codes.shape[:-1], -1, 8).astype(_WORDS[bits])
    shifts = lax.broadcasted_iota(_WORDS[bits], words.shape, words.ndim - 1) * bits
    packed = lax.bitcast_convert_type(jnp.sum(words << shifts, axis=-1, dtype=_WORDS[bits]), jnp.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_bits(packed: Array, bits: int) -> Array:
    """The inverse of `pack_bits`."""
    parts = packed if bits == 1 else packed.reshape(*packed.shape[:-1], -1, bits)
    # In 32 bits, as `unpack_words` has the lower bits of the same codes.
    words = lax.bitcast_convert_type(parts, _WORDS[bits])[..., None].astype(jnp.uint32)
    return (words >> _shifts(bits, packed.ndim) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
