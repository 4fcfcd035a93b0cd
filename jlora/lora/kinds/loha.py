"""`LohaWeight`: the update is the elementwise product of two low-rank products."""

import jax
import jax.numpy as jnp

from jlora._typing import Array, Float, Key
from jlora.lora.kinds.base import PeftForm, frozen, kind, trained
from jlora.lora.kinds.low_rank import LowRankWeight, product
from jlora.weight import Update, Weight

_CHILDREN = ("hada_w1_b", "hada_w1_a", "hada_w2_a", "hada_w2_b")


@kind
class LohaWeight(LowRankWeight):
    """Stands for `base + scaling * (hada_w1_b @ hada_w1_a) * (hada_w2_b @ hada_w2_a)`, the second `*` elementwise.

    An elementwise product of two matrices of rank r has rank r**2 at most, and is one product of two factors whose r**2 columns
    and rows are the products of theirs, pair by pair: so it is computed, and no matrix of the base's size is made.

    References: Hyeon-Woo et al., FedPara, 2021, arXiv:2108.06098, section 2.2; Yeh et al., LyCORIS, 2023, arXiv:2309.14859.
    """

    NAME = "loha"
    PEFT = PeftForm(
        type="LOHA",
        fields={
            "rank": ("r", 8),
            "alpha": ("alpha", 8),
            "dropout": ("rank_dropout", 0.0),
            "rank_pattern": ("rank_pattern", {}),
            "alpha_pattern": ("alpha_pattern", {}),
        },
        tensors={name: (f".{name}", True) for name in _CHILDREN},
        idle=("init_weights", "use_effective_conv2d"),
        training=("module_dropout",),
        written={"module_dropout": 0.0, "use_effective_conv2d": False, "init_weights": True},
    )

    base: Float[Array, "*stack d_in d_out"] | Weight = frozen()
    hada_w1_b: Float[Array, "*stack d_in rank"] = trained()
    hada_w1_a: Float[Array, "*stack rank d_out"] = trained()
    hada_w2_a: Float[Array, "*stack rank d_out"] = trained()
    hada_w2_b: Float[Array, "*stack d_in rank"] = trained()
    """Zero at first."""
    scaling: float
    """`alpha / rank`."""
    dropout: float = 0.0
    """Probability that an output of the update is dropped: PEFT's `rank_dropout`."""
    key: Key[Array, "*stack"] | None = frozen(default=None)

    @classmethod
    def draw(cls, key, d_in, d_out, rank):
        def uniform(key, shape, fan_in):  # PyTorch's kaiming_uniform_(a=sqrt(5))
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        keys = jax.random.split(key, 3)
        return {
            "hada_w1_a": uniform(keys[0], (rank, d_out), rank),
            "hada_w1_b": uniform(keys[1], (d_in, rank), d_in),
            "hada_w2_a": uniform(keys[2], (rank, d_out), rank),
            "hada_w2_b": jnp.zeros((d_in, rank), jnp.float32),
        }

    def factors(self):
        a = self.hada_w1_b[..., :, None] * self.hada_w2_b[..., None, :]
        b = self.hada_w1_a[..., :, None, :] * self.hada_w2_a[..., None, :, :]
        return a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:-3], -1, b.shape[-1])

    def update(self, x, *, transpose):
        if transpose:
            return super().update(x * self._kept(x.shape[-1]).astype(x.dtype), transpose=True)
        update = super().update(x, transpose=False)
        return update * self._kept(update.shape[-1]).astype(update.dtype)

    def drop(self, x):
        return x  # outputs are dropped, not inputs

    def _kept(self, d_out: int) -> Array:
        """What each output [*stack, out] is multiplied by: 0 or, so that their mean stays, more than 1 (as in PEFT)."""
        if self.key is None or self.dropout == 0.0:
            return jnp.ones((), jnp.float32)
        draw = lambda key: jax.random.bernoulli(key, 1.0 - self.dropout, (d_out,))  # noqa: E731
        for _ in self.key.shape:
            draw = jax.vmap(draw)
        kept = draw(self.key).astype(jnp.float32)
        return kept / jnp.maximum(kept.mean(axis=-1, keepdims=True), 1.0 / d_out)

    def delta(self):
        return product(self.hada_w1_b, self.hada_w1_a) * product(self.hada_w2_b, self.hada_w2_a)

    def as_update(self):
        a, b = self.factors()
        kept = self._kept(b.shape[-1])
        return Update(a, b * kept[..., None, :] if kept.ndim else b, self.scaling)
