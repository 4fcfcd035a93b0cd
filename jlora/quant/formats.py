"""The quantized formats, a class each.

To add one: its class here, its name in `FormatName` and `SPECS`. Everything else asks the spec, which travels with the tensor.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax.numpy as jnp

from jlora.quant.codes import E2M1_CODE, NF4_CODE, choose, nearest_code, nearest_e2m1
from jlora.quant.ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from jlora.quant.layouts import Bytes, Nibbles
from jlora.quant.scales import E8M0, Absmax, BFloat16, NestedAbsmax
from jlora.quant.spec import QuantSpec, Scaled


@dataclasses.dataclass(frozen=True)
class Blockwise(Scaled):
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
    name, layout, unit = "nf4", Nibbles(), 1.0

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

    name, layout, unit = "int8", Bytes(), 127.0

    @staticmethod
    def encode(scaled):
        return (jnp.round(scaled) + 128).astype(jnp.uint8)

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 128


@dataclasses.dataclass(frozen=True)
class Int4(Blockwise):
    """Blockwise symmetric int4, `round(7 / absmax * x)`, stored with an offset of 8."""

    name, layout, unit = "int4", Nibbles(), 7.0

    @staticmethod
    def encode(scaled):
        return (jnp.round(scaled) + 8).astype(jnp.uint8)

    @staticmethod
    def decode(codes):
        return codes.astype(jnp.float32) - 8


@dataclasses.dataclass(frozen=True)
class Int4G128(Scaled):
    """Symmetric int4 in groups of 128 along `in`, the format of hardware and its kernels: 4.125 bits a parameter.

    Two's complement codes from -8 to 7 times a bfloat16 scale, `absmax / 7.5`: an element is at most half a step from its code
    also at both ends, where codes from -7 to 7 would leave one of the sixteen unused and make the steps 7 % wider.

    Reference: the weights of "W4A16 g128" as compressed-tensors, torchao and qwix define them (symmetric, int4, group size 128).
    """

    block_size: int = 128
    name, layout, unit = "int4-g128", Nibbles(), 7.5
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
class MXFP4(Scaled):
    """OCP Microscaling FP4: E2M1 floats in blocks of 32 with a power of two for a scale; 4.25 bits a parameter.

    Reference: Open Compute Project, OCP Microscaling Formats (MX) Specification, version 1.0, 2023.
    """

    block_size: int = 32
    name, layout, unit = "mxfp4", Nibbles(), 6.0
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


FormatName: TypeAlias = Literal["nf4", "int8", "int4", "int4-g128", "mxfp4", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
"""What `--quantize` may be."""

SPECS: Mapping[str, type[QuantSpec]] = {
    spec.name: spec for spec in (NF4, Int8, Int4, Int4G128, MXFP4, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1)
}
"""Name -> spec, of those that weights can be brought to (`ggml.GGML_TYPES` has more, which files hold)."""

Kept: TypeAlias = Literal["keep"]
"""In the place of a spec, or of its name: each kernel stays in the format that its file has it in."""
KEEP: Kept = "keep"


def spec_named(name: str | None) -> QuantSpec | Kept | None:
    """What a `--quantize` means; None: nothing is packed."""
    return name if name is None or name == KEEP else SPECS[name]()
