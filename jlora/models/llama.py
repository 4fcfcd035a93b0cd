"""Llama: RMSNorm before, rotary grouped-query attention, SwiGLU. Llama 3.x, Qwen2/Qwen2.5 and Mistral are rows of it.

References: Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783; Qwen2.5, arXiv:2412.15115; names as in
Hugging Face's checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora._typing import AnyArray, Array, Bool, Float, Int, Params
from jlora.lora import linear
from jlora.models.config import MAX_HEADS, MAX_LAYERS, ConfigReader
from jlora.models.layers import (
    Embed,
    Head,
    KVCache,
    Linear,
    Llama3Scaling,
    Remat,
    RMSNorm,
    attend,
    frozen_base,
    make_context,
    rope_angles,
    rope_frequencies,
    rotate,
    run_layers,
)
from jlora.storage.fields import shown
from jlora.weight import Weight

_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "mistral": {
        "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""What transformers' config classes have for an absent field, where the families differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Field names are those of Hugging Face's `config.json`; the biases say per projection what families differ in."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    depth_field = "num_hidden_layers"
    layers_path = "model/layers"
    learned_positions = False  # angles, which any position has
    embedding_path = "model/embed_tokens/embedding"
    transposed_kernels = True  # torch's Linear stores [out, in]

    @classmethod
    def from_hf(cls, reader: ConfigReader) -> "LlamaConfig":
        family = reader.fields["model_type"]
        reader.require("hidden_act", "silu", ("silu",))
        # Qwen2 has a window size in its config that is off; Mistral's is on unless null.
        if family == "qwen2":
            reader.require("use_sliding_window", False, (False,))
        if family == "mistral":
            reader.require("sliding_window", 4096, (None,))
        reader.require("pretraining_tp", 1, (1,))
        reader.require_each("layer_types", "full_attention")
        absent = _DEFAULTS[family]
        width = reader.integer("hidden_size", 4096)
        heads = reader.integer("num_attention_heads", 32, most=MAX_HEADS)
        null = "num_key_value_heads" in reader.fields  # transformers: null is one a head, absence the family's default
        kv_heads = heads if null else absent.get("num_key_value_heads", heads)
        bias = family == "qwen2" or reader.flag("attention_bias", False)
        head_dim = reader.integer("head_dim", width // heads, most=MAX_HEADS)
        if head_dim % 2:
            raise ValueError(f"`head_dim` in config.json must be even, for its rotation by pairs; got {head_dim}.")
        theta, scaling = _rope(reader)
        return cls(
            model_type=family,
            vocab_size=reader.integer("vocab_size", absent["vocab_size"]),
            hidden_size=width,
            intermediate_size=reader.integer("intermediate_size", absent["intermediate_size"]),
            num_hidden_layers=reader.integer("num_hidden_layers", 32, most=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=reader.divisor(
                "num_key_value_heads", kv_heads, of=heads, of_name="num_attention_heads"
            ),
            head_dim=head_dim,
            max_position_embeddings=reader.integer("max_position_embeddings", absent["max_position_embeddings"]),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6, most=1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=reader.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            o_bias=bias and family != "qwen2",
            mlp_bias=reader.flag("mlp_bias", False),
            bos_token_id=reader.token_id("bos_token_id"),
            eos_token_id=reader.token_ids("eos_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        for ours in ("qkv_bias", "o_bias", "rope_scaling"):
            del fields[ours]
        rope = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {"rope_type": "llama3", **self.rope_scaling._asdict()}
            fields["rope_scaling"] = rope
        names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
        if self.model_type == "llama":
            fields["attention_bias"] = self.qkv_bias
        else:
            del fields["mlp_bias"]
        if self.model_type == "mistral":
            fields["sliding_window"] = None
        return {
            **fields,
            "architectures": [names[self.model_type]],
            "hidden_act": "silu",
            # transformers 5 reads rope_parameters, 4 reads rope_theta and rope_scaling.
            "rope_parameters": {"rope_theta": self.rope_theta, **rope},
        }

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def depth(self) -> int:
        return self.num_hidden_layers

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(kv_heads, head_dim)"""
        return self.num_key_value_heads, self.head_dim


