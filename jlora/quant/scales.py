"""How the scales of the blocks are stored: a class each, whose instances travel with the codes.

A block is scaled by `unit / absmax` into [-unit, unit], where codes are found; a code's value times `absmax / unit` decodes it.
Those of ggml's formats are read from its blocks, or found otherwise, and may have a minimum, which is added to the product.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora._processor import computed_once
from jlora._typing import Array, Float, Int8, UInt8
from jlora.quant.blockwise import absolute_maximum, in_blocks, scale_to_unit
from jlora.quant.codes import DYNAMIC_CODE, look_up, nearest_code
from jlora.weight import register_node


@dataclasses.dataclass(frozen=True)
class Scales(abc.ABC):
    """The stored scales of one tensor: a frozen dataclass, registered as a pytree, with as many entries of `blocks` for each
    block.

    Every array may carry leading stack axes. In a tensor that keeps its rows, those of `by_block` have an axis of them.
    """

    blocks: Array

    by_block: ClassVar[tuple[str, ...]] = ("blocks",)
    """The fields whose last axis runs along the blocks."""

    @abc.abstractmethod
    def decode(self, unit: float) -> Float[Array, "*stack parts"]:
        """What the value of a code is multiplied by in each sub-block, float32, of scales without an axis of rows."""

    def minimum(self) -> Float[Array, "*stack parts"] | None:
        """What is added to the product, alike; None: nothing."""
        return None

    def in_rows(self, count: int) -> "Scales":
        """The same with an axis of `count` rows: [*stack, n] -> [*stack, count, n / count]."""
        return self._each(lambda x: x.reshape(*x.shape[:-1], count, -1))

    def without_rows(self) -> "Scales":
        """The inverse."""
        return self._each(lambda x: x.reshape(*x.shape[:-2], -1))

    def _each(self, change: Callable[[Array], Array]) -> "Scales":
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in self.by_block})


class AbsmaxScales(Scales):
    """Scales that are found from the absmax of the blocks alone."""

    @classmethod
    @abc.abstractmethod
    def encode(
        cls, absmax: Float[Array, "*stack blocks"], unit: float
    ) -> tuple["Scales", Float[Array, "*stack blocks"]]:
        """(what is stored, the absmax by which codes are found: what the stored one decodes to, or the exact one)."""


@functools.partial(register_node, data_fields=("blocks",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Absmax(AbsmaxScales):
    """The absmax as it is, float32."""

    blocks: Float[Array, "..."]

    @classmethod
    def encode(cls, absmax, unit):
        return cls(absmax), absmax

    def decode(self, unit):
        return self.blocks / unit


NESTED_BLOCK = 256  # blocks of absmax that share a scale in double quantization, as bitsandbytes fixes it


@functools.partial(register_node, data_fields=("blocks", "nested", "offset"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class NestedAbsmax(AbsmaxScales):
    """Double quantization: the absmax less its mean, as 8-bit codes in blocks of 256. Codes are found by the exact absmax.

    Reference: Dettmers et al., QLoRA, 2023, arXiv:2305.14314, section 3; bitsandbytes' `quantize_blockwise`, bit for bit.
    """

    blocks: UInt8[Array, "..."]
    nested: Float[Array, "*stack nested"]
    """Scale of each 256 codes, counted through the flattened absmax of one layer."""
    offset: Float[Array, "*stack"]
    """Mean of the absmax."""

    @classmethod
    def encode(cls, absmax, unit):
        offset = jnp.mean(absmax, axis=-1)
        blocks = in_blocks(absmax - offset[..., None], NESTED_BLOCK)
        nested = absolute_maximum(blocks)
        codes = nearest_code(scale_to_unit(blocks, nested, 1.0), DYNAMIC_CODE)
        return cls(codes.reshape(*absmax.shape[:-1], -1)[..., : absmax.shape[-1]], nested, offset), absmax

    def decode(self, unit):
        scale = jnp.repeat(self.nested, NESTED_BLOCK, axis=-1)[..., : self.blocks.shape[-1]]
        # Without the maximum, which changes no value, XLA contracts product and sum to an FMA, which rounds once, not twice.
        product = jnp.maximum(look_up(DYNAMIC_CODE, self.blocks) * scale, jnp.float32(-3e38))
        return computed_once((product + self.offset[..., None]) / unit)


@functools.partial(register_node, data_fields=("blocks",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class BFloat16(AbsmaxScales):
    """`absmax / unit` in bfloat16, which has float32's range. Codes are found by the rounded scale."""

    blocks: Float[Array, "..."]

    @classmethod
    def encode(cls, absmax, unit):
        blocks = (absmax / unit).astype(jnp.bfloat16)
        return cls(blocks), blocks.astype(jnp.float32) * unit

    def decode(self, unit):
        return self.blocks.astype(jnp.float32)


