"""`LowRankWeight`: what every kind computes whose update is a product of two factors that are never multiplied."""

import abc
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._typing import AnyArray, Array, Float
from jlora.lora.kinds.base import AdaptedWeight
from jlora.lora.seam import embed, linear
from jlora.weight import Inseparable, Parts, Update, as_dense, parts_of

product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""Of factors, where the dense weight is wanted."""


class LowRankWeight(AdaptedWeight):
    """Stands for `base + scaling * A @ B`, where A and B are `factors()`: children, or made of them. The sum is never formed by
    `matmul`, so no gradient or residual has the base's shape."""

    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """As the config has it: the last axis of the first trained child, unless a kind says otherwise."""
        return self.representative.shape[-1]

    @abc.abstractmethod
    def factors(self) -> tuple[Float[Array, "*stack d_in inner"], Float[Array, "*stack inner d_out"]]:
        """A and B."""

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"rank": self.rank, "scaling": self.scaling}

    def update(self, x: AnyArray, *, transpose: bool) -> Array:
        """`scaling * x A B`, float32."""
        first, second = self.factors()[:: -1 if transpose else 1]
        # Two skinny products, in this order: A @ B would cost as much as the base and gradients of its size.
        inner = linear(x, first, transpose=transpose)
        return self.scaling * linear(inner, second, transpose=transpose, out_dtype=jnp.float32)

    def matmul(self, x, *, transpose, out_dtype):
        # A CPU writes every product in float32, and rounds their sum for less than each of them; a GPU writes what it is asked.
        kept = jnp.float32 if jax.default_backend() == "cpu" else out_dtype
        base = linear(x, self.base, transpose=transpose, out_dtype=kept)
        return (base + self.update(self.drop(x), transpose=transpose).astype(kept)).astype(out_dtype)

    def take(self, ids):
        rows, (a, b) = embed(ids, self.base), self.factors()
        return rows + (self.scaling * linear(embed(ids, a), b)).astype(rows.dtype)

    def dense(self, dtype=None):
        total = as_dense(self.base, jnp.float32) + self.scaling * self.delta()
        return total.astype(dtype or self.dtype)

    def delta(self) -> Array:
        """`A @ B` with the axes of the base, float32."""
        return product(*self.factors())

    def parts(self) -> Parts:
        inner = parts_of(self.base, self.roles.lstrip("b"))
        if inner.magnitude is not None or any(update.key is not None for update in inner.updates):
            raise Inseparable(self, "is an update of a weight that is more than a sum itself, DoRA or with dropout")
        return inner._replace(updates=(*inner.updates, self.as_update()))

    def as_update(self) -> Update:
        """Its own among the parts."""
        a, b = self.factors()
        return Update(a, b, self.scaling, self.dropout, self.key if self.dropout else None)
