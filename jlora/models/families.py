"""The table of the checkpoint families that the graphs run."""

from collections.abc import Mapping

from jlora.models import gguf
from jlora.models.family import Family
from jlora.models.gemma3 import LAYERS as GEMMA3_LAYERS
from jlora.models.gemma3 import Gemma3, Gemma3Fields
from jlora.models.gpt2 import GPT2, GPT2Fields
from jlora.models.llama import Llama
from jlora.models.llama_fields import NO_ROPE, SWITCHED, WINDOW, LlamaFields

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        tokenizer="GPT2Tokenizer",
        module=GPT2,
        fields=GPT2Fields(),
        gguf=gguf.GPT2,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        tokenizer="LlamaTokenizer",
        module=Llama,
        fields=LlamaFields(defaults={}, mlp_bias=True),
        gguf=gguf.LLAMA,
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
        gguf=gguf.QWEN2,
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
        gguf=gguf.LLAMA,
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
        gguf=gguf.QWEN3,
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
        gguf=gguf.SMOLLM3,
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
        gguf=gguf.GEMMA3,
    ),
}  # fmt: skip
"""`model_type` of a config.json -> its row."""

GGUF_ARCHITECTURES: Mapping[str, str] = {row.gguf.architecture: name for name, row in reversed([*FAMILIES.items()])}
"""`general.architecture` of a GGUF file -> `model_type`, the first of those that share it: "llama" is Llama, not Mistral."""
