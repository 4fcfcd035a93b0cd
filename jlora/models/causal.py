"""A causal language model: a trunk that gives hidden states, and the output head."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from jlora._typing import AnyArray, Array, Bool, DTypeLike, Float, Int, Params, PyTree
from jlora.lora import linear
from jlora.models.config import ModelConfig
from jlora.models.context import KVCache, make_context
from jlora.models.layers import Head, Remat
from jlora.weight import is_weight


class CausalLM(nn.Module):
    """`model.apply({"params": params}, input_ids) -> float32 logits [batch, seq, vocab]`."""

    config: Any
    """The graph's `ModelConfig`."""
    dtype: DTypeLike = jnp.float32
    """Dtype of the activations: float32, bfloat16 or float16."""
    remat: Remat = "none"

    graph: ClassVar[type[nn.Module]]
    """The trunk: `graph(config, dtype, remat)(input_ids, context, cache) -> (hidden states, updated cache)`."""

    @nn.compact
    def __call__(
        self,
        input_ids: Int[AnyArray, "batch seq"],
        *,
        positions: Int[AnyArray, "batch seq"] | None = None,
        segment_ids: Int[AnyArray, "batch seq"] | None = None,
        attention_mask: Int[AnyArray, "batch seq"] | Bool[AnyArray, "batch seq"] | None = None,
        cache: list[KVCache] | KVCache | None = None,
        head: bool = True,
    ) -> Any:
        """Logits; `head=False`: the final hidden states. With a cache: (that, the updated cache).

        `attention_mask` as in transformers: 1 for tokens, 0 for padding on either side; positions count from the row's start.
        """
        config: ModelConfig = self.config
        context = make_context(input_ids, positions, segment_ids, attention_mask, cache)
        out, new_cache = self.graph(config, self.dtype, self.remat, name=config.trunk)(input_ids, context, cache)
        if head:
            if not config.tie_word_embeddings:
                Head((config.width, config.vocab_size), name="lm_head")()
            out = self.logits(self.variables["params"], out)
        return out if cache is None else (out, new_cache)

    @nn.nowrap
    def output_head(self, params: Params) -> tuple[PyTree, bool]:
        """(weight, transpose) of the product that makes logits of hidden states; of abstract parameters an abstract weight."""
        if not self.config.tie_word_embeddings:
            return params["lm_head"]["kernel"], False
        table: Any = params
        for name in self.config.embedding_path.split("/"):
            table = table[name]
        return (table.as_head() if is_weight(table) else table), True

    @nn.nowrap
    def logits(self, params: Params, hidden: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of final hidden states."""
        weight, transpose = self.output_head(params)
        return capped(linear(hidden, weight, transpose=transpose, out_dtype=jnp.float32), self.config.logit_cap)


def capped(logits: Float[Array, "*batch vocab"], cap: float | None) -> Float[Array, "*batch vocab"]:
    return logits if cap is None else cap * jnp.tanh(logits / cap)
