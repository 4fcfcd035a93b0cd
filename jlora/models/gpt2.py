"""GPT-2: LayerNorm before, learned positions, one fused query-key-value projection, tanh GELU.

Reference: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; names as in Hugging Face's checkpoints.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from jlora._typing import DTypeLike, JsonObject
from jlora.models.causal import CausalLM
from jlora.models.config import MAX_LAYERS, ConfigReader, ModelConfig
from jlora.models.context import KVCache, attend
from jlora.models.layers import Embed, LayerNorm, Linear, Remat, gelu, run_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float

    trunk = "transformer"
    embedding_path = "transformer/wte/embedding"
    depth_field = "n_layer"
    transposed_kernels = False  # Hugging Face's Conv1D stores [in, out], as we do
    learned_positions = True

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def max_length(self) -> int:
        return self.n_positions

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.n_head, self.n_embd // self.n_head


class GPT2Fields:
    """GPT-2's config.json."""

    def read(self, reader: ConfigReader) -> GPT2Config:
        reader.require("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh"))
        reader.require("scale_attn_weights", True, (True,))
        reader.require("scale_attn_by_inverse_layer_idx", False, (False,))
        reader.require("add_cross_attention", False, (False,))
        width = reader.integer("n_embd", 768)
        return GPT2Config(
            model_type=reader.fields["model_type"],
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

    def write(self, config: GPT2Config) -> JsonObject:
        return {
            "activation_function": "gelu_new",
            **dataclasses.asdict(config),
            "n_ctx": config.n_positions,  # llama.cpp's converter reads it; transformers 5 no longer writes it
        }


class Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, cache, context):
        heads, head_dim = self.config.kv_shape
        qkv = Linear(3 * self.config.n_embd, use_bias=True, name="c_attn")(x)
        q, k, v = (part.reshape(*x.shape[:-1], heads, head_dim) for part in jnp.split(qkv, 3, axis=-1))
        y, cache = attend(q, k, v, context, cache)
        return Linear(self.config.n_embd, use_bias=True, name="c_proj")(y.reshape(x.shape)), cache


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
    dtype: DTypeLike
    remat: Remat

    @nn.compact
    def __call__(self, input_ids, context, cache):
        config = self.config
        x = Embed(config.vocab_size, config.n_embd, self.dtype, name="wte")(input_ids)
        x = x + Embed(config.n_positions, config.n_embd, self.dtype, name="wpe")(context.positions)
        x, cache = run_layers(self, "h", Block, self.remat, x, cache, [context], [0] * config.n_layer, config=config)
        return LayerNorm(eps=config.layer_norm_epsilon, name="ln_f")(x), cache


class GPT2(CausalLM):
    """Positions past the last learned one are clipped to it: callers check `config.max_length`."""

    graph = Transformer
