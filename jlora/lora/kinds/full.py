"""`FullWeight`: a leaf that is trained as a whole."""

import jax.numpy as jnp

from jlora._typing import Array, Float
from jlora.lora.kinds.base import AdaptedWeight, frozen, kind, trained
from jlora.lora.seam import embed
from jlora.weight import Parts, dense_matmul


@kind
class FullWeight(AdaptedWeight):
    """A dense leaf that is trained as a whole, its frozen original beside it: PEFT's `bias` and `modules_to_save`.

    Stands for `value`, in the dtype of `base`.
    """

    WHOLE = True

    base: Float[Array, "*shape"] = frozen()
    """The original: what `remove_lora` gives, and what a tied output head goes on using, as in PEFT."""
    value: Float[Array, "*shape"] = trained()
    """Trained; float32, equal to `base` at first."""

    @classmethod
    def of(cls, leaf: Array) -> "FullWeight":
        return cls(base=leaf, value=jnp.array(leaf, jnp.float32))  # a copy: it is trained, and perhaps donated

    def matmul(self, x, *, transpose, out_dtype):
        return dense_matmul(x, self.value, transpose=transpose, out_dtype=out_dtype)

    def take(self, ids):
        return embed(ids, self.value).astype(self.dtype)

    def dense(self, dtype=None):
        return self.value.astype(dtype or self.dtype)

    def parts(self):
        return Parts(self.dense())

    def peft_tensors(self, place):
        layer = ".base_layer" if place.updated else ""
        name = "bias" if place.leaf == "bias" else "weight"
        return {"value": (f"{layer}.{name}", place.leaf == "kernel" and not place.stored_in_out)}
