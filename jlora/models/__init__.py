"""The model graphs, and the table of the checkpoint families that they run (`families`)."""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias, get_args

import jax
import jax.numpy as jnp

from jlora._typing import DTypeLike, Json, PyTree
from jlora.models.causal import CausalLM as CausalLM
from jlora.models.config import ModelConfig as ModelConfig
from jlora.models.context import KVCache as KVCache
from jlora.models.families import FAMILIES as FAMILIES
from jlora.models.families import GGUF_ARCHITECTURES as GGUF_ARCHITECTURES
from jlora.models.family import Family as Family
from jlora.models.gpt2 import GPT2 as GPT2
from jlora.models.gpt2 import GPT2Config as GPT2Config
from jlora.models.grow import grow as grow
from jlora.models.layers import Remat as Remat
from jlora.models.llama import Llama as Llama
from jlora.models.llama import LlamaConfig as LlamaConfig
from jlora.models.remat import remat_without_effect as remat_without_effect
from jlora.models.tied import has_adapted_tie as has_adapted_tie
from jlora.models.tied import refuse_adapted_tie as refuse_adapted_tie
from jlora.models.tied import untie as untie
from jlora.storage.fields import shown
from jlora.tree.paths import flatten, nest, per_layer_paths, split_layer_path

Model: TypeAlias = CausalLM
REMATS: tuple[Remat, ...] = get_args(Remat)


def family_of(config: ModelConfig) -> Family:
    """The row of a model's family."""
    return FAMILIES[config.model_type]


def model_from_config(fields: Mapping[str, Json], *, dtype: DTypeLike, remat: str = "none") -> Model:
    """The module for the fields of a Hugging Face `config.json`.

    Raises:
        ValueError: for an unknown family, or a field that the graph does not compute.
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json has `model_type` {shown(family)}; jlora runs {', '.join(FAMILIES)}. To adapt another model, write it in "
            "JAX and wrap its parameters with `jlora.add_lora`."
        )
    if remat not in REMATS:
        raise ValueError(f"`remat` must be one of {', '.join(map(repr, REMATS))}; got {remat!r}.")
    row = FAMILIES[family]
    return row.module(config=row.read(fields), dtype=jnp.dtype(dtype), remat=remat)


def abstract_params(model: Model) -> PyTree:
    """The per-layer parameter tree as `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # One layer is traced and stands for all, which are alike: tracing thousands takes minutes.
    shallow = replace(model, config=dataclasses.replace(model.config, **{model.config.depth_field: 1}))
    leaves = {}
    for path, leaf in flatten(jax.eval_shape(shallow.init, jax.random.key(0), ids)["params"]).items():
        layer = split_layer_path(path)
        leaves |= {p: leaf for p in (per_layer_paths(layer[0], model.config.depth) if layer else [path])}
    return nest(leaves)


def empty_cache(model: Model, batch: int, length: int, *, stacked: bool) -> list[KVCache] | KVCache:
    """A zero KV cache for `length` positions, in the form of the parameters.

    Of the model's dtype; on CPU float32, as XLA:CPU writes a bfloat16 row by making float32 of all the cache and bfloat16 again.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else model.dtype
    heads, head_dim = model.config.kv_shape
    shape = (batch, heads, length, head_dim)
    if stacked:
        shape = (model.config.depth, *shape)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return [KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(model.config.depth)]


def replace(model: Model, **changes: object) -> Model:
    """The module with other fields; with another `dtype` or `remat` the same parameters fit it."""
    return dataclasses.replace(model, **changes)
