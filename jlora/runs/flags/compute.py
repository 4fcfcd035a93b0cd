"""In which form the model is held and computed."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jlora._typing import DTypeLike, DTypeName
from jlora.models import Model, Remat, remat_without_effect
from jlora.quant import FormatName, Kept
from jlora.train import dynamic_loss_scale, offloaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """In which form the model is held and computed."""

    quantize: FormatName | Kept | None = None
    """Pack the frozen linear kernels: nf4 is QLoRA, 4.127 bits a parameter; int4-g128 has 4.125, mxfp4 4.25, int8 8.5;
    q4_0 and the like are ggml's. keep: a GGUF file's own blocks. A bitsandbytes 4-bit checkpoint is used as it is."""
    dtype: DTypeName = "auto"
    """Of the base and the activations; auto: float32 on CPU, bfloat16 elsewhere. float16, for a GPU without bfloat16: the loss is
    scaled, and steps that overflow are left out. Adapters are trained in float32."""
    form: Literal["auto", "per-layer", "stacked"] = "auto"
    """Layers unrolled, or stacked under one scan, which compiles in the time of one layer; auto: stacked, unless single layers are
    named or packed differently, or the CPU has no bfloat16 and the model is in it."""
    remat: Remat = "none"
    """What the backward pass computes again, for less memory: attention: its weights, which long rows have most of (a GPU's own
    attention in 16 bits never keeps them); dots: all of a layer but the outputs of its linear modules; layer: all of it."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory between steps. No effect on a CPU, which has one memory."""

    def around(self, tx: optax.GradientTransformation, dtype: DTypeLike) -> optax.GradientTransformation:
        """The optimizer of a model in `dtype`."""
        if jnp.dtype(dtype) == jnp.float16:
            tx = dynamic_loss_scale(tx)
        return offloaded(tx) if self.offload_optimizer and jax.default_backend() != "cpu" else tx

    def without_effect(self, model: Model, *, stacked: bool, length: int) -> Iterator[str]:
        """What is asked for in vain on this backend, of rows of `length` tokens, and what to do."""
        if said := remat_without_effect(model, stacked=stacked, length=length):
            yield said
        if jax.default_backend() != "cpu":
            return
        if self.offload_optimizer:
            yield "`offload_optimizer` has no effect on a CPU, whose memory is the host's. Leave it out."
        if model.dtype == jnp.float16:
            yield "`dtype` float16 is slow on a CPU, which converts it to float32 for each operation. Use --dtype float32."
