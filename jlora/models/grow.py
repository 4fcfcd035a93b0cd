"""A model with a row of its embedding, and of its head, for more tokens."""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from jlora._typing import Params
from jlora.models.causal import CausalLM
from jlora.tree.paths import map_with_path
from jlora.weight import is_weight

HEAD = "lm_head/kernel"


def grow(model: CausalLM, params: Params, size: int, *, new: Collection[int] = ()) -> tuple[CausalLM, Params]:
    """(model, params) with at least `size` tokens. Rows that are added, and those of `new`, are the mean of the others: the
    tokens are about as likely as any other (Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021;
    transformers' `resize_token_embeddings` draws from next to it).

    Args:
        params: unadapted, per-layer or stacked.
        size: tokens that there must be rows for; a model that has them is left as it is.
        new: tokens whose rows have not been trained, in a vocabulary that was padded.

    Raises:
        ValueError: when the embedding or the head is packed.
    """
    before = model.config.vocab_size
    size = max(size, before)
    untrained = sorted({*range(before, size), *new})
    if not untrained:
        return model, params
    known = np.setdiff1d(np.arange(before), untrained)

    def grown(path, leaf):
        if path not in (model.config.embedding_path, HEAD):
            return leaf
        if is_weight(leaf):
            raise ValueError(
                f"The vocabulary grows by rows of dense arrays; {path!r} is a {type(leaf).__name__}. Load it dense: leave "
                "`quantize` 'keep' out."
            )
        table = leaf.T if path == HEAD else leaf
        mean = jnp.mean(table[known].astype(jnp.float32), axis=0).astype(table.dtype)
        table = jnp.pad(table, ((0, size - before), (0, 0))).at[np.asarray(untrained)].set(mean)
        return table.T if path == HEAD else table

    config = dataclasses.replace(model.config, vocab_size=size)
    return dataclasses.replace(model, config=config), map_with_path(grown, params)
