"""GGUF files: what is written in tests of them, and how they are read by others."""

import gguf
import numpy as np
import torch
import transformers

ROWS = 420  # a few more than the tokenizer has tokens
IDS = np.array([[5, 300, 17, 256, 9, 44, 123, 8, 61, 7, 350, 2]])
BIASED = {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama-biased": ("llama", BIASED),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16}),
}
# transformers takes neither rope_freqs nor biases nor GPT-2's number of positions nor Qwen3's size of heads from a file; the
# others must do alone.
NEEDS_CONFIG = ("gpt2", "gpt2-untied", "llama", "llama-biased", "gemma3", "qwen3")
ADAPTERS = {
    "plain": {"rank": 4, "alpha": 16.0},
    "rslora": {"rank": 4, "alpha": 10.0, "use_rslora": True},
    "patterns": {
        "rank": 3, "alpha": 5.0, "use_rslora": True, "rank_pattern": {"k_proj|c_attn": 6, r".*\.1\.mlp\..*": 1},
        "alpha_pattern": {"q_proj|c_fc": 7.0},
    },
}  # fmt: skip


def read(path):
    """(fields, tensors as float32 in numpy's order, tensor types) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def read_by_transformers(path, config=None):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    ).eval()
