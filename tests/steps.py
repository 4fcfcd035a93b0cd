"""A small model, its adapter and a batch, for tests of the training step."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.models import model_from_config

# Widths that no batch or token count equals, so that a shape tells what it is.
GPT2 = {"model_type": "gpt2", "n_embd": 40, "n_head": 4, "vocab_size": 113, "n_positions": 32}
LLAMA = {
    "model_type": "llama", "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "vocab_size": 113, "max_position_embeddings": 32,
}  # fmt: skip
BATCH, SEQ, RANK = 6, 11, 3


@functools.cache
def _initial(fields: str):
    model = model_from_config(json.loads(fields), dtype=jnp.float32)
    return model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def build(fields, depth=2, *, stack=False, dtype=jnp.float32, dropout=0.0, remat="none"):
    fields = fields | {"n_layer" if fields["model_type"] == "gpt2" else "num_hidden_layers": depth}
    model = model_from_config(fields, dtype=dtype, remat=remat)
    params = jlora.cast(_initial(json.dumps(fields)), dtype)
    if stack:
        params = jlora.stack_layers(params)
    config = jlora.LoraConfig(rank=RANK, dropout=dropout)
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(1)))
    # B is zero at first, and so would be the gradient of A.
    return model, jax.tree.map(lambda x: x + 0.02, adapter), base


def make_batch(seed=0, share=0.6):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 113, (BATCH, SEQ)).astype(np.int32)
    return {"input_ids": ids, "labels": np.where(rng.random(ids.shape) < share, ids, -100).astype(np.int32)}
