"""`MissWeight`: one trained block, shared by all pieces that the inputs are cut into."""

import jax.numpy as jnp

from jlora._typing import Array, Float, Key
from jlora.lora.kinds.base import PeftForm, frozen, kind, trained
from jlora.lora.kinds.low_rank import LowRankWeight
from jlora.lora.seam import linear
from jlora.weight import Inseparable, Weight


@kind
class MissWeight(LowRankWeight):
    """Stands for `base` plus `miss_block [rank, out]` on every `rank` of its rows: row i of the update is row `i % rank` of it.

    A product needs the sums of every rank-th input only. (PEFT's variants "bat" and "mini" are not represented.)

    Reference: Kang and Yin, MiSS: Revisiting the trade-off in LoRA with an efficient shard-sharing structure, 2024,
    arXiv:2409.15371.
    """

    NAME = "miss"
    PEFT = PeftForm(
        type="MISS",
        fields={"rank": ("r", 64), "dropout": ("miss_dropout", 0.0)},
        tensors={"miss_block": (".miss_block", False)},
        neutral={"init_weights": (True, False), "bias": (None, "none")},
        idle=("mini_r",),
        written={"init_weights": True, "mini_r": 1, "bias": "none"},
    )

    base: Float[Array, "*stack d_in d_out"] | Weight = frozen()
    miss_block: Float[Array, "*stack rank d_out"] = trained()
    """Zero at first."""
    dropout: float = 0.0
    """Probability that an element of the update's input is dropped."""
    key: Key[Array, "*stack"] | None = frozen(default=None)

    @property
    def rank(self):
        return self.miss_block.shape[-2]

    @classmethod
    def draw(cls, key, d_in, d_out, rank):
        if rank > d_in:
            raise ValueError(
                f"`kind` 'miss' takes a `rank` of at most a kernel's inputs; got {rank} for {d_in} inputs."
            )
        return {"miss_block": jnp.zeros((rank, d_out), jnp.float32)}

    def factors(self):
        if self.base is None:
            raise Inseparable(
                self, "is one half of what `split` made, and its inputs are in the other: `combine` them first"
            )
        rank, d_in = self.rank, self.shape[-2]
        row = jnp.arange(d_in)[:, None] % rank == jnp.arange(rank)
        return jnp.broadcast_to(row.astype(jnp.float32), (*self.stack, d_in, rank)), self.miss_block

    def update(self, x, *, transpose):
        rank, d_in = self.rank, self.shape[-2]
        pieces = -(-d_in // rank)
        if transpose:
            rows = linear(x, self.miss_block, transpose=True)
            return jnp.tile(rows, pieces)[..., :d_in]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pieces * rank - d_in)])
        sums = jnp.sum(padded.reshape(*x.shape[:-1], pieces, rank), axis=-2, dtype=jnp.float32)
        return linear(sums.astype(x.dtype), self.miss_block)
