"""Where calculating again saves nothing."""

import jax

from jlora.models.attention import attention_kernel
from jlora.models.causal import CausalLM


def remat_without_effect(model: CausalLM, *, stacked: bool, length: int) -> str | None:
    """Why `model.remat` changes nothing in a step of rows of `length` tokens, and what to do; None: it does."""
    remat, backend = model.remat, jax.default_backend()
    if remat in ("dots", "layer") and backend == "cpu" and not stacked:
        # It drops the barriers that keep what is recomputed apart from what was computed.
        instead = "Use --form stacked, or --remat attention"
        return f"`remat` {remat!r} has no effect: of unrolled layers XLA:CPU keeps everything. {instead}."
    if remat == "attention" and backend != "cpu":
        head_dim = model.config.kv_shape[1]
        kernel = attention_kernel(
            dtype=model.dtype, head_dim=head_dim, seq=length, kv_len=length, masked=True, backend=backend
        )
        if kernel == "cudnn":
            return "`remat` 'attention' has no effect: cuDNN's attention keeps no weights anyway. Use --remat dots or layer."
    return None
