"""The functional transform: parameters in, parameters out."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jlora._typing import Array, Key, PyTree
from jlora.lora.config import LoraConfig
from jlora.lora.routing import RoutedWeight
from jlora.lora.targets import select, select_biases, select_whole
from jlora.lora.weight import AdaptedWeight, FullWeight, LoraWeight, column_norms
from jlora.quant import QuantizedTensor
from jlora.tree.modules import is_embedding, layer_paths, module_path, stated_roles
from jlora.tree.paths import flatten, is_weight, map_with_path, path_string
from jlora.weight import Weight, materialize
from jlora.weight.roles import LINEAR, sizes


def path_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of one leaf: depends on the key and the path alone, so adding a layer does not reshuffle the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def add_lora(
    params: PyTree, config: LoraConfig, *, key: Key[Array, ""], roles: Mapping[str, str] | None = None
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
    adapted = [path for path, leaf in flatten(params).items() if isinstance(leaf, AdaptedWeight)]
    if adapted:
        raise ValueError(
            f"`add_lora` goes onto unadapted parameters; {adapted[0]!r} and {len(adapted) - 1} more are adapted already. "
            "Call `remove_lora` (drops the adapter) or `merge` (keeps its effect) first."
        )
    stated = _roles_of(params, roles or {})
    chosen = select(params, config, stated)
    targets = set(chosen.values())
    whole = select_whole(params, config, chosen)
    if config.bias != "none" and not select_biases(params, config, chosen):
        raise ValueError(
            f"`bias` {config.bias!r} finds no bias to train{' in the adapted modules' * (config.bias == 'lora_only')}. "
            "Use bias='none'."
        )

    def adapt(path, leaf):
        rows = layer_paths(path, leaf)
        if path in targets:
            paths = [p for p in rows if module_path(p) in chosen]
            return _adapted(path, leaf, paths, config, key, stated.get(path, LINEAR))
        taken = [p for p in rows if p in whole]
        return _trained_whole(path, leaf, taken) if taken else leaf

    return map_with_path(adapt, params)


def _roles_of(params: PyTree, patterns: Mapping[str, str]) -> dict[str, str]:
    """Leaf path -> roles, where they are stated: by `add_lora`, or before it by `quantize_params`."""
    packed = {
        path: leaf.roles
        for path, leaf in flatten(params).items()
        if isinstance(leaf, QuantizedTensor) and leaf.axes is not None
    }
    stated = stated_roles(params, patterns)
    for path in packed.keys() & stated.keys():
        if stated[path].lstrip("b") != packed[path]:
            raise ValueError(
                f"`roles` {stated[path]!r} for {path!r} differ from {packed[path]!r}, under which it was quantized. State the "
                "same, or leave it out: a quantized kernel knows its own."
            )
    return packed | stated


def _trained_whole(path: str, leaf: Array, rows: list[str]) -> FullWeight:
    if rows != [path] and len(rows) < leaf.shape[0]:
        raise ValueError(
            f"The {leaf.shape[0]} layers of the stacked leaf {path!r} must be trained alike; this config trains {len(rows)} of "
            "them. Use the per-layer form for it: `unstack_layers(params)`, or load with `stack=False`."
        )
    return FullWeight(base=leaf, value=jnp.array(leaf, jnp.float32))  # a copy: it is trained, and perhaps donated


def _adapted(path: str, leaf: Array | Weight, paths: list[str], config: LoraConfig, key, roles: str) -> LoraWeight:
    modules = [module_path(p) for p in paths]
    stacked = leaf.ndim > len(roles)
    kinds = {(config.rank_of(m), config.scaling_of(m)) for m in modules}
    if stacked and (len(paths) < leaf.shape[0] or len(kinds) > 1):
        raise ValueError(
            f"The {leaf.shape[0]} layers of the stacked kernel {path!r} must be adapted alike; this config adapts {len(paths)} of "
            f"them with (rank, scaling) {sorted(kinds)}. Use the per-layer form for it: `unstack_layers(params)`, or load "
            "with `stack=False`."
        )
    ((rank, scaling),) = kinds
    base = leaf
    plain = roles == LINEAR
    if not plain and (config.use_dora or config.init == "pissa"):
        raise ValueError(
            f"{'`use_dora`' if config.use_dora else '`init`, pissa,'} adapts kernels [in, out]; {path!r} has the roles {roles!r}. "
            "Use plain LoRA there."
        )
    if config.init == "pissa" and not is_embedding(path):
        a, b = _principal(path, leaf, rank, scaling)
        # The residual stays a value, so that the original is never copied. Copies: what is trained may be donated.
        base = LoraWeight(base=leaf, lora_A=jnp.copy(a), lora_B=jnp.copy(b), scaling=-scaling)
    else:
        init = _init_embedding if is_embedding(path) else functools.partial(_init_kernel, init=config.init)
        one = functools.partial(_init_axes, init, roles, leaf.shape[leaf.ndim - len(roles) :], rank)
        d_in, d_out = leaf.shape[-2:]
        factors = [init(path_key(key, p), d_in, d_out, rank) if plain else one(path_key(key, p)) for p in paths]
        a, b = jax.tree.map(lambda *rows: jnp.stack(rows), *factors) if stacked else factors[0]
    return LoraWeight(
        base=base,
        lora_A=a,
        lora_B=b,
        scaling=scaling,
        dropout=float(config.dropout),
        magnitude=column_norms(leaf) if config.use_dora else None,
        base_norm=column_norms(base) if config.use_dora else None,
        roles=roles,
    )


def _init_axes(init, roles: str, shape: tuple[int, ...], rank: int, key: Key[Array, ""]) -> tuple[Array, Array]:
    """Factors [*stack, *in, rank] and [*stack, rank, *out] of a kernel of `shape`, drawn as those of its [in, out]."""
    stack, ins, outs = (sizes(roles, role, shape) for role in "bio")
    keys = jax.random.split(key, stack).reshape(-1) if stack else key[None]
    a, b = jax.vmap(lambda key: init(key, math.prod(ins), math.prod(outs), rank))(keys)
    return a.reshape(*stack, *ins, rank), b.reshape(*stack, rank, *outs)


def _init_kernel(key, d_in: int, d_out: int, rank: int, *, init: str) -> tuple[Array, Array]:
    """PEFT's `reset_lora_parameters`: A by kaiming_uniform(a=sqrt(5)), which is U(-1/sqrt(in), 1/sqrt(in)), or N(0, 1/rank)."""
    zero = jnp.zeros((rank, d_out), jnp.float32)
    if init == "gaussian":
        return jax.random.normal(key, (d_in, rank), jnp.float32) / rank, zero
    bound = 1.0 / math.sqrt(d_in)
    return jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound), zero