@functools.partial(register_node, data_fields=("blocks",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class E8M0(AbsmaxScales):
    """A power of two as its exponent in 8 bits, with bias 127; 255 is NaN. Codes are found by it.

    The exponent is the absmax's less that of `unit`: what is beyond `unit` then, by less than a third, gets the largest code.

    Reference: Open Compute Project, OCP Microscaling Formats (MX) Specification, version 1.0, 2023, sections 5.4.1 and 6.3.
    """

    blocks: UInt8[Array, "..."]

    @classmethod
    def encode(cls, absmax, unit):
        exponent = _exponent(absmax) - (_exponent(jnp.float32(unit)) - 127)
        scales = cls(jnp.where(jnp.isfinite(absmax), jnp.maximum(exponent, 0), 255).astype(jnp.uint8))
        return scales, scales.decode(unit) * unit

    def decode(self, unit):
        bits = self.blocks.astype(jnp.uint32) << 23
        # Exponent 0 is 2^-127, a subnormal number; 255 would be infinity.
        bits = jnp.where(self.blocks == 0, 1 << 22, jnp.where(self.blocks == 255, 0x7FC00000, bits))
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


def _exponent(x: Array) -> Array:
    """floor(log2(x)) + 127 of positive float32, int32; 0 for subnormal numbers and zero."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255


# ---- ggml's, read from its blocks ------------------------------------------------------------------------------------


@functools.partial(register_node, data_fields=("blocks",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Half(Scales):
    """What codes are multiplied by, float16."""

    blocks: Float[Array, "..."]

    def decode(self, unit):
        return self.blocks.astype(jnp.float32)


@functools.partial(register_node, data_fields=("blocks", "minima"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class HalfWithMinimum(Scales):
    """What codes are multiplied by, and what is added then, float16 both."""

    blocks: Float[Array, "..."]
    minima: Float[Array, "..."]
    by_block = ("blocks", "minima")

    def decode(self, unit):
        return self.blocks.astype(jnp.float32)

    def minimum(self):
        return self.minima.astype(jnp.float32)


@functools.partial(register_node, data_fields=("blocks", "super_scales"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Int8InHalf(Scales):
    """Sixteen 8-bit scales a block, which share one in float16 (Q6_K)."""

    blocks: Int8[Array, "..."]
    super_scales: Float[Array, "..."]
    by_block = ("blocks", "super_scales")

    def decode(self, unit):
        return _times(self.super_scales, self.blocks.reshape(*self.super_scales.shape, -1))


@functools.partial(register_node, data_fields=("blocks", "super_scales", "super_minima"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class SixBitsInHalf(Scales):
    """Eight scales and eight minima a block of 6 bits each, in twelve bytes as ggml lays them; each kind shares one in float16.

    The minimum is subtracted (Q4_K).
    """

    blocks: UInt8[Array, "..."]
    super_scales: Float[Array, "..."]
    super_minima: Float[Array, "..."]
    by_block = ("blocks", "super_scales", "super_minima")

    def _bytes(self) -> tuple[Array, Array, Array]:
        """Four scales, four minima, and the lower bits of four of each, whose higher bits are atop of the former."""
        scales, minima, more = jnp.split(self.blocks.reshape(*self.super_scales.shape, 12), 3, axis=-1)
        return scales, minima, more

    def decode(self, unit):
        scales, _, more = self._bytes()
        six = jnp.concatenate([scales & 63, (more & 15) | (scales >> 2 & 48)], axis=-1)
        return computed_once(_times(self.super_scales, six))

    def minimum(self):
        _, minima, more = self._bytes()
        six = jnp.concatenate([minima & 63, (more >> 4) | (minima >> 2 & 48)], axis=-1)
        return computed_once(-_times(self.super_minima, six))


def _times(shared: Array, parts: Array) -> Array:
    """float16 [*, blocks] times the numbers [*, blocks, parts] of few bits, which is exact in float32: [*, blocks * parts]."""
    return (shared.astype(jnp.float32)[..., None] * parts.astype(jnp.float32)).reshape(*shared.shape[:-1], -1)
