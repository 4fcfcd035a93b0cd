"""The functional transform: parameters in, parameters out."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._typing import Params, PRNGKeyArray, PyTree
from jlora.lora.config import LoraConfig
from jlora.lora.kinds import AdaptedWeight, FullWeight, Misfit, Site, TokensWeight
from jlora.lora.kinds.tokens import EMBEDDING, HEAD
from jlora.lora.targets import select, select_biases, select_tokens, select_whole
from jlora.tree.modules import is_embedding, modules_of
from jlora.tree.paths import Row, flatten, map_with_path, module_path, path_string, rows, rows_of
from jlora.weight import is_adapted, is_weight, materialize
from jlora.weight.roles import LINEAR


def path_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The key of one leaf: depends on the key and the path alone, so adding a layer does not reshuffle the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def add_lora(
    params: PyTree, config: LoraConfig, *, key: PRNGKeyArray, roles: Mapping[str, str] | None = None
) -> PyTree:
    """Adapts what the config targets; every other leaf is the same object as before.

    Args:
        params: kernels [in, out], dense or quantized; per-layer or stacked (`stack_layers`).
        config: see `LoraConfig`.
        key: initializes lora_A (float32 [in, rank]); lora_B (float32 [rank, out]) is zero, so outputs do not change.
            In an embedding it is the other way round. "pissa" draws nothing. `jax.random.key` keeps 32 bits of a seed:
            those of 1 and 2**32 + 1 are one key.
        roles: module pattern (as in `rank_pattern`) -> what each axis of the kernel is for, one letter an axis: "i" in, "o"
            out, "b" a leading stack axis. Kernels with more axes than two are adapted only where theirs are stated:
            {"query": "ioo"} for (d_model, heads, head_dim), {"conv": "iiio"} for HWIO. lora_A is then [*stack, *in, rank],
            lora_B [*stack, rank, *out], and the functions that use them are called through `jlora.wrap`. A leaf whose
            roles are stated counts as a kernel whatever it is called. Axes in front that the layers were stacked along
            (`stack_layers`) have no letter.

    Returns:
        The same tree with `LoraWeight` leaves, and `FullWeight` leaves for `bias` and `modules_to_save`.

    Raises:
        ValueError: when a pattern matches nothing, when there are no biases for `bias` to train, when the tree is adapted
            already, when the layers of a stacked tree would be adapted differently, or when a kernel has axes that `roles`
            says nothing about.

    Example:
        >>> params = {"proj": {"kernel": jnp.ones((4, 6))}}
        >>> adapted = add_lora(params, LoraConfig(rank=2, targets=["proj"]), key=jax.random.key(0))
        >>> adapted["proj"]["kernel"].lora_A.shape, adapted["proj"]["kernel"].lora_B.shape
        ((4, 2), (2, 6))
    """
    there = modules_of(params, roles)
    adapted = list(dict.fromkeys(row.leaf_path for row in there.rows if is_adapted(row.leaf)))
    if adapted:
        raise ValueError(
            f"`add_lora` goes onto unadapted parameters; {adapted[0]!r} and {len(adapted) - 1} more are adapted already. "
            "Call `remove_lora` (drops the adapter) or `merge` (keeps its effect) first."
        )
    targets = select(there, config)
    whole = select_whole(there, config, targets)
    if config.bias != "none" and not select_biases(there, config, targets):
        raise ValueError(
            f"`bias` {config.bias!r} finds no bias to train{' in the adapted modules' * (config.bias == 'lora_only')}. "
            "Use bias='none'."
        )
    updated = set(targets.values())
    tokens = select_tokens(there, config, {*updated, *whole})

    def adapt(path, leaf):
        layers = rows_of(path, leaf)
        if path in updated:
            taken = [row for row in layers if row.module in targets]
            return _updated(layers, taken, config, key, there.roles.get(path, LINEAR))
        if path in tokens:
            return TokensWeight.of(leaf, tokens[path], EMBEDDING if is_embedding(path) else HEAD)
        taken = [row for row in layers if row.path in whole]
        return _trained_whole(layers, taken) if taken else leaf

    return map_with_path(adapt, params)


def _trained_whole(layers: list[Row], taken: list[Row]) -> FullWeight:
    if len(taken) < len(layers):
        raise ValueError(
            f"The {len(layers)} layers of the stacked leaf {layers[0].leaf_path!r} must be trained alike; this config trains "
            f"{len(taken)} of them. Use the per-layer form for it: `unstack_layers(params)`, or load with `stack=False`."
        )
    return FullWeight.of(layers[0].leaf)


def _updated(layers: list[Row], taken: list[Row], config: LoraConfig, key: PRNGKeyArray, roles: str) -> AdaptedWeight:
    """The leaf of these layers, adapted by the config's kind; `taken` are those that the config means."""
    leaf_path, leaf = layers[0].leaf_path, layers[0].leaf
    kinds = {(config.rank_of(row.module), config.scaling_of(row.module)) for row in taken}
    if len(taken) < len(layers) or len(kinds) > 1:
        raise ValueError(
            f"The {len(layers)} layers of the stacked kernel {leaf_path!r} must be adapted alike; this config adapts {len(taken)} "
            f"of them with (rank, scaling) {sorted(kinds)}. Use the per-layer form for it: `unstack_layers(params)`, or load "
            "with `stack=False`."
        )
    ((rank, scaling),) = kinds
    site = Site(
        path=leaf_path,
        leaf=leaf,
        keys=tuple(path_key(key, row.path) for row in taken),
        stacked=leaf.ndim > len(roles),
        roles=roles,
        is_embedding=is_embedding(leaf_path),
        rank=rank,
        scaling=scaling,
        dropout=float(config.dropout),
        options=config.options(),
    )
    return config.weight.adapt(site)


