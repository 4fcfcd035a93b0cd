"""The table of the checkpoint families that the graphs run."""

from collections.abc import Mapping

import numpy as np

from jlora._typing import JsonObject
from jlora.models.family import Family, GGUFLayout
from jlora.models.gemma3 import LAYERS as GEMMA3_LAYERS
from jlora.models.gemma3 import Gemma3, Gemma3Config, Gemma3Fields
from jlora.models.gpt2 import GPT2, GPT2Config, GPT2Fields
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.llama_fields import NO_ROPE, SWITCHED, WINDOW, LlamaFields
from jlora.models.rope import LinearScaling, Llama3Scaling, rope_frequencies


def _gpt2_hyperparameters(config: GPT2Config) -> JsonObject:
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "vocab_size": config.vocab_size,
    }


def _llama_hyperparameters(config: LlamaConfig) -> JsonObject:
    return {
        "block_count": config.num_hidden_layers,
        # These graphs of llama.cpp have no windows: up to the narrowest they compute the same.
        "context_length": min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        **_linear_scaling(config),
        "vocab_size": config.vocab_size,
    }


def _linear_scaling(config: LlamaConfig) -> JsonObject:
    scaling = config.rope_scaling
    return (
        {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor} if type(scaling) is LinearScaling else {}
    )


def _rope_factors(config: LlamaConfig) -> dict[str, np.ndarray]:
    """What llama.cpp divides the frequencies by, where that is not one number."""
    if type(config.rope_scaling) is not Llama3Scaling:
        return {}
    plain, scaled = (rope_frequencies(config.head_dim, config.rope_theta, s) for s in (None, config.rope_scaling))
    return {"rope_freqs.weight": plain / scaled}


def _lacks(*, biases: tuple[str, ...] = (), factors: bool = False):
    """What a graph like Llama's does not compute: these biases of `LlamaConfig`, and factors of the frequencies."""

    def found(config: LlamaConfig) -> list[str]:
        names = [f"`{name}` = True" for name in biases if getattr(config, name)]
        return names + [f"`rope_scaling` = {config.rope_scaling}"] * (not factors and bool(_rope_factors(config)))

    return found


def _smollm3_lacks(config: LlamaConfig) -> list[str]:
    """llama.cpp leaves the rotation out in every fourth layer, whatever the file says."""
    rotated = [kind.rope is not None for kind in config.kinds]
    fourth = rotated == [(i + 1) % 4 != 0 for i in range(config.depth)]
    found = _lacks(biases=("o_bias", "mlp_bias"))(config)
    return found if fourth else [*found, f"`no_rope_layers` = {[int(turns) for turns in rotated]}"]


def _gemma3_hyperparameters(config: Gemma3Config) -> JsonObject:
    fields = _llama_hyperparameters(config) | {"context_length": config.max_position_embeddings}
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
        fields["attention.sliding_window_pattern"] = [kind.window is not None for kind in config.kinds]
        fields["rope.freq_base_swa"] = config.rope_local_base_freq
    if config.final_logit_softcapping is not None:
        fields["final_logit_softcapping"] = config.final_logit_softcapping
    return fields


def _gemma3_lacks(config: Gemma3Config) -> list[str]:
    """llama.cpp knows the scale of the scores by the number of layers: 62 are of the 27B model."""
    scalar = config.hidden_size // config.num_attention_heads if config.depth == 62 else config.head_dim
    wrong = (
        [] if config.query_pre_attn_scalar == scalar else [f"`query_pre_attn_scalar` = {config.query_pre_attn_scalar}"]
    )
    return _lacks(biases=("o_bias",))(config) + wrong


_LLAMA_GGUF = GGUFLayout(
    architecture="llama",
    fields=_llama_hyperparameters,
    rotates_pairs=True,
    tensors=_rope_factors,
    lacks=_lacks(factors=True),
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        tokenizer="GPT2Tokenizer",
        module=GPT2,
        fields=GPT2Fields(),
        gguf=GGUFLayout(architecture="gpt2", fields=_gpt2_hyperparameters),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        tokenizer="LlamaTokenizer",
        module=Llama,
        fields=LlamaFields(defaults={}, mlp_bias=True),
        gguf=_LLAMA_GGUF,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        tokenizer="Qwen2Tokenizer",
        module=Llama,
        fields=LlamaFields(
            defaults={
                "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
            },
            attention_bias=(True, False),
            layers=SWITCHED,
        ),
        gguf=GGUFLayout(architecture="qwen2", fields=_llama_hyperparameters, lacks=_lacks()),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        tokenizer="LlamaTokenizer",
        module=Llama,
        fields=LlamaFields(
            defaults={
                "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            },
            attention_bias=(False, False),
            layers=WINDOW,
        ),
        gguf=_LLAMA_GGUF,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        tokenizer="Qwen2Tokenizer",
        module=Llama,
        fields=LlamaFields(
            defaults={
                "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
                "max_position_embeddings": 32768,
            },
            qk_norm=True,
            layers=SWITCHED,
        ),
        gguf=GGUFLayout(architecture="qwen3", fields=_llama_hyperparameters, lacks=_lacks(biases=("o_bias",))),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        tokenizer=None,
        module=Llama,
        fields=LlamaFields(
            defaults={
                "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
            },
            mlp_bias=True,
            layers=NO_ROPE,
        ),
        gguf=GGUFLayout(
            architecture="smollm3", fields=_llama_hyperparameters, rotates_pairs=True, lacks=_smollm3_lacks
        ),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        tokenizer="GemmaTokenizer",
        module=Gemma3,
        fields=Gemma3Fields(
            defaults={
                "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
                "rope_theta": 1000000.0, "tie_word_embeddings": True,
            },
            qk_norm=True,
            layers=GEMMA3_LAYERS,
        ),
        gguf=GGUFLayout(
            architecture="gemma3", fields=_gemma3_hyperparameters, scale_offset=1.0, lacks=_gemma3_lacks
        ),
    ),
}  # fmt: skip
"""`model_type` of a config.json -> its row."""
