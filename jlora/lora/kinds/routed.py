"""`RoutedWeight`: several low-rank updates of one weight, side by side."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._typing import Array, Float, Int
from jlora.lora.kinds.base import AdaptedWeight, frozen, kind, trained
from jlora.lora.kinds.lora import LoraWeight
from jlora.lora.seam import embed, linear
from jlora.weight import Inseparable, Weight, as_dense, einsum


@kind
class RoutedWeight(AdaptedWeight):
    """Stands for `base + scalings[i] * lora_A[i] @ lora_B[i]`, where i is chosen by `ids`: once, or for each row of a batch.

    A choice is a value, not a shape: another one compiles nothing. Smaller ranks are filled up with zeros. Every child may
    carry the same leading axes (stacked layers).

    Reference: the products of a batch of adapters are those of Punica, Chen et al., 2023, arXiv:2310.18547, section 3.
    """

    base: Float[Array, "*stack d_in d_out"] | Weight = frozen()
    """Frozen, shared by all."""
    lora_A: Float[Array, "*stack adapters d_in rank"] = trained()
    """float32."""
    lora_B: Float[Array, "*stack adapters rank d_out"] = trained()
    """float32."""
    names: tuple[str, ...]
    """Of the adapters, in the order of the factors."""
    ranks: tuple[int, ...]
    """Of each adapter here; 0: it leaves this weight alone."""
    scalings: tuple[float, ...]
    """As in `LoraWeight`."""
    dropouts: tuple[float, ...]
    """As in `LoraWeight`; kept for `unstack_adapters`, as nothing is dropped here."""
    ids: Int[Array, "*stack"] | Int[Array, "*stack batch"] | None = frozen(default=None)
    """The choice, put there by `route`: int32, -1 for the base alone. None: not chosen yet."""

    @property
    def representative(self):
        a = self.lora_A
        return jax.ShapeDtypeStruct((*a.shape[:-3], *a.shape[-2:]), a.dtype)

    @property
    def per_row(self) -> bool:
        """Whether every row of a batch has its own choice."""
        return self.ids is not None and self.ids.ndim > self.lora_A.ndim - 3

    def matmul(self, x, *, transpose, out_dtype):
        base = linear(x, self.base, transpose=transpose, out_dtype=out_dtype)
        ids, scale = self._choice(x.shape[:-1])
        first, second = (self.lora_B, self.lora_A) if transpose else (self.lora_A, self.lora_B)
        if not self.per_row:
            inner = linear(x, first[ids], transpose=transpose)
            return base + (scale * linear(inner, second[ids], transpose=transpose)).astype(out_dtype)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        spec = "bti,boi->bto" if transpose else "bti,bio->bto"
        update: Any = einsum(spec, x.dtype, einsum(spec, x.dtype, rows, first[ids]), second[ids])
        return base + (scale[:, None, None] * update).astype(out_dtype).reshape(base.shape)

    def take(self, ids):
        rows = embed(ids, self.base)
        chosen, scale = self._choice(ids.shape)
        tokens = jnp.clip(ids, 0, self.shape[0] - 1)
        if not self.per_row:
            return rows + (scale * linear(self.lora_A[chosen][tokens], self.lora_B[chosen])).astype(rows.dtype)
        of_row = chosen.reshape(-1, *(1,) * (ids.ndim - 1))
        factors = self.lora_A[of_row, tokens].reshape(ids.shape[0], -1, self.lora_A.shape[-1])
        update: Any = einsum("bti,bio->bto", factors.dtype, factors, self.lora_B[chosen])
        return rows + (scale[:, None, None] * update).astype(rows.dtype).reshape(rows.shape)

    def dense(self, dtype=None):
        if self.per_row:
            raise ValueError(
                "Rows that go through different adapters have no one dense weight. Choose one first: "
                f"`merge(route(params, {self.names[0]!r}))`."
            )
        ids, scale = self._choice(())
        update = jnp.matmul(self.lora_A[ids], self.lora_B[ids], precision=jax.lax.Precision.HIGHEST)
        return (as_dense(self.base, jnp.float32) + scale * update).astype(dtype or self.dtype)

    def _choice(self, rows: tuple[int, ...]) -> tuple[Array, Array]:
        """(index into the factors, scaling), each [] or [batch]; the index is in range, and the scaling of "none" is 0."""
        if self.ids is None:
            raise ValueError(
                f"These parameters hold the adapters {', '.join(map(repr, self.names))} and none is chosen. Choose with "
                f"`route(params, {self.names[0]!r})`, or with a name for each row of the batch."
            )
        if self.per_row and (not rows or rows[0] != self.ids.shape[0]):
            raise ValueError(
                f"`route` chose adapters for a batch of {self.ids.shape[0]} rows; got a batch of shape {rows}. Give `route` one "
                "choice for each row."
            )
        return jnp.maximum(self.ids, 0), jnp.asarray((*self.scalings, 0.0), jnp.float32)[self.ids]

    @property
    def adapters(self):
        return self.names

    @property
    def dropout(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(self.dropouts)

    def with_key(self, key):
        raise ValueError(
            f"Adapters side by side are run without dropout; those here have the rates {self.dropouts}. Train one at a time, or "
            "give each `dropout=0.0`."
        )

    def parts(self):
        raise Inseparable(self, "holds several adapters, of which each product may take another")

    def choosing(self, ids):
        return dataclasses.replace(self, ids=jnp.broadcast_to(ids, (*self.lora_A.shape[:-3], *ids.shape)))

    def alone(self, name):
        """This weight with the adapter of that name only: a `LoraWeight`, or the base where it has none."""
        i = self.names.index(name)
        if self.ranks[i] == 0:
            return self.base
        rank = self.ranks[i]
        a, b = self.lora_A[..., i, :, :rank], self.lora_B[..., i, :rank, :]
        return LoraWeight(self.base, a, b, scaling=self.scalings[i], dropout=self.dropouts[i])

    def __repr__(self):
        return f"RoutedWeight(base={self.base!r}, adapters={dict(zip(self.names, self.ranks, strict=True))})"