def map_adapted(fn: Callable[[Any], Any], params: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """`fn` over the adapted weights, `other` over the other leaves; same structure."""
    return jax.tree.map(lambda w: fn(w) if is_adapted(w) else other(w), params, is_leaf=is_weight)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(adapter, base): two trees of the shape of `params`, None where the leaf went to the other.

    `adapter` holds what is trained (such as lora_A, lora_B and magnitude of a `LoraWeight`), float32, and nothing else:
    differentiate and optimize with respect to it.

    Raises:
        ValueError: when nothing in `params` is adapted.
    """
    if not any(map(is_adapted, flatten(params).values())):
        raise ValueError(
            "`split` found no adapter in these parameters: there would be nothing to train. Call "
            "`add_lora(params, config, key=key)` first; to train every parameter, pass the whole tree as the adapter "
            "and None as the base."
        )
    adapter = map_adapted(lambda w: w.adapter_half(), params, lambda leaf: None)
    return adapter, map_adapted(lambda w: w.base_half(), params)


def combine(adapter: PyTree, base: PyTree) -> PyTree:
    """The inverse of `split`. `base=None`: everything is in `adapter` (full fine-tuning).

    Raises:
        ValueError: when both sides, or neither, have a leaf, or the trees do not fit.
    """
    if base is None:
        return adapter

    def joined(key_path, a, b):
        path = path_string(key_path)
        try:
            if is_adapted(b):
                return b.joined(a)
            if is_adapted(a) and a.absent:
                raise Misfit(a.absent[0], "neither half has")
            if (a is None) == (b is None):
                raise Misfit(None, f"{'neither half has' if a is None else 'both halves have'}")
            return b if a is None else a
        except Misfit as error:
            where = f"{path}/{error.child}" if error.child else path
            raise ValueError(
                f"`combine` takes the two halves that `split` made; {error} {where!r}. Pass `combine(adapter, base)` with the "
                "results of one `split`."
            ) from None

    return jax.tree_util.tree_map_with_path(joined, adapter, base, is_leaf=lambda x: x is None or is_weight(x))


def remove_lora(params: PyTree) -> PyTree:
    """The base as it was: every adapted weight replaced by its original."""
    return map_adapted(lambda w: w.origin(), params)


def merge(params: PyTree) -> PyTree:
    """Dense parameters with the adapter's effect: `base + scaling * lora_A @ lora_B` (with DoRA, its columns at their
    magnitudes), in float32 on the dequantized base, then cast to the base's dtype. Unadapted quantized leaves are
    dequantized too. A head that is tied to an adapted embedding goes on using the original until they are merged:
    `jlora.untie` the model first, and the merged one computes the same."""
    return jax.tree.map(lambda w: materialize(w) if is_weight(w) else w, params, is_leaf=is_weight)


def adapter_mask(params: PyTree) -> PyTree:
    """Booleans in the structure of `params`: True for what `split` puts into the adapter.

    For optax over the whole tree: `optax.partition({True: tx, False: optax.set_to_zero()}, adapter_mask(params))`. Not
    `optax.masked` alone: it passes the raw gradients of the leaves it masks out on to the update.
    """
    return map_adapted(lambda w: w.mask(), params, lambda leaf: jax.tree.map(lambda _: False, leaf))


def with_dropout(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Puts this step's dropout key into every adapted weight with a dropout rate. Call it inside the loss.

    Each weight's key is `fold_in(key, crc32(path))` of its per-layer path, so a mask depends on the key and the path
    only: it is the same in the per-layer and the stacked form, and under rematerialization.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # of `jax.random.PRNGKey`: the numbers are the same
        key = jax.random.wrap_key_data(key)

    def keyed(path, w):
        if not is_adapted(w) or w.dropout == 0.0:
            return w
        layered = len(w.stack) > w.roles.count("b")
        keys = [path_key(key, row.path) for row in (rows_of(path, w) if layered else rows_of(path, None))]
        if own := w.stack[layered:]:  # a stack that is one leaf: a mask for each row of it
            keys = [jax.random.split(k, own) for k in keys]
        return w.with_key(jnp.stack(keys) if layered else keys[0])

    return map_with_path(keyed, params)


def adapted_leaves(params: PyTree) -> dict[str, AdaptedWeight]:
    """Per-layer path -> adapted weight: the layers of a stacked tree are taken apart."""
    return {row.path: row.value for row in rows(params) if is_adapted(row.leaf)}


def adapted_modules(params: Params) -> dict[str, AdaptedWeight]:
    """Module path -> weight with an update, per layer: the layers of a stacked tree are taken apart."""
    return {module_path(path): w for path, w in adapted_leaves(params).items() if not w.WHOLE}
