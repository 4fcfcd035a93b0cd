"""The functional transform: parameters in, parameters out."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jlora._modules import layer_paths, module_path
from jlora._tree import flatten, is_weight, map_with_path, path_string
from jlora._typing import Array, Key, Params
from jlora._weight import Weight
from jlora.lora.config import LoraConfig
from jlora.lora.targets import select
from jlora.lora.weight import LoraWeight


def path_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of one leaf: depends on the key and the path alone, so adding a layer does not reshuffle the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def add_lora(params: Params, config: LoraConfig, *, key: Key[Array, ""]) -> dict[str, Any]:
    """Adapts the kernels that the config targets; every other leaf is the same object as before.

    Args:
        params: kernels [in, out], dense or quantized; per-layer or stacked (`stack_layers`).
        config: see `LoraConfig`.
        key: initializes lora_A (float32 [in, rank]); lora_B (float32 [rank, out]) is zero, so outputs do not change.

    Returns:
        The same tree with `LoraWeight` leaves.

    Raises:
        ValueError: when a pattern matches nothing, when the tree is adapted already, or when the layers of a
            stacked tree would be adapted differently.

    Example:
        >>> params = {"proj": {"kernel": jnp.ones((4, 6))}}
        >>> adapted = add_lora(params, LoraConfig(rank=2, targets=["proj"]), key=jax.random.key(0))
        >>> adapted["proj"]["kernel"].lora_A.shape, adapted["proj"]["kernel"].lora_B.shape
        ((4, 2), (2, 6))
    """
    adapted = [path for path, leaf in flatten(params).items() if isinstance(leaf, LoraWeight)]
    if adapted:
        raise ValueError(
            f"`add_lora` goes onto unadapted parameters; {adapted[0]!r} and {len(adapted) - 1} more are adapted already. "
            "Call `remove_lora` (drops the adapter) or `merge` (keeps its effect) first."
        )
    chosen = select(params, config)
    targets = set(chosen.values())

    def adapt(path, leaf):
        if path not in targets:
            return leaf
        return _adapted(path, leaf, [p for p in layer_paths(path, leaf) if module_path(p) in chosen], config, key)

    return map_with_path(adapt, params)


def _adapted(path: str, leaf: Array | Weight, paths: list[str], config: LoraConfig, key) -> LoraWeight:
    modules = [module_path(p) for p in paths]
    stacked = leaf.ndim == 3
    kinds = {(config.rank_of(m), config.scaling_of(m)) for m in modules}
    if stacked and (len(paths) < leaf.shape[0] or len(kinds) > 1):
        raise ValueError(
            f"The {leaf.shape[0]} layers of the stacked kernel {path!r} must be adapted alike; this config adapts {len(paths)} of "
            f"them with (rank, scaling) {sorted(kinds)}. Use the per-layer form for it: `unstack_layers(params)`, or load "
            "with `stack=False`."
        )
    ((rank, scaling),) = kinds
    d_in, d_out = leaf.shape[-2:]
    factors = [_init_a(path_key(key, p), d_in, rank, config.init) for p in paths]
    return LoraWeight(
        base=leaf,
        lora_A=jnp.stack(factors) if stacked else factors[0],
        lora_B=jnp.zeros((*leaf.shape[:-2], rank, d_out), jnp.float32),
        scaling=scaling,
        dropout=float(config.dropout),
    )


def _init_a(key, d_in: int, rank: int, init: str) -> Array:
    """PEFT's `reset_lora_parameters`: kaiming_uniform(a=sqrt(5)), which is U(-1/sqrt(in), 1/sqrt(in)), or N(0, 1/rank)."""
    if init == "gaussian":
        return jax.random.normal(key, (d_in, rank), jnp.float32) / rank
    bound = 1.0 / math.sqrt(d_in)
    return jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound)


def _map_lora(fn, params):
    return jax.tree.map(lambda w: fn(w) if isinstance(w, LoraWeight) else w, params, is_leaf=is_weight)


