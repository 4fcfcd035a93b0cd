"""Weights that are read or written must be finite.

Those of a checkpoint are looked at while they are in memory anyway, at a few percent of the time to read them.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, PyTree

_SMALL = 1 << 16
"""Elements below which compiling for a shape costs more than NumPy."""


class FiniteCheck:
    """Collects arrays by the name of their tensor; nothing waits for an accelerator before the end."""

    def __init__(self):
        self._found: dict[str, Array | np.bool] = {}

    def see(self, name: str, value: PyTree) -> None:
        """`value`: an array, or a quantized weight with float leaves among its own."""
        for leaf in jax.tree.leaves(value):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                small = leaf.size < _SMALL
                found = np.isfinite(np.asarray(leaf, np.float32)).all() if small else _is_finite(leaf)
                self._found[name] = found if name not in self._found else self._found[name] & found

    def finish(self, where: str | os.PathLike) -> None:
        """Raises a ValueError that names the tensors of `where` with values that are NaN or infinite."""
        bad = [name for name, found in jax.device_get(self._found).items() if not found]
        if bad:
            raise ValueError(
                f"Weights in {os.fspath(where)!r} are NaN or infinite: {', '.join(bad[:5])}"
                f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}. Nothing was loaded. Download or write "
                "them again; weights that training has diverged in cannot be repaired."
            )


@jax.jit
def _is_finite(x: Array) -> Array:
    """Zero times NaN or infinity is NaN, which a sum keeps: a third of the time of `isfinite(x).all()`."""
    return jnp.isfinite(jnp.sum(x.astype(jnp.float32) * 0))


def refuse_not_finite(name: str, array: np.ndarray) -> None:
    """Raises a ValueError when a tensor that is to be written has a value that is NaN or infinite."""
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name!r} is not finite: training has diverged, and nothing was written. Export an earlier checkpoint."
        )
