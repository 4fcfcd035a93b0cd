"""Numbers that are given from outside, and those that go out as JSON."""

import json
import math

import jax
import jax.numpy as jnp

from jlora._typing import Array, Json, PyTree
from jlora.tree.paths import path_string

MAX_SEED = 2**32 - 1
"""`jax.random.key` keeps 32 bits of a seed, unless `jax_enable_x64` is set: 2**32 + 1 would be the seed 1."""

MAX_COUNT = 2**31 - 1
"""Of steps, tokens and rows, which are int32 on the device."""


IGNORED = -100
"""The label of a position that is not supervised, as in transformers and torch.nn.CrossEntropyLoss."""


def check_seed(seed: Json) -> int:
    """The seed.

    Raises:
        ValueError: when it is not an integer in 0..MAX_SEED, with the value.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ValueError(f"`seed` must be an integer; got {seed!r}.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0; got {seed}. Give an integer in 0..{MAX_SEED}.")
    if seed > MAX_SEED:
        raise ValueError(f"`seed` must be at most {MAX_SEED}; got {seed}, whose lower 32 bits alone would count.")
    return seed.__index__()


def json_number(value: float) -> float | None:
    """The value, or None (null) where it is not finite: JSON has no NaN and no Infinity."""
    return value if math.isfinite(value) else None


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON of lists and dictionaries, floats that are not finite as null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return json_number(value) if isinstance(value, float) else value


class NotFinite(ValueError):
    """Something computed from `params` is NaN or infinite: `value`, which `what` names. Says which weight is to blame."""

    def __init__(self, what: str, value: float, params: PyTree):
        self.value = value
        where = first_not_finite(params)
        cause = (
            "every weight is finite, so the activations overflow. Compute in float32 (`--dtype float32`)."
            if where is None
            else f"{where!r} has values that are NaN or infinite. Download it again, or take an earlier checkpoint."
        )
        super().__init__(f"{what} {value}: {cause}")


def first_not_finite(tree: PyTree) -> str | None:
    """The path of the first array with a value that is NaN or infinite, or None. Reads every array."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(_all_finite(leaf)):
            return path_string(path)
    return None


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))
