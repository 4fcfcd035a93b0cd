"""The real thing beside ours: tiny models of transformers with random weights, and the logits of both."""

import jax.numpy as jnp
import numpy as np
import torch
import transformers

VOCAB = 97
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def _gpt2(**changes):
    fields = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB} | _IDS | changes
    # The oracle must not drop anything out when it trains.
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields, **dropouts))


def _llama(**changes):
    fields = _SMALL | {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3_ROPE} | _IDS | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))


def _qwen2(**changes):
    fields = _SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True} | _IDS | changes
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields))


def _mistral(**changes):
    fields = _SMALL | {"num_key_value_heads": 2, "sliding_window": None} | _IDS | changes
    return transformers.MistralForCausalLM(transformers.MistralConfig(**fields))


def _qwen3(**changes):
    fields = _SMALL | {"num_key_value_heads": 2, "head_dim": 16} | _IDS | changes
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))


def _smollm3(**changes):
    """The last of four layers does not rotate."""
    fields = _SMALL | {"num_key_value_heads": 2, "num_hidden_layers": 4} | _IDS | changes
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**fields))


def _gemma3_text(**changes):
    """The second and the fourth of four layers see everything."""
    fields = _SMALL | {"num_key_value_heads": 2, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8} | _IDS
    fields |= {"sliding_window_pattern": 2, "query_pre_attn_scalar": 24, "max_position_embeddings": 256} | changes
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**fields))


FAMILIES = {"gpt2": _gpt2, "llama": _llama, "qwen2": _qwen2}
_MAKERS = FAMILIES | {"mistral": _mistral, "qwen3": _qwen3, "smollm3": _smollm3, "gemma3_text": _gemma3_text}


def make_torch_model(family: str, seed: int = 0, **changes):
    """A transformers model with weights large enough that every part of the graph shows in the logits."""
    torch.manual_seed(seed)
    model = _MAKERS[family](**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 24))


def torch_logits(model, ids=IDS, **inputs):
    """float32 [batch, seq, vocab] of a transformers or PEFT model."""
    inputs = {name: torch.tensor(value, dtype=torch.long) for name, value in inputs.items()}
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), **inputs).logits.float().numpy()


def quantized_by_transformers(directory, *, dtype=torch.float32, double_quant=True):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return load_4bit(directory, dtype=dtype, quantization_config=config)


def load_4bit(directory, *, dtype=torch.float32, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cpu", **kwargs).eval()


def dequantized_logits(model, ids=IDS):
    """The same of a model that bitsandbytes holds in 4 bits, with products in float32.

    Its kernel for inference on a CPU rounds to bfloat16, and takes multiples of 32 alone. Where a gradient is asked for, it
    dequantizes and multiplies.
    """
    embeddings = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)).detach().requires_grad_()
    return model(inputs_embeds=embeddings).logits.detach().float().numpy()


def our_logits(model, params, ids=IDS):
    """The same of ours. Not jitted: most adapters of tests differ in structure, and each would be compiled for one call."""
    return np.asarray(model.apply({"params": params}, jnp.asarray(ids)))