def _init_embedding(key, vocab: int, d_model: int, rank: int) -> tuple[Array, Array]:
    """PEFT's initialization of embeddings, whatever that of kernels: A zero, B from N(0, 1)."""
    return jnp.zeros((vocab, rank), jnp.float32), jax.random.normal(key, (rank, d_model), jnp.float32)


def _principal(path: str, leaf: Array | Weight, rank: int, scaling: float) -> tuple[Array, Array]:
    """PiSSA: factors of the `rank` largest singular values of each layer's kernel, divided by the scaling.

    Reference: Meng et al., PiSSA, 2024, arXiv:2404.02948.
    """
    if isinstance(leaf, Weight):
        raise ValueError(
            f"`init` 'pissa' takes the singular values of dense kernels; {path!r} is a {type(leaf).__name__}, as PEFT refuses it "
            "too. Use init='kaiming' on a quantized base."
        )
    if rank > min(leaf.shape[-2:]):
        raise ValueError(
            f"`init` 'pissa' needs a `rank` of at most the kernel's smaller side; got rank {rank} for {path!r} "
            f"{tuple(leaf.shape)}. Use a smaller rank there (`rank_pattern`)."
        )
    return _singular_factors(leaf, rank, scaling)


@functools.partial(jax.jit, static_argnames=("rank", "scaling"))
def _singular_factors(w: Array, rank: int, scaling: float) -> tuple[Array, Array]:
    if w.ndim > 2:
        return jax.lax.map(lambda row: _singular_factors(row, rank, scaling), w)
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank] / scaling)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _map_adapted(fn, params, other=lambda leaf: leaf):
    return jax.tree.map(lambda w: fn(w) if isinstance(w, AdaptedWeight) else other(w), params, is_leaf=is_weight)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(adapter, base): two trees of the shape of `params`, None where the leaf went to the other.

    `adapter` holds what is trained (lora_A, lora_B and magnitude of `LoraWeight`, value of `FullWeight`), float32, and
    nothing else: differentiate and optimize with respect to it.

    Raises:
        ValueError: when nothing in `params` is adapted.
    """
    if not any(isinstance(leaf, AdaptedWeight) for leaf in flatten(params).values()):
        raise ValueError(
            "`split` found no adapter in these parameters: there would be nothing to train. Call "
            "`add_lora(params, config, key=key)` first; to train every parameter, pass the whole tree as the adapter "
            "and None as the base."
        )
    adapter = _map_adapted(lambda w: w.adapter_half(), params, lambda leaf: None)
    return adapter, _map_adapted(lambda w: w.base_half(), params)


def combine(adapter: PyTree, base: PyTree) -> PyTree:
    """The inverse of `split`. `base=None`: everything is in `adapter` (full fine-tuning).

    Raises:
        ValueError: when both sides, or neither, have a leaf, or the trees do not fit.
    """
    if base is None:
        return adapter

    def one(path, a, b):
        child = getattr(path[-1], "name", None) if path else None
        optional = child in (*LoraWeight.OPTIONAL, *RoutedWeight.OPTIONAL)
        # Adapted in the base, without factors in the adapter. (The base of a value may be one: PiSSA's residual.)
        orphan = a is None and isinstance(b, AdaptedWeight) and child != "base"
        if orphan or ((a is None) == (b is None) and not (a is None and optional)):
            where = path_string(path) + (f"/{b.TRAINED[0]}" if orphan else "")
            raise ValueError(
                f"`combine` takes the two halves that `split` made; {'neither half has' if a is None else 'both halves have'} "
                f"{where!r}. Pass `combine(adapter, base)` with the results of one `split`."
            )
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(one, adapter, base, is_leaf=lambda x: x is None)


def remove_lora(params: PyTree) -> PyTree:
    """The base as it was: every adapted weight replaced by its original."""
    return _map_adapted(lambda w: w.origin(), params)


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
    return _map_adapted(lambda w: w.mask(), params, lambda leaf: jax.tree.map(lambda _: False, leaf))


def with_dropout(params: PyTree, key: Key[Array, ""]) -> PyTree:
    """Puts this step's dropout key into every adapted weight with a dropout rate. Call it inside the loss.

    Each weight's key is `fold_in(key, crc32(path))` of its per-layer path, so a mask depends on the key and the path
    only: it is the same in the per-layer and the stacked form, and under rematerialization.
    """

    def one(path, w):
        if isinstance(w, RoutedWeight) and any(w.dropouts):
            raise ValueError(
                f"Adapters side by side are run without dropout; those at {path!r} have the rates {w.dropouts}. Train one at a "
                "time, or give each `dropout=0.0`."
            )
        if not isinstance(w, LoraWeight) or w.dropout == 0.0:
            return w
        layered = len(w.stack) > w.roles.count("b")
        keys = [path_key(key, p) for p in (layer_paths(path, w.lora_A) if layered else [path])]
        if own := w.stack[layered:]:  # a stack that is one leaf: a mask for each row of it
            keys = [jax.random.split(k, own) for k in keys]
        return dataclasses.replace(w, key=jnp.stack(keys) if layered else keys[0])

    return map_with_path(one, params)


def adapted_leaves(params: PyTree) -> dict[str, AdaptedWeight]:
    """Per-layer path -> adapted weight: the layers of a stacked tree are taken apart."""
    found = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, AdaptedWeight):
            for i, p in enumerate(layer_paths(path, leaf.lead)):
                found[p] = leaf if p == path else jax.tree.map(lambda x, i=i: x[i], leaf)
    return found


def adapted_modules(params: PyTree) -> dict[str, LoraWeight]:
    """Module path -> weight with a low-rank update, per layer: the layers of a stacked tree are taken apart."""
    return {module_path(path): w for path, w in adapted_leaves(params).items() if isinstance(w, LoraWeight)}
