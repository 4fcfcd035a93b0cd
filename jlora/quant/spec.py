"""What a quantized format is: codes, blocks, and how the scales of the blocks are stored."""

import abc
import dataclasses
from typing import ClassVar

from jlora._typing import Array
from jlora.quant.blockwise import absolute_maximum, scale_to_unit
from jlora.quant.layouts import Layout
from jlora.quant.scales import AbsmaxScales, Scales

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own range


@dataclasses.dataclass(frozen=True)
class QuantSpec(abc.ABC):
    """How to quantize: the codes, the block that shares a scale, and how the scale is stored."""

    block_size: int = 64
    """Consecutive elements of the [out, in] weight that share one scale."""

    name: ClassVar[str]
    """On the command line and in a tensor's repr."""
    layout: ClassVar[Layout]
    """How the codes of a block lie in bytes."""
    sub_blocks: ClassVar[int] = 1
    """Equal parts of a block that the scales tell apart: `Scales.decode` has a number for each."""
    unit: ClassVar[float] = 1.0
    """What is stored as the scale of a block is that of `unit`."""
    block_sizes: ClassVar[tuple[int, ...]] = BLOCK_SIZES

    def __post_init__(self):
        size = self.block_size
        if not isinstance(size, int) or size not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            only = "one of " if len(self.block_sizes) > 1 else ""
            raise ValueError(f"`block_size` of {type(self).__name__} must be {only}{sizes}; got {size!r}.")

    @abc.abstractmethod
    def quantize(self, blocks: Array) -> tuple[Array, Scales]:
        """float32 [*stack, blocks, size] -> (uint8 codes of that shape, below 2**bits; their scales)."""

    @staticmethod
    @abc.abstractmethod
    def decode(codes: Array) -> Array:
        """What codes stand for before it is scaled: uint8 -> float32."""


class Scaled(QuantSpec):
    """Formats that scale a block into [-unit, unit] by its absmax, and find the code of each element there."""

    @property
    @abc.abstractmethod
    def scales(self) -> type[AbsmaxScales]:
        """How the scales are stored."""

    @staticmethod
    @abc.abstractmethod
    def encode(scaled: Array) -> Array:
        """float32 in [-unit, unit] -> uint8 codes below 2**bits."""

    def quantize(self, blocks):
        scales, absmax = self.scales.encode(absolute_maximum(blocks), self.unit)
        return self.encode(scale_to_unit(blocks, absmax, self.unit)), scales
