"""Llama: RMSNorm before, rotary grouped-query attention, SwiGLU. Which families are rows of it: `jlora.models.families`.

References: Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783; Qwen2.5, arXiv:2412.15115; names as in
Hugging Face's checkpoints.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jlora._typing import DTypeLike
from jlora.models.causal import CausalLM
from jlora.models.config import ModelConfig
from jlora.models.context import KVCache, LayerKind, attend, contexts_of
from jlora.models.layers import Embed, Linear, Remat, RMSNorm, gated, run_layers
from jlora.models.rope import LinearScaling, Llama3Scaling, Rope, rotate

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The biases and norms say per projection what families differ in. What differs between layers is one item a layer, or
    one for all."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | LinearScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether queries and keys are normed, each head by itself, before they are rotated."""
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = (FULL,)
    """Whether a layer has the window: `FULL` or `SLIDING`."""
    no_rope_layers: tuple[int, ...] = (1,)
    """Whether a layer rotates queries and keys: 1, or else 0."""

    trunk = "model"
    embedding_path = "model/embed_tokens/embedding"
    depth_field = "num_hidden_layers"
    transposed_kernels = True
    learned_positions = False  # angles, which any position has

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.num_key_value_heads, self.head_dim

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer."""
        types, rotated = (each(items, self.depth) for items in (self.layer_types, self.no_rope_layers))
        return tuple(
            LayerKind(self.sliding_window if name == SLIDING else None, self.rope_of(name) if turns else None)
            for name, turns in zip(types, rotated, strict=True)
        )

    def rope_of(self, layer_type: str) -> Rope:
        """The rotation in layers of that type."""
        return Rope(self.rope_theta, self.rope_scaling)


def each(items: Sequence[Any], depth: int) -> tuple[Any, ...]:
    """One item a layer, of one a layer or one for all."""
    return tuple(items[i % len(items)] for i in range(depth))


class SelfAttention(nn.Module):
    config: LlamaConfig
    norm: Callable[..., nn.Module] = RMSNorm
    """Of queries and keys, where the config asks for it."""

    @nn.compact
    def __call__(self, x, cache, context):
        config = self.config

        def heads(name, n):
            y = Linear(n * config.head_dim, use_bias=config.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:-1], n, config.head_dim)

        q = heads("q_proj", config.num_attention_heads)
        k = heads("k_proj", config.num_key_value_heads)
        v = heads("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            q, k = (self.norm(config.rms_norm_eps, name=name)(y) for name, y in (("q_norm", q), ("k_norm", k)))
        q, k = rotate(q, context.rope), rotate(k, context.rope)
        y, cache = attend(q, k, v, context, cache, scale=config.attention_scale)
        y = y.reshape(*x.shape[:-1], config.num_attention_heads * config.head_dim)
        return Linear(config.hidden_size, use_bias=config.o_bias, name="o_proj")(y), cache


class MLP(nn.Module):
    config: LlamaConfig
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    """Of the gate, in float32."""

    @nn.compact
    def __call__(self, x):
        config = self.config
        gate = Linear(config.intermediate_size, use_bias=config.mlp_bias, name="gate_proj")(x)
        up = Linear(config.intermediate_size, use_bias=config.mlp_bias, name="up_proj")(x)
        hidden = gated(self.activation, gate, up)
        return Linear(config.hidden_size, use_bias=config.mlp_bias, name="down_proj")(hidden)


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cache: KVCache | None, context):
        eps = self.config.rms_norm_eps
        y, cache = SelfAttention(self.config, name="self_attn")(RMSNorm(eps, name="input_layernorm")(x), cache, context)
        x = x + y
        return x + MLP(self.config, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x)), cache


class Model(nn.Module):
    config: LlamaConfig
    dtype: DTypeLike
    remat: Remat

    @nn.compact
    def __call__(self, input_ids, context, cache):
        config = self.config
        x = Embed(config.vocab_size, config.hidden_size, self.dtype, name="embed_tokens")(input_ids)
        contexts, kinds = contexts_of(context, config.kinds, config.head_dim)
        x, cache = run_layers(self, "layers", Block, self.remat, x, cache, contexts, kinds, config=config)
        return RMSNorm(config.rms_norm_eps, name="norm")(x), cache


class Llama(CausalLM):
    graph = Model
