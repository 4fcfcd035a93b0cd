"""`LoraWeight`: a frozen weight plus a low-rank update that is never formed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jlora._typing import Array, Float, Key
from jlora._weight import Weight
from jlora.lora.seam import embed, linear


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "lora_A", "lora_B", "key"),
    meta_fields=("scaling", "dropout"),
)
@dataclasses.dataclass(frozen=True)
class LoraWeight(Weight):
    """Stands for `base + scaling * lora_A @ lora_B`.

    Invariants: the sum is never formed by `matmul`; `base` gets no gradient from `split`; with `key` None the value
    is deterministic. Every child may carry the same leading axes (stacked layers). `split` leaves None in the place of
    the children that went to the other side.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685, section 4.1.
    """

    base: Float[Array, "*stack d_in d_out"] | Weight
    """The frozen weight: a dense array or another `Weight` (a quantized base makes this QLoRA)."""
    lora_A: Float[Array, "*stack d_in rank"]
    """Trained; float32 whatever the base."""
    lora_B: Float[Array, "*stack rank d_out"]
    """Trained; float32, zero at first, so that training starts at the base model."""
    scaling: float
    """`alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
    dropout: float = 0.0
    """Probability that an element of the update's input is dropped, when there is a key."""
    key: Key[Array, "*stack"] | None = None
    """This step's dropout key; put there by `with_dropout` and nowhere else."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def size(self) -> int:
        return sum(0 if child is None else child.size for child in (self.base, self.lora_A, self.lora_B))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-1]

    def matmul(self, x, *, transpose, out_dtype):
        first, second = (self.lora_B, self.lora_A) if transpose else (self.lora_A, self.lora_B)
        # Two skinny products, in this order: A @ B would cost as much as the base and gradients of its size.
        update = linear(linear(self._drop(x), first, transpose=transpose), second, transpose=transpose)
        base = linear(x, self.base, transpose=transpose, out_dtype=out_dtype)
        return base + (self.scaling * update).astype(out_dtype)

    def take(self, ids):
        rows = embed(ids, self.base)
        return rows + (self.scaling * linear(embed(ids, self.lora_A), self.lora_B)).astype(rows.dtype)

    def dense(self, dtype=None):
        base = self.base.dense(jnp.float32) if isinstance(self.base, Weight) else self.base.astype(jnp.float32)
        update = jnp.matmul(self.lora_A, self.lora_B, precision=jax.lax.Precision.HIGHEST)
        return (base + self.scaling * update).astype(dtype or self.dtype)

    def cast(self, dtype):
        if self.base is None:  # the adapter half of `split`
            return self
        base = self.base.cast(dtype) if isinstance(self.base, Weight) else self.base.astype(dtype)
        return dataclasses.replace(self, base=base)

    def _drop(self, x):
        if self.key is None or self.dropout == 0.0:
            return x
        kept = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))

    def __repr__(self):
        rank = "?" if self.lora_A is None else self.rank
        return f"LoraWeight(base={self.base!r}, rank={rank}, scaling={self.scaling}, dropout={self.dropout})"
