"""How the codes of a block lie in bytes: a class each, of which a format names one."""

import abc
import dataclasses
import math

import jax.numpy as jnp

from jlora._typing import Array
from jlora.quant.blockwise import pack, pack_bits, unpack, unpack_bits


class Layout(abc.ABC):
    """Codes [*, size] of a block to and from its bytes [*, size * bits / 8], uint8 both."""

    bits: int
    """Of a code."""

    @abc.abstractmethod
    def pack(self, codes: Array) -> Array:
        """[*, size] codes -> [*, size * bits / 8] bytes."""

    @abc.abstractmethod
    def unpack(self, packed: Array) -> Array:
        """The inverse."""

    @abc.abstractmethod
    def pick(self, packed: Array, at: Array, size: int) -> Array:
        """The codes numbered `at` of the bytes [n] of consecutive blocks of `size` codes."""

    def nbytes(self, count: int, size: int) -> int:
        """Bytes of `count` codes in blocks of `size`: the last block may end early."""
        return math.ceil(count * self.bits / 8)


@dataclasses.dataclass(frozen=True)
class Bytes(Layout):
    """A code a byte."""

    bits = 8

    def pack(self, codes):
        return codes

    def unpack(self, packed):
        return packed

    def pick(self, packed, at, size):
        return packed[at]


@dataclasses.dataclass(frozen=True)
class Nibbles(Layout):
    """The lower four bits of two codes a byte, the first in the high nibble; after those of a block its codes' further bits.

    Everything comes in words of eight codes, which decode as one vector: 32 bits and, of the further bits, 8 or 16, those of
    the first code lowest.
    """

    further: int = 0
    """Bits of a code beyond four: 0, 1 or 2."""

    @property
    def bits(self):  # pyright: ignore[reportIncompatibleVariableOverride]: read-only here, as in every frozen dataclass
        return 4 + self.further

    def pack(self, codes):
        if not self.further:
            return pack(codes)
        return jnp.concatenate([pack(codes & 15), pack_bits(codes >> 4, self.further)], axis=-1)

    def unpack(self, packed):
        if not self.further:
            return unpack(packed)
        low = packed.shape[-1] * 4 // self.bits
        return unpack(packed[..., :low]) | (unpack_bits(packed[..., low:], self.further) << 4)

    def pick(self, packed, at, size):
        if not self.further:
            return _nibble(packed, at // 2, at)
        start, at = at // size * (size * self.bits // 8), at % size
        bit = at * self.further
        high = packed[start + size // 2 + bit // 8] >> (bit % 8).astype(jnp.uint8) & (2**self.further - 1)
        return _nibble(packed, start + at // 2, at) | (high << 4)

    def nbytes(self, count, size):
        if not self.further:
            return super().nbytes(count, size)
        return math.ceil(count / size) * (size * self.bits // 8)  # the further bits of a block come last


def _nibble(packed: Array, byte: Array, at: Array) -> Array:
    return jnp.where(at % 2 == 0, packed[byte] >> 4, packed[byte] & 15)
