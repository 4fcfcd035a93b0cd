"""The table of the quantized formats: what a code stands for, and which code a scaled value gets.

A block of weights is scaled by `unit / absmax` into [-unit, unit] and each value becomes an unsigned code; decoding is
`value(code) * (absmax / unit)`, in float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array

NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""NormalFloat: means of neighbouring quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.

Reference: Dettmers et al., QLoRA, 2023, arXiv:2305.14314, section 3 and appendix E; the float32 values are bitsandbytes'.
"""

DYNAMIC_CODE = np.load(str(files("jlora.quant") / "dynamic_map.npy"))
"""bitsandbytes' signed 8-bit dynamic map (`create_dynamic_map()`), float32 [256], for the absmax of double quantization.

Stored rather than computed: a float32 regeneration differs in the last bit of some entries.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, arXiv:2110.02861, section 2.
"""


def nearest_code(scaled: Array, code: np.ndarray) -> Array:
    """The index, uint8, of the entry of the increasing `code` nearest to each value; a tie goes to the lower one."""
    thresholds = (code[1:] + code[:-1]) / np.float32(2)
    if code.size > 16:
        return jnp.searchsorted(jnp.asarray(thresholds), scaled, side="left").astype(jnp.uint8)
    # Counting is one fused pass of comparisons; a binary search gathers.
    return sum(((scaled > t).astype(jnp.uint8) for t in thresholds), start=jnp.zeros(scaled.shape, jnp.uint8))


def look_up(code: np.ndarray, index: Array) -> Array:
    """`code[index]` without the range check that every index of these tables passes."""
    return jnp.asarray(code).at[index].get(mode="promise_in_bounds")


def choose_by_bits(code: np.ndarray, index: Array) -> Array:
    """`code[index]` by halving: a tree of selects on the bits of the index, which vectorizes where a lookup does not."""
    level = [jnp.float32(value) for value in code]
    bit = 1
    while len(level) > 1:
        odd = (index & bit) != 0
        level = [jnp.where(odd, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        bit <<= 1
    return level[0]


DECODERS: Mapping[str, Callable[[np.ndarray, Array], Array]] = {"cpu": choose_by_bits}
"""How 16 values are looked up, by backend; elsewhere `look_up`, whose table is one cache line of a GPU. On two CPU cores with
AVX-512 a 3072 x 768 weight decodes to bfloat16 at 3.1 G elements/s by bits and at 2.3 by lookup."""


def decode_nf4(codes: Array) -> Array:
    return DECODERS.get(jax.default_backend(), look_up)(NF4_CODE, codes)


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to write a block of weights as unsigned codes."""

    name: str
    bits: int
    unit: float
    """Blocks are scaled into [-unit, unit]."""
    encode: Callable[[Array], Array]
    """float32 in [-unit, unit] -> uint8 codes below 2**bits."""
    decode: Callable[[Array], Array]
    """The inverse: codes -> float32."""


def _integer(bits: int) -> Format:
    """Symmetric absmax: `round(unit / absmax * x)`, stored with an offset so that codes are unsigned."""
    unit = 2 ** (bits - 1) - 1
    return Format(
        name=f"int{bits}",
        bits=bits,
        unit=float(unit),
        encode=lambda scaled: (jnp.round(scaled) + (unit + 1)).astype(jnp.uint8),
        decode=lambda codes: codes.astype(jnp.float32) - (unit + 1),
    )


FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format(
            name="nf4",
            bits=4,
            unit=1.0,
            encode=lambda scaled: nearest_code(scaled, NF4_CODE),
            decode=decode_nf4,
        ),
        _integer(8),
        _integer(4),
    )
}


BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own range


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How to quantize: a format, the block that shares an absmax, and whether the absmax is quantized itself."""

    block_size: int = 64
    """Consecutive elements of the [out, in] weight that share one absmax: a power of two from 32 to 4096."""
    double_quant: bool = False
    """Store the absmax as 8-bit codes in blocks of 256 rather than as float32 (QLoRA, section 3)."""

    format: ClassVar[Format]

    def __post_init__(self):
        size = self.block_size
        if not isinstance(size, int) or size not in BLOCK_SIZES:
            raise ValueError(f"`block_size` must be one of {', '.join(map(str, BLOCK_SIZES))}; got {size!r}.")


@dataclasses.dataclass(frozen=True)
class NF4(QuantSpec):
    """4-bit NormalFloat with double quantization: 4.127 bits a parameter in blocks of 64; bitsandbytes' bytes.

    Reference: Dettmers et al., QLoRA, 2023, arXiv:2305.14314.
    """

    double_quant: bool = True
    format = FORMATS["nf4"]


@dataclasses.dataclass(frozen=True)
class Int8(QuantSpec):
    """Blockwise symmetric int8, `round(127 / absmax * x)`. Reference: QLoRA, arXiv:2305.14314, equation 1."""

    format = FORMATS["int8"]


@dataclasses.dataclass(frozen=True)
class Int4(QuantSpec):
    """Blockwise symmetric int4, `round(7 / absmax * x)`."""

    format = FORMATS["int4"]


SPECS: Mapping[str, type[QuantSpec]] = {"nf4": NF4, "int8": Int8, "int4": Int4}
"""Name on the command line -> spec."""