def split(params: Params) -> tuple[Any, Any]:
    """(adapter, base): two trees of the shape of `params`, None where the leaf went to the other.

    `adapter` holds lora_A and lora_B, float32, and nothing else: differentiate and optimize with respect to it.

    Raises:
        ValueError: when nothing in `params` is adapted.
    """
    if not any(isinstance(leaf, LoraWeight) for leaf in flatten(params).values()):
        raise ValueError(
            "`split` found no adapter in these parameters: there would be nothing to train. Call "
            "`add_lora(params, config, key=key)` first; to train every parameter, pass the whole tree as the adapter "
            "and None as the base."
        )
    adapter = jax.tree.map(
        lambda w: dataclasses.replace(w, base=None, key=None) if isinstance(w, LoraWeight) else None,
        params,
        is_leaf=is_weight,
    )
    return adapter, _map_lora(lambda w: dataclasses.replace(w, lora_A=None, lora_B=None), params)


def combine(adapter: Any, base: Any) -> Any:
    """The inverse of `split`. `base=None`: everything is in `adapter` (full fine-tuning).

    Raises:
        ValueError: when both sides, or neither, have a leaf, or the trees do not fit.
    """
    if base is None:
        return adapter

    def one(path, a, b):
        optional = getattr(path[-1], "name", None) == "key" if path else False
        orphan = a is None and isinstance(b, LoraWeight)  # adapted in the base, without factors in the adapter
        if orphan or ((a is None) == (b is None) and not (a is None and optional)):
            where = path_string(path) + ("/lora_A" if orphan else "")
            raise ValueError(
                f"`combine` takes the two halves that `split` made; {'neither half has' if a is None else 'both halves have'} "
                f"{where!r}. Pass `combine(adapter, base)` with the results of one `split`."
            )
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(one, adapter, base, is_leaf=lambda x: x is None)


def remove_lora(params: Params) -> Any:
    """The base as it was: every `LoraWeight` replaced by its base."""
    return _map_lora(lambda w: w.base, params)


def merge(params: Params) -> Any:
    """Dense parameters with the updates added: `base + scaling * lora_A @ lora_B`, in float32 on the dequantized
    base, then cast to the base's dtype. Unadapted quantized leaves are dequantized too."""
    return jax.tree.map(lambda w: w.dense() if is_weight(w) else w, params, is_leaf=is_weight)


def adapter_mask(params: Params) -> Any:
    """Booleans in the structure of `params`: True for lora_A and lora_B.

    For optax over the whole tree: `optax.partition({True: tx, False: optax.set_to_zero()}, adapter_mask(params))`. Not
    `optax.masked` alone: it passes the raw gradients of the leaves it masks out on to the update.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "name", None) in ("lora_A", "lora_B"), params
    )


def with_dropout(params: Params, key: Key[Array, ""]) -> Any:
    """Puts this step's dropout key into every adapted weight with a dropout rate. Call it inside the loss.

    Each weight's key is `fold_in(key, crc32(path))` of its per-layer path, so a mask depends on the key and the path
    only: it is the same in the per-layer and the stacked form, and under rematerialization.
    """

    def one(path, w):
        if not isinstance(w, LoraWeight) or w.dropout == 0.0:
            return w
        keys = [path_key(key, p) for p in layer_paths(path, w.lora_A)]
        return dataclasses.replace(w, key=keys[0] if w.lora_A.ndim == 2 else jnp.stack(keys))

    return map_with_path(one, params)


def adapted_modules(params: Params) -> dict[str, LoraWeight]:
    """Module path -> adapted weight, per layer: the layers of a stacked tree are taken apart."""
    found = {}
    for path, leaf in flatten(params).items():
        if not isinstance(leaf, LoraWeight):
            continue
        for i, p in enumerate(layer_paths(path, leaf.lora_A)):
            found[module_path(p)] = leaf if p == path else jax.tree.map(lambda x, i=i: x[i], leaf)
    return found
