"""What codes stand for: the tables of values, the code nearest to a value, and the value of a code."""

from collections.abc import Callable, Mapping
from importlib.resources import files

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
"""bitsandbytes' signed 8-bit dynamic map (`create_dynamic_map()`), float32 [256], for the absmax of double quantization and for
first moments.

Stored rather than computed: a float32 regeneration differs in the last bit of some entries.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, arXiv:2110.02861, section 2.
"""

UNSIGNED_DYNAMIC_CODE = np.load(str(files("jlora.quant") / "dynamic_map_unsigned.npy"))
"""The same without a sign (`create_dynamic_map(signed=False)`), from 0 to 1, for second moments."""


E2M1_CODE = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32
)
"""4-bit floats: the code's bits are a sign, two of exponent (bias 1) and one of mantissa; neither infinities nor NaN.

Reference: Open Compute Project, OCP Microscaling Formats (MX) Specification, version 1.0, 2023, section 5.3.3.
"""


def nearest_code(scaled: Array, code: np.ndarray) -> Array:
    """The index, uint8, of the entry of the increasing `code` nearest to each value; a tie goes to the lower one."""
    thresholds = (code[1:] + code[:-1]) / np.float32(2)
    if code.size > 16:
        return _search(jnp.asarray(thresholds), scaled)
    # Counting is one fused pass of comparisons; a binary search gathers.
    return sum(((scaled > t).astype(jnp.uint8) for t in thresholds), start=jnp.zeros(scaled.shape, jnp.uint8))


def _search(thresholds: Array, x: Array) -> Array:
    """How many of the increasing 2^n - 1 `thresholds` are below each value, uint8.

    By halving, unrolled: a pass over the elements that is fused with what makes and takes them, where a loop would write them out.
    """
    half = (len(thresholds) + 1) // 2
    below = jnp.where(x > thresholds[half - 1], half, 0)
    while half := half // 2:
        below = jnp.where(x > thresholds.at[below + (half - 1)].get(mode="promise_in_bounds"), below + half, below)
    return below.astype(jnp.uint8)


def nearest_e2m1(scaled: Array) -> Array:
    """The E2M1 code, uint8, nearest to each value in [-6, 6]; a tie goes to the even mantissa, which is the even code."""
    magnitudes = E2M1_CODE[:8]
    thresholds = (magnitudes[1:] + magnitudes[:-1]) / np.float32(2)
    x = jnp.abs(scaled)
    passed = ((x >= t if i % 2 else x > t) for i, t in enumerate(thresholds))
    magnitude = sum((p.astype(jnp.uint8) for p in passed), start=jnp.zeros(scaled.shape, jnp.uint8))
    return magnitude | (jnp.signbit(scaled).astype(jnp.uint8) << 3)


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


def choose(code: np.ndarray, index: Array) -> Array:
    """`code[index]` for a table of 16 values, as is fastest on the backend."""
    return DECODERS.get(jax.default_backend(), look_up)(code, index)
