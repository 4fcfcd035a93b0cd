"""In which form the model is held and computed."""

import dataclasses
from typing import Literal

from jlora.models import Remat
from jlora.quant import FormatName, Kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """In which form the model is held and computed."""

    quantize: FormatName | Kept | None = None
    """Pack the frozen linear kernels: nf4 is QLoRA, 4.127 bits a parameter; int4-g128 has 4.125, mxfp4 4.25, int8 8.5;
    q4_0 and the like are ggml's. keep: a GGUF file's own blocks. A bitsandbytes 4-bit checkpoint is used as it is."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the base and the activations; auto: float32 on CPU, bfloat16 elsewhere. Adapters are trained in float32."""
    form: Literal["auto", "per-layer", "stacked"] = "auto"
    """Layers unrolled, or stacked under one scan, which compiles in the time of one layer; auto: stacked, unless single layers are
    named or packed differently, or the CPU has no bfloat16 and the model is in it."""
    remat: Remat = "none"
    """What the backward pass computes again, for less memory: attention: its weights, which long rows have most of (a GPU's own
    attention in 16 bits never keeps them); dots: all of a layer but the outputs of its linear modules; layer: all of it."""
