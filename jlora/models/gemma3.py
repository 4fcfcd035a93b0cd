"""Gemma 3, text: RMSNorm before and after each part, scaled embedding, GELU, layers of a window between layers that see all.

Reference: Gemma 3 Technical Report, arXiv:2503.19786; names as in Hugging Face's `Gemma3ForCausalLM`.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from jlora._typing import DTypeLike, JsonObject
from jlora.models.causal import CausalLM
from jlora.models.config import ConfigReader
from jlora.models.context import KVCache, contexts_of
from jlora.models.layers import Embed, Remat, gelu_tanh, normed, run_layers, vector
from jlora.models.llama import FULL, MLP, SLIDING, LlamaConfig, SelfAttention, each
from jlora.models.llama_fields import LayerFields, LlamaFields, layers_of, read_rope, write_rope
from jlora.models.rope import Rope
from jlora.storage.fields import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(LlamaConfig):
    rope_local_base_freq: float
    """theta of the layers with a window; the others have `rope_theta`."""
    query_pre_attn_scalar: int
    final_logit_softcapping: float | None

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5

    @property
    def logit_cap(self) -> float | None:
        return self.final_logit_softcapping

    def rope_of(self, layer_type: str) -> Rope:
        return super().rope_of(layer_type) if layer_type == FULL else Rope(self.rope_local_base_freq, None)


def _read_layers(reader: ConfigReader, depth: int) -> JsonObject:
    pattern = reader.integer("sliding_window_pattern", 6)  # each so many-th layer sees all
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(depth)]
    types = reader.each("layer_types", depth, (FULL, SLIDING)) or types
    return layers_of(reader, reader.optional_integer("sliding_window", 4096), types)


def _write_layers(config: LlamaConfig) -> JsonObject:
    return {"sliding_window": config.sliding_window, "layer_types": list(each(config.layer_types, config.depth))}


LAYERS = LayerFields(_read_layers, _write_layers)


def _rope_by_type(reader: ConfigReader) -> dict[str, ConfigReader]:
    """The rotation's fields for each type of layer: transformers 5 has an object for each type, transformers 4 a `rope_theta`
    with a `rope_scaling` beside a `rope_local_base_freq`."""
    outside = {name: value for name, value in reader.fields.items() if name not in ("rope_parameters", "rope_scaling")}
    found = reader.fields.get("rope_parameters") or {}
    if not isinstance(found, Mapping) or set(found) - {FULL, SLIDING}:
        raise ValueError(
            f"`rope_parameters` in config.json of a {reader.fields['model_type']} must have an object for {FULL!r} and one for "
            f"{SLIDING!r}; got {shown(found)}."
        )
    scaling = reader.fields.get("rope_scaling")
    local = {**outside, "rope_theta": reader.fields.get("rope_local_base_freq")}
    return {
        FULL: ConfigReader({**outside, "rope_scaling": scaling, "rope_parameters": found.get(FULL)}),
        SLIDING: ConfigReader({**local, "rope_parameters": found.get(SLIDING)}),
    }


class Gemma3Fields(LlamaFields):
    """Gemma 3's config.json."""

    def read(self, reader: ConfigReader) -> Gemma3Config:
        reader.require("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
        # transformers has the field and, as llama.cpp, computes none.
        reader.require("attn_logit_softcapping", None, (None,))
        reader.require("use_bidirectional_attention", False, (False, None))
        ropes = _rope_by_type(reader)
        theta, scaling = read_rope(ropes[FULL], self.absent["rope_theta"])
        local, local_scaling = read_rope(ropes[SLIDING], 10000.0)
        if local_scaling is not None:
            raise ValueError(
                f"config.json scales the rotation of its {SLIDING!r} layers; jlora's {reader.fields['model_type']} scales that "
                f"of its {FULL!r} layers only."
            )
        cap = reader.fields.get("final_logit_softcapping")
        return Gemma3Config(
            **self.sizes(reader),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_local_base_freq=local,
            query_pre_attn_scalar=reader.integer("query_pre_attn_scalar", 256),
            final_logit_softcapping=None if cap is None else reader.number("final_logit_softcapping", cap),
        )

    def write(self, config: LlamaConfig) -> JsonObject:
        assert isinstance(config, Gemma3Config)
        fields = super().write(config)
        fields["hidden_activation"] = "gelu_pytorch_tanh"
        del fields["hidden_act"]
        fields["rope_parameters"] = {
            name: write_rope(*config.rope_of(name)) for name in (FULL, SLIDING)
        }  # transformers 4 reads the others
        return fields


class Norm(nn.Module):
    """RMSNorm whose scale is stored as its difference from 1, multiplied in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = 1.0 + vector(self, "scale", nn.initializers.zeros, x.shape[-1], jnp.float32)
        return (normed(x, self.eps) * scale).astype(x.dtype)


class Block(nn.Module):
    config: Gemma3Config

    @nn.compact
    def __call__(self, x, cache: KVCache | None, context):
        eps = self.config.rms_norm_eps
        attention = SelfAttention(self.config, norm=Norm, name="self_attn")
        y, cache = attention(Norm(eps, name="input_layernorm")(x), cache, context)
        x = x + Norm(eps, name="post_attention_layernorm")(y)
        y = MLP(self.config, activation=gelu_tanh, name="mlp")(Norm(eps, name="pre_feedforward_layernorm")(x))
        return x + Norm(eps, name="post_feedforward_layernorm")(y), cache


class Model(nn.Module):
    config: Gemma3Config
    dtype: DTypeLike
    remat: Remat

    @nn.compact
    def __call__(self, input_ids, context, cache):
        config = self.config
        x = Embed(config.vocab_size, config.hidden_size, self.dtype, name="embed_tokens")(input_ids)
        # Rounded to the activations' dtype, as in training.
        x = x * jnp.asarray(config.embedding_scale, self.dtype)
        contexts, kinds = contexts_of(context, config.kinds, config.head_dim)
        x, cache = run_layers(self, "layers", Block, self.remat, x, cache, contexts, kinds, config=config)
        return Norm(config.rms_norm_eps, name="norm")(x), cache


class Gemma3(CausalLM):
    graph = Model
