"""The quantized formats: codes, blocks, and how the scales of the blocks are stored; a class each.

To add one: its class here, its name in `FormatName` and `SPECS`. Everything else asks the spec, which travels with the tensor.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias

import jax.numpy as jnp

from jlora._typing import Array
from jlora.quant.codes import E2M1_CODE, NF4_CODE, choose, nearest_code, nearest_e2m1
from jlora.quant.scales import E8M0, Absmax, BFloat16, NestedAbsmax, Scales

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own range


@dataclasses.dataclass(frozen=True)
class QuantSpec(abc.ABC):
    """How to quantize: the codes, the block that shares a scale, and how the scale is stored."""

    block_size: int = 64
    """Consecutive elements of the [out, in] weight that share one scale."""

    name: ClassVar[str]
    """On the command line and in a tensor's repr."""
    bits: ClassVar[int]
    """Of a code: 4 or 8."""
    unit: ClassVar[float]
    """Blocks are scaled into [-unit, unit]."""
    block_sizes: ClassVar[tuple[int, ...]] = BLOCK_SIZES

    def __post_init__(self):
        size = self.block_size
        if not isinstance(size, int) or size not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            only = "one of " if len(self.block_sizes) > 1 else ""
            raise ValueError(f"`block_size` of {type(self).__name__} must be {only}{sizes}; got {size!r}.")

    @property
    @abc.abstractmethod
    def scales(self) -> type[Scales]:
        """How the scales are stored."""

    @staticmethod
    @abc.abstractmethod
    def encode(scaled: Array) -> Array:
        """float32 in [-unit, unit] -> uint8 codes below 2**bits."""

    @staticmethod
    @abc.abstractmethod
    def decode(codes: Array) -> Array:
        """The inverse: codes -> float32."""


@dataclasses.dataclass(frozen=True)
class Blockwise(QuantSpec):
    """Formats whose scale is the absmax of a block, from 32 to 4096 elements."""

    double_quant: bool = False
    """Store the absmax as 8-bit codes in blocks of 256 rather than as float32 (QLoRA, section 3)."""

    @property
    def scales(self):
        return NestedAbsmax if self.double_quant else Absmax


@dataclasses.dataclass(frozen=True)
class NF4(Blockwise):
    """4-bit NormalFloat with double quantization: 4.127 bits a parameter in blocks of 64; bitsandbytes' bytes.

    Reference: Dettmers et al., QLoRA, 2023, arXiv:2305.14314.
    """

    double_quant: bool = True
    name, bits, unit = "nf4", 4, 1.0

    @staticmethod
    def encode(scaled):
        return nearest_code(scaled, NF4_CODE)

    @staticmethod
    def decode(codes):
        return choose(NF4_CODE, codes)


@dataclasses.dataclass(frozen=True)
class Int8(Blockwise):
    """Blockwise symmetric int8, `round(127 / absmax * x)`, stored with an offset of 128.

    Reference: QLoRA, arXiv:2305.14314, equation 1.
    """

    name, bits, unit = "int8", 8, 127.0

    @staticmethod
    def encode(scaled):
        return (jnp.round(scaled) + 128).astype(jnp.uint8)

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 128


@dataclasses.dataclass(frozen=True)
class Int4(Blockwise):
    """Blockwise symmetric int4, `round(7 / absmax * x)`, stored with an offset of 8."""

    name, bits, unit = "int4", 4, 7.0

    @staticmethod
    def encode(scaled):
        return (jnp.round(scaled) + 8).astype(jnp.uint8)

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 8


@dataclasses.dataclass(frozen=True)
class Int4G128(QuantSpec):
    """Symmetric int4 in groups of 128 along `in`, the format of hardware and its kernels: 4.125 bits a parameter.

    Two's complement codes from -8 to 7 times a bfloat16 scale, `absmax / 7.5`: an element is at most half a step from its code
    also at both ends, where codes from -7 to 7 would leave one of the sixteen unused and make the steps 7 % wider.

    Reference: the weights of "W4A16 g128" as compressed-tensors, torchao and qwix define them (symmetric, int4, group size 128).
    """

    block_size: int = 128
    name, bits, unit = "int4-g128", 4, 7.5
    block_sizes = (128,)

    @property
    def scales(self):
        return BFloat16

    @staticmethod
    def encode(scaled):
        return jnp.clip(jnp.round(scaled), -8, 7).astype(jnp.int8).astype(jnp.uint8) & 15

    @staticmethod
    def decode(codes):
        return (codes ^ 8).astype(jnp.float32) - 8


@dataclasses.dataclass(frozen=True)
class MXFP4(QuantSpec):
    """OCP Microscaling FP4: E2M1 floats in blocks of 32 with a power of two for a scale; 4.25 bits a parameter.

    Reference: Open Compute Project, OCP Microscaling Formats (MX) Specification, version 1.0, 2023.
    """

    block_size: int = 32
    name, bits, unit = "mxfp4", 4, 6.0
    block_sizes = (32,)

    @property
    def scales(self):
        return E8M0

    @staticmethod
    def encode(scaled):
        return nearest_e2m1(scaled)

    @staticmethod
    def decode(codes):
        return choose(E2M1_CODE, codes)


FormatName: TypeAlias = Literal["nf4", "int8", "int4", "int4-g128", "mxfp4"]
"""What `--quantize` may be."""

SPECS: Mapping[str, type[QuantSpec]] = {spec.name: spec for spec in (NF4, Int8, Int4, Int4G128, MXFP4)}
"""Name -> spec."""
