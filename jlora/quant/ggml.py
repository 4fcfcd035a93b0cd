"""ggml's block formats, which GGUF files hold: rows of the table of formats, and their blocks in a file.

What a block holds is kept, so that it decodes to the same bits and can be written back as it was; only the codes are laid anew,
in words of eight consecutive ones, which decode several times as fast as ggml's halves and planes of 32, 64 or 128.

Reference: ggml's `ggml-common.h` (blocks) and `ggml-quants.c`; the `gguf` package's `quants.py`, whose values and codes these are
bit for bit.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, Float, UInt8
from jlora.quant.layouts import Bytes, Nibbles
from jlora.quant.scales import Half, HalfWithMinimum, Int8InHalf, Scales, SixBitsInHalf
from jlora.quant.spec import QuantSpec


class Plane(NamedTuple):
    """Some bits of every code of a block, as a file has them: the codes come in spans, whose bytes hold first those of the
    first codes of the span, one a byte, lowest; above them those of as many next codes, and so on."""

    bits: int
    span: int
    shift: int = 0
    """Where in the code they are."""

    def nbytes(self, size: int) -> int:
        return size * self.bits // 8

    def unpack(self, packed: Array) -> Array:
        """[*, n] bytes -> [*, n * 8 / bits] parts of codes."""
        spans = packed.reshape(*packed.shape[:-1], -1, 1, self.nbytes(self.span))
        shifts = (np.arange(8 // self.bits, dtype=np.uint8) * self.bits)[:, None]
        parts = spans >> shifts & (2**self.bits - 1)
        return parts.reshape(*packed.shape[:-1], -1) << self.shift

    def pack(self, codes: Array) -> Array:
        """The inverse, of whole codes."""
        parts = codes >> self.shift & (2**self.bits - 1)
        spans = parts.reshape(*codes.shape[:-1], -1, 8 // self.bits, self.nbytes(self.span))
        shifts = (np.arange(8 // self.bits, dtype=np.uint8) * self.bits)[:, None]
        return jnp.sum(spans << shifts, axis=-2, dtype=jnp.uint8).reshape(*codes.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class GGML(QuantSpec):
    """A block format of ggml."""

    block_size: int = 32
    block_sizes = (32,)

    planes: ClassVar[tuple[Plane, ...]]
    """How the codes of a block lie in a file."""
    stored: ClassVar[type[Scales]]
    """The class of the scales."""
    fields: ClassVar[tuple[tuple[str, type, int], ...]]
    """A block in a file: the fields of `stored`, and "codes", each with the type and the number of its elements."""

    @property
    def file_bytes(self) -> int:
        """Bytes of a block in a file."""
        return sum(np.dtype(kind).itemsize * count for _, kind, count in self.fields)

    def from_file(self, blocks: UInt8[Array, "*stack blocks bytes"]) -> tuple[Array, Scales]:
        """(codes [*stack, blocks * bytes] as `layout` packs them, scales) of the blocks of a file."""
        start, parts = 0, {}
        for name, kind, count in self.fields:
            dtype = np.dtype(kind)
            part = blocks[..., start : (start := start + dtype.itemsize * count)]
            part = self.layout.pack(self._codes(part)) if name == "codes" else part.view(dtype)
            parts[name] = part.reshape(*blocks.shape[:-2], -1)
        return parts.pop("codes"), self.stored(**parts)

    def to_file(self, codes: UInt8[Array, "*stack packed"], scales: Scales) -> UInt8[Array, "*stack blocks bytes"]:
        """The inverse of `from_file`."""
        size = self.block_size * self.layout.bits // 8
        blocks = codes.reshape(*codes.shape[:-1], -1, size)
        parts = []
        for name, _, count in self.fields:
            if name == "codes":
                whole = self.layout.unpack(blocks)
                parts += [plane.pack(whole) for plane in self.planes]
            else:
                parts.append(getattr(scales, name).reshape(*blocks.shape[:-1], count).view(jnp.uint8))
        return jnp.concatenate(parts, axis=-1)

    def _codes(self, packed: Array) -> Array:
        start, codes = 0, jnp.uint8(0)
        for plane in self.planes:
            codes |= plane.unpack(packed[..., start : (start := start + plane.nbytes(self.block_size))])
        return codes


class Halves(GGML):
    """Codes from 0 to 2 * `half` - 1 of which `half` stands for zero; the element of largest magnitude gets the lowest, which has
    no opposite."""

    stored = Half
    half: ClassVar[int]

    def quantize(self, blocks):
        at = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
        scale = jnp.take_along_axis(blocks, at, axis=-1) / -self.half
        codes = jnp.trunc(_rounded(blocks * _inverse(scale)) + (self.half + 0.5))
        return _below(codes, 2 * self.half), Half(_half(scale))


class Ranges(GGML):
    """Codes from 0 to `top`, from the least element of a block to the greatest."""

    stored = HalfWithMinimum
    top: ClassVar[int]

    def quantize(self, blocks):
        least = jnp.min(blocks, axis=-1, keepdims=True)
        scale = _divide(jnp.max(blocks, axis=-1, keepdims=True) - least, self.top)
        codes = jnp.trunc(_rounded((blocks - least) * _inverse(scale)) + 0.5)
        return _below(codes, self.top + 1), HalfWithMinimum(_half(scale), _half(least))

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Q8_0(GGML):
    """8-bit integers in blocks of 32 with a float16 scale; 8.5 bits a parameter."""

    name, layout, planes, stored = "q8_0", Bytes(), (Plane(8, 32),), Half
    fields = (("blocks", np.float16, 1), ("codes", np.uint8, 32))

    def quantize(self, blocks):
        scale = _divide(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), 127)
        scaled = _rounded(blocks * _inverse(scale))
        floor = jnp.floor(jnp.abs(scaled))
        away = floor + jnp.floor(2 * (jnp.abs(scaled) - floor))  # a tie goes away from zero
        return (jnp.sign(scaled) * away).astype(jnp.int8).view(jnp.uint8), Half(_half(scale))

    @staticmethod
    def decode(codes):
        return codes.view(jnp.int8).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Q4_0(Halves):
    """4-bit codes from -8 to 7 in blocks of 32 with a float16 scale; 4.5 bits a parameter."""

    name, layout, planes, half = "q4_0", Nibbles(), (Plane(4, 32),), 8
    fields = (("blocks", np.float16, 1), ("codes", np.uint8, 16))

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 8


@dataclasses.dataclass(frozen=True)
class Q4_1(Ranges):
    """4-bit codes in blocks of 32 with a scale and a minimum in float16; 5 bits a parameter."""

    name, layout, planes, top = "q4_1", Nibbles(), (Plane(4, 32),), 15
    fields = (("blocks", np.float16, 1), ("minima", np.float16, 1), ("codes", np.uint8, 16))


@dataclasses.dataclass(frozen=True)
class Q5_0(Halves):
    """5-bit codes from -16 to 15 in blocks of 32 with a float16 scale; 5.5 bits a parameter."""

    name, layout, planes, half = "q5_0", Nibbles(1), (Plane(1, 8, 4), Plane(4, 32)), 16
    fields = (("blocks", np.float16, 1), ("codes", np.uint8, 20))

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 16


@dataclasses.dataclass(frozen=True)
class Q5_1(Ranges):
    """5-bit codes in blocks of 32 with a scale and a minimum in float16; 6 bits a parameter."""

    name, layout, planes, top = "q5_1", Nibbles(1), (Plane(1, 8, 4), Plane(4, 32)), 31
    fields = (("blocks", np.float16, 1), ("minima", np.float16, 1), ("codes", np.uint8, 20))


class OnlyRead(GGML):
    """What files hold and nothing here makes: ggml searches for the scales of the parts of a block, in C, and the `gguf` package
    has no encoder to be equal to."""

    block_size: int = 256
    block_sizes = (256,)

    def quantize(self, blocks):
        raise ValueError(
            f'Weights cannot be brought to {self.name}, which is kept as a GGUF file has it (`jlora.load(file, quantize="keep")`); '
            "llama.cpp's llama-quantize makes such files. To quantize here, pass jlora.Q4_1() or jlora.Q5_1()."
        )


@dataclasses.dataclass(frozen=True)
class Q4_K(OnlyRead):
    """4-bit codes in blocks of 256: eight parts, each with a scale and a minimum in 6 bits; 4.5 bits a parameter."""

    block_size: int = 256
    name, layout, planes, stored, sub_blocks = "q4_k", Nibbles(), (Plane(4, 64),), SixBitsInHalf, 8
    fields = (
        ("super_scales", np.float16, 1),
        ("super_minima", np.float16, 1),
        ("blocks", np.uint8, 12),
        ("codes", np.uint8, 128),
    )

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Q5_K(OnlyRead):
    """5-bit codes in blocks of 256, scaled as Q4_K; 5.5 bits a parameter."""

    block_size: int = 256
    name, layout, planes, stored, sub_blocks = "q5_k", Nibbles(1), (Plane(1, 256, 4), Plane(4, 64)), SixBitsInHalf, 8
    fields = (*Q4_K.fields[:3], ("codes", np.uint8, 160))

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Q6_K(OnlyRead):
    """6-bit codes from -32 to 31 in blocks of 256: sixteen parts, each with a scale in 8 bits; 6.5625 bits a parameter."""

    block_size: int = 256
    name, layout, planes, stored, sub_blocks = "q6_k", Nibbles(2), (Plane(4, 128), Plane(2, 128, 4)), Int8InHalf, 16
    fields = (("codes", np.uint8, 192), ("blocks", np.int8, 16), ("super_scales", np.float16, 1))

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 32


GGML_TYPES: Mapping[str, type[GGML]] = {
    spec.name.upper(): spec for spec in (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K)
}
"""Name of a ggml type (`gguf.GGMLQuantizationType`) -> format."""


# ---- arithmetic as NumPy's, which rounds after each operation ---------------------------------------------------------


def _divide(x: Float[Array, "..."], by: int) -> Float[Array, "..."]:
    """Rounded once. XLA would multiply by the reciprocal of a constant, so that it must not know this one."""
    return x / jnp.where(jnp.isnan(x), x, by)


def _inverse(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of a scale, and zero of zero."""
    return jnp.where(scale == 0, 0, 1 / _rounded(scale))


def _rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same values. Without the maximum XLA contracts a product and a sum that follows to an FMA, which rounds once, and
    1 / (a / b) to b / a."""
    return jnp.maximum(x, jnp.float32(-3e38))


def _below(codes: Float[Array, "..."], end: int) -> UInt8[Array, "..."]:
    return jnp.clip(codes, 0, end - 1).astype(jnp.uint8)


def _half(x: Float[Array, "*stack blocks 1"]) -> Float[Array, "*stack blocks"]:
    return x[..., 0].astype(jnp.float16)
