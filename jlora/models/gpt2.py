"""GPT-2: LayerNorm before, learned positions, one fused query-key-value projection, tanh GELU.

Reference: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; names as in Hugging Face's checkpoints.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora._typing import AnyArray, Array, Bool, Float, Int, Params
from jlora.lora import linear
from jlora.models.config import MAX_LAYERS, ConfigReader
from jlora.models.layers import (
    Embed,
    Head,
    KVCache,
    LayerNorm,
    Linear,
    Remat,
    attend,
    frozen_base,
    make_context,
    run_layers,
)
from jlora.weight import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Field names are those of Hugging Face's `config.json`."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    model_type = "gpt2"
    depth_field = "n_layer"
    layers_path = "transformer/h"
    learned_positions = True  # an embedding, which has no rows beyond `max_length`
    embedding_path = "transformer/wte/embedding"
    transposed_kernels = False  # Hugging Face's Conv1D stores [in, out], as we do

    @classmethod
    def from_hf(cls, reader: ConfigReader) -> "GPT2Config":
        reader.require("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh"))
        reader.require("scale_attn_weights", True, (True,))
        reader.require("scale_attn_by_inverse_layer_idx", False, (False,))
        reader.require("add_cross_attention", False, (False,))
        width = reader.integer("n_embd", 768)
        return cls(
            vocab_size=reader.integer("vocab_size", 50257),
            n_positions=reader.integer("n_positions", 1024),
            n_embd=width,
            n_layer=reader.integer("n_layer", 12, most=MAX_LAYERS),
            n_head=reader.divisor("n_head", 12, of=width, of_name="n_embd"),
            n_inner=reader.integer("n_inner", 4 * width),
            layer_norm_epsilon=reader.number("layer_norm_epsilon", 1e-5, most=1.0),
            tie_word_embeddings=reader.flag("tie_word_embeddings", True),
            bos_token_id=reader.token_id("bos_token_id"),
            eos_token_id=reader.token_ids("eos_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            **dataclasses.asdict(self),
            "n_ctx": self.n_positions,  # llama.cpp's converter reads it; transformers 5 no longer writes it
        }

    @property
    def max_length(self) -> int:
        return self.n_positions

    @property
    def depth(self) -> int:
        return self.n_layer

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(kv_heads, head_dim)"""
        return self.n_head, self.n_embd // self.n_head


class Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, cache, context):
        heads, head_dim = self.config.kv_shape
        qkv = Linear(3 * self.config.n_embd, use_bias=True, name="c_attn")(x)
        q, k, v = (part.reshape(*x.shape[:-1], heads, head_dim) for part in jnp.split(qkv, 3, axis=-1))
        y, cache = attend(q, k, v, context, cache)
        return Linear(self.config.n_embd, use_bias=True, name="c_proj")(y.reshape(x.shape)), cache


@jax.checkpoint
def gelu(x: Float[Array, "*batch d_ff"]) -> Float[Array, "*batch d_ff"]:
    """The tanh form, computed in float32.

    Its backward pass starts from `x` again. Autodiff would keep three arrays like it, 8.6 MB a layer with 512 bfloat16
    tokens, whose writing costs more than a second tanh: 48 against 54 ms of CPU time a layer, float32 118 against 121.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x):
        hidden = Linear(self.config.n_inner, use_bias=True, name="c_fc")(x)
        return Linear(self.config.n_embd, use_bias=True, name="c_proj")(gelu(hidden))


class Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, cache: KVCache | None, context):
        eps = self.config.layer_norm_epsilon
        y, cache = Attention(self.config, name="attn")(LayerNorm(eps=eps, name="ln_1")(x), cache, context)
        x = x + y
        return x + MLP(self.config, name="mlp")(LayerNorm(eps=eps, name="ln_2")(x)), cache


class Transformer(nn.Module):
    config: GPT2Config
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(self, input_ids, context, cache):
        config = self.config
        x = Embed(config.vocab_size, config.n_embd, self.dtype, name="wte")(input_ids)
        x = x + Embed(config.n_positions, config.n_embd, self.dtype, name="wpe")(context.positions)
        x, cache = run_layers(self, "h", Block, config.n_layer, self.remat, x, cache, context, config=config)
        return LayerNorm(eps=config.layer_norm_epsilon, name="ln_f")(x), cache


class GPT2(nn.Module):
    """`model.apply({"params": params}, input_ids) -> float32 logits [batch, seq, vocab]`."""

    config: GPT2Config
    dtype: Any = jnp.float32
    """Dtype of the activations: float32 or bfloat16."""
    remat: Remat = "none"

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

        Positions past the last learned one are clipped to it: callers check `config.max_length`.
        """
        context = make_context(input_ids, positions, segment_ids, attention_mask, cache)
        transformer = Transformer(self.config, self.dtype, self.remat, name="transformer")
        out, new_cache = transformer(input_ids, context, cache)
        if head:
            if not self.config.tie_word_embeddings:
                Head((self.config.n_embd, self.config.vocab_size), name="lm_head")()
            weight, transpose = self.output_head(self.variables["params"])
            out = linear(out, weight, transpose=transpose, out_dtype=jnp.float32)
        return out if cache is None else (out, new_cache)

    def output_head(self, params: Params) -> tuple[Array | Weight, bool]:
        """(weight, transpose) of the product that makes logits of hidden states."""
        if self.config.tie_word_embeddings:
            return frozen_base(params["transformer"]["wte"]["embedding"]), True
        return params["lm_head"]["kernel"], False
