"""The compiler's plan of a training step, of abstract parameters."""

import jax
import jax.numpy as jnp

import jlora
from jlora.models import model_from_config
from jlora.train import causal_lm_loss, init_state, make_step
from jlora.train.memory import abstract_batch, abstract_tree, planned

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 512, "num_hidden_layers": 8,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 256, "n_head": 4, "vocab_size": 4096, "n_positions": 512, "n_layer": 8}


def prepare(fields, tree, module, **lora):
    dtype = tree.get("dtype", jnp.float32)
    model = model_from_config(fields, dtype=dtype, **module)
    options = {"dtype": dtype, "quantize": None, "stack": True} | tree
    return model, abstract_tree(model, jlora.LoraConfig(rank=8, **lora), **options)


def compiled_peak(model, params, tx, batch_size, length):
    adapter, base = jlora.split(params)
    state = jax.eval_shape(lambda a: init_state(a, tx), adapter)
    step = make_step(causal_lm_loss(model), tx)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return planned(step.lower(state, base, abstract_batch(batch_size, length), key).compile())
