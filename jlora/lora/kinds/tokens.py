"""`TokensWeight`: an embedding, or an output head, of which the rows of some tokens are trained."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, Float
from jlora.lora.kinds.base import AdaptedWeight, frozen, kind, trained
from jlora.lora.seam import embed, linear
from jlora.weight import Parts, as_dense, dense_matmul

EMBEDDING, HEAD = 0, 1
"""Axis of the tokens, in an embedding [vocab, d_model] and in a head's kernel [d_model, vocab]."""


@kind
class TokensWeight(AdaptedWeight):
    """Stands for `base` with the rows of some tokens replaced: PEFT's `trainable_token_indices`.

    A head that is tied to an embedding has the rows too, as in PEFT: they are the same tokens.
    """

    WHOLE = True
    in_part = True

    base: Float[Array, "..."] = frozen()
    """The original, [vocab, d_model] or [d_model, vocab]."""
    rows: Float[Array, "tokens d_model"] = trained()
    """Trained; float32, those of the base at first."""
    indices: tuple[int, ...]
    """The token of each row."""
    axis: int

    @classmethod
    def of(cls, leaf: Array, indices: tuple[int, ...], axis: int) -> "TokensWeight":
        rows = jnp.take(leaf, np.asarray(indices), axis=axis).astype(jnp.float32)
        return cls(base=leaf, rows=rows if axis == EMBEDDING else rows.T, indices=indices, axis=axis)

    def matmul(self, x, *, transpose, out_dtype):
        if transpose != (self.axis == EMBEDDING):  # a product over the tokens, which no model has
            return dense_matmul(x, self.dense(x.dtype), transpose=transpose, out_dtype=out_dtype)
        y = linear(x, jax.lax.stop_gradient(self.base), transpose=transpose, out_dtype=out_dtype)
        return y.at[..., np.asarray(self.indices)].set(linear(x, self.rows, transpose=True, out_dtype=out_dtype))

    def take(self, ids):
        order = np.argsort(self.indices)
        known = jnp.asarray(np.asarray(self.indices)[order])
        place = jnp.minimum(jnp.searchsorted(known, ids), len(order) - 1)
        own = embed(place, self.rows[order]).astype(self.dtype)
        return jnp.where((known[place] == ids)[..., None], own, embed(ids, self.base))

    def dense(self, dtype=None):
        base, at = as_dense(self.base, jnp.float32), np.asarray(self.indices)
        whole = base.at[at].set(self.rows) if self.axis == EMBEDDING else base.at[:, at].set(self.rows.T)
        return whole.astype(dtype or self.dtype)

    def as_head(self):
        return self

    def parts(self):
        return Parts(self.dense())

    def peft_tensors(self, place):
        return {"rows": (".token_adapter.trainable_tokens_delta", False)}
