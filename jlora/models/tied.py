"""Models whose output head is their embedding, and how to give such a model a head of its own."""

import dataclasses

from jlora._typing import Params, PyTree
from jlora.models.causal import CausalLM
from jlora.tree.paths import flatten
from jlora.weight import as_dense, is_adapted, is_weight


def has_adapted_tie(model: CausalLM, params: Params) -> bool:
    """Whether an adapter changes an embedding that is the output head too.

    The head goes on using the original, as in PEFT, so merging makes two tensors of one: see `untie`.
    """
    table = _embedding(model, params)
    return model.config.tie_word_embeddings and is_adapted(table) and table.as_head() is not table


def refuse_adapted_tie(model: CausalLM, params: Params) -> None:
    """
    Raises:
        ValueError: see `has_adapted_tie`.
    """
    if has_adapted_tie(model, params):
        raise ValueError(
            f"{model.config.embedding_path!r} is adapted, and the output head, which is tied to it, goes on using the original "
            "(as in PEFT): one merged tensor cannot be both. Give the head a tensor of its own first: "
            "`model, params = jlora.untie(model, params)`."
        )


def untie(model: CausalLM, params: Params) -> tuple[CausalLM, Params]:
    """The model with an output head of its own, which computes the same: (model, params).

    The head is the embedding's original [vocab, d_model], transposed to a kernel [d_model, vocab] of the same dtype under
    "lm_head"; an adapter on the embedding stays where it is. All other leaves are the same objects as before, and
    a model whose head is not tied comes back as it is. Merging an adapter on a tied embedding needs this: PEFT's
    `merge_and_unload` adds the update to the head as well, where training did not have it.

    Args:
        params: per-layer or stacked, adapted or not.

    Raises:
        ValueError: when the embedding is missing or half of a `split`.

    Example:
        >>> import jlora, jax, jax.numpy as jnp
        >>> from jlora.models import model_from_config
        >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
        >>> model = model_from_config(fields, dtype=jnp.float32)
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        >>> untied, params = jlora.untie(model, params)
        >>> untied.config.tie_word_embeddings, params["lm_head"]["kernel"].shape
        (False, (8, 11))
    """
    if not model.config.tie_word_embeddings:
        return model, params
    table = _embedding(model, params)
    head = table.as_head() if is_weight(table) else table
    if head is None:
        raise ValueError(
            f"`untie` makes a head of the embedding {model.config.embedding_path!r}, which these parameters lack. Pass "
            "`combine(adapter, base)`."
        )
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    kernel = as_dense(head, head.dtype).T
    return dataclasses.replace(model, config=config), {**params, "lm_head": {"kernel": kernel}}


def _embedding(model: CausalLM, params: Params) -> PyTree:
    return flatten(params).get(model.config.embedding_path)