_ROPE_OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Fields of the rotation that may stand outside its object; transformers 4 has the first two there."""


def _rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the rotation: in transformers 5's `rope_parameters`, in transformers 4's `rope_scaling`, and
    outside of these.

    Raises:
        ValueError: when two of them say different things. Which one counts, versions of transformers differ in.
    """
    said: dict[str, tuple[Any, str]] = {}
    for place in ("rope_parameters", "rope_scaling", None):
        found = {name: fields.get(name) for name in _ROPE_OUTSIDE} if place is None else fields.get(place) or {}
        if not isinstance(found, Mapping):
            raise ValueError(f"`{place}` in config.json must be an object; got {shown(found)}.")
        for name, value in found.items():
            where = f"`{place}.{name}`" if place else f"`{name}`"
            if isinstance(value, Mapping):
                raise ValueError(
                    f"{where} in config.json is an object: a rotation for each type of layer. jlora computes one for all."
                )
            name = "rope_type" if name == "type" else name
            if value is not None and said.setdefault(name, (value, where))[0] != value:
                other, elsewhere = said[name]
                raise ValueError(
                    f"{elsewhere} and {where} in config.json disagree: {shown(other)} and {shown(value)}. Keep the one that "
                    "the checkpoint was trained with."
                )
    return {name: value for name, (value, _) in said.items()}


def _rope(reader: ConfigReader) -> tuple[float, Llama3Scaling | None]:
    """theta and scaling."""
    fields = _rope_fields(reader.fields)
    rope = ConfigReader({"model_type": reader.fields.get("model_type"), **fields})
    theta = rope.number("rope_theta", 10000.0)
    rope.require("partial_rotary_factor", None, (None, 1.0))
    kind = fields.get("rope_type", "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"config.json asks for rope type {shown(kind)}; jlora computes 'default' and 'llama3'. Its positions would be wrong "
            "beyond the original context with any other, so it is refused."
        )
    missing = [name for name in Llama3Scaling._fields if name not in fields]
    if missing:
        raise ValueError(f"The llama3 rope scaling in config.json lacks {', '.join(missing)}; got {sorted(fields)}.")
    *factors, original = Llama3Scaling._fields
    numbers = {name: rope.number(name, 1.0) for name in factors}
    scaling = Llama3Scaling(**numbers, **{original: rope.integer(original, 1)})
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            "`high_freq_factor` in config.json must be greater than `low_freq_factor`; got "
            f"{scaling.high_freq_factor} and {scaling.low_freq_factor}."
        )
    return theta, scaling


class SelfAttention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cache, context):
        config = self.config

        def heads(name, n):
            y = Linear(n * config.head_dim, use_bias=config.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:-1], n, config.head_dim)

        q = rotate(heads("q_proj", config.num_attention_heads), context.rope)
        k = rotate(heads("k_proj", config.num_key_value_heads), context.rope)
        v = heads("v_proj", config.num_key_value_heads)
        y, cache = attend(q, k, v, context, cache)
        y = y.reshape(*x.shape[:-1], config.num_attention_heads * config.head_dim)
        return Linear(config.hidden_size, use_bias=config.o_bias, name="o_proj")(y), cache


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        gate = Linear(config.intermediate_size, use_bias=config.mlp_bias, name="gate_proj")(x)
        up = Linear(config.intermediate_size, use_bias=config.mlp_bias, name="up_proj")(x)
        return Linear(config.hidden_size, use_bias=config.mlp_bias, name="down_proj")(jax.nn.silu(gate) * up)


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
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(self, input_ids, context, cache):
        config = self.config
        x = Embed(config.vocab_size, config.hidden_size, self.dtype, name="embed_tokens")(input_ids)
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        context = context._replace(rope=rope_angles(context.positions, frequencies))
        depth = config.num_hidden_layers
        x, cache = run_layers(self, "layers", Block, depth, self.remat, x, cache, context, config=config)
        return RMSNorm(config.rms_norm_eps, name="norm")(x), cache


class Llama(nn.Module):
    """`model.apply({"params": params}, input_ids) -> float32 logits [batch, seq, vocab]`."""

    config: LlamaConfig
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
        """
        config = self.config
        context = make_context(input_ids, positions, segment_ids, attention_mask, cache)
        out, new_cache = Model(config, self.dtype, self.remat, name="model")(input_ids, context, cache)
        if head:
            if not config.tie_word_embeddings:
                Head((config.hidden_size, config.vocab_size), name="lm_head")()
            weight, transpose = self.output_head(self.variables["params"])
            out = linear(out, weight, transpose=transpose, out_dtype=jnp.float32)
        return out if cache is None else (out, new_cache)

    def output_head(self, params: Params) -> tuple[Float[Array, "..."] | Weight, bool]:
        """(weight, transpose) of the product that makes logits of hidden states."""
        if self.config.tie_word_embeddings:
            return frozen_base(params["model"]["embed_tokens"]["embedding"]), True
        return params["lm_head"]["kernel"], False
