"""Numbers that are given from outside, and those that go out as JSON."""

import json
import math
from typing import Any

MAX_SEED = 2**32 - 1
"""`jax.random.key` keeps 32 bits of a seed, unless `jax_enable_x64` is set: 2**32 + 1 would be the seed 1."""

MAX_COUNT = 2**31 - 1
"""Of steps, tokens and rows, which are int32 on the device."""


def check_seed(seed: Any) -> int:
    """The seed.

    Raises:
        ValueError: when it is not an integer in 0..MAX_SEED, with the value.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed.__index__() <= MAX_SEED:
        raise ValueError(f"`seed` must be an integer in 0..{MAX_SEED}, of which no two are alike; got {seed!r}.")
    return seed.__index__()


def json_number(value: float) -> float | None:
    """The value, or None (null) where it is not finite: JSON has no NaN and no Infinity."""
    return value if math.isfinite(value) else None


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON of lists and dictionaries, floats that are not finite as null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return json_number(value) if isinstance(value, float) else value
