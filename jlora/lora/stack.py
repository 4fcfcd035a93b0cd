"""The two execution forms of one tree: a subtree per layer, and one subtree with a leading layer axis."""

import functools

import jax
import jax.numpy as jnp

from jlora._typing import PyTree
from jlora.tree.paths import LAYER_CONTAINERS, flatten, layer_path, nest, per_layer_paths, split_layer_path


def is_stacked(params: PyTree) -> bool:
    """Whether the layers are stacked: "model/layers/mlp/…" rather than "model/layers/0/mlp/…"."""
    return any(layer_path(path, 0) is not None for path in flatten(params))


def stack_layers(params: PyTree) -> dict[str, PyTree]:
    """The stacked form: "model/layers/3/mlp/up_proj/kernel" [in, out] becomes the fourth row of
    "model/layers/mlp/up_proj/kernel" [layers, in, out]; every child array of every value gains the leading axis.

    Models run it as one `scan`, so compile time does not grow with depth. Copies the layers.

    Raises:
        ValueError: when there are no layers, or they differ (in shape, kind of weight, rank or scaling).
    """
    groups: dict[str, list[PyTree]] = {}
    flat: dict[str, PyTree] = {}
    for path, leaf in flatten(params).items():
        found = split_layer_path(path)
        if found is None:
            flat[path] = leaf
        else:
            group = groups.setdefault(found[0], [])
            group.extend([None] * (found[1] + 1 - len(group)))
            group[found[1]] = leaf
    if not groups:
        raise ValueError(
            f"`stack_layers` found no layers: no path has a part {' or '.join(map(repr, LAYER_CONTAINERS))} followed by a "
            f"number. The paths start {sorted(flat)[:3]}{' (stacked already)' if is_stacked(params) else ''}."
        )
    depth = max(map(len, groups.values()))
    for path, layers in groups.items():
        absent = len(layers) < depth or any(layer is None for layer in layers)
        kinds = {} if absent else {str(_kind(layer)): i for i, layer in reversed(list(enumerate(layers)))}
        if len(kinds) != 1:
            detail = (
                "; ".join(f"layer {i}: {_describe(layers[i])}" for i in sorted(kinds.values()))
                or f"some of the {depth} layers lack it"
            )
            raise ValueError(
                f"The layers of {path!r} differ and cannot be stacked: {detail}. Keep the per-layer form, which every model "
                "runs as well, or adapt all layers alike."
            )
        flat[path] = jax.tree.map(lambda *rows: jnp.stack(rows), *layers)
    return nest(flat)


def _kind(leaf: object) -> tuple:
    """What must agree for two leaves to be rows of one stack."""
    leaves, treedef = jax.tree.flatten(leaf)
    return [(x.shape, str(x.dtype)) for x in leaves], treedef


def _describe(leaf: object) -> str:
    """A leaf for a message: its kind and shapes, without its values."""
    return repr(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf))


def unstack_layers(params: PyTree) -> dict[str, PyTree]:
    """The per-layer form of a stacked tree: the inverse of `stack_layers`.

    Raises:
        ValueError: when the tree is not stacked.
    """
    if not is_stacked(params):
        raise ValueError(
            "`unstack_layers` takes a tree made by `stack_layers`; the layers of this one are not stacked."
        )
    flat: dict[str, PyTree] = {}
    for path, leaf in flatten(params).items():
        flat |= layers_of(path, leaf)
    return nest(flat)


def layers_of(path: str, leaf: PyTree) -> dict[str, PyTree]:
    """The per-layer leaves of a leaf of a stacked tree, by path; the leaf itself outside the layers."""
    if layer_path(path, 0) is None:
        return {path: leaf}
    paths = per_layer_paths(path, jax.tree.leaves(leaf)[0].shape[0])
    return dict(zip(paths, _rows(leaf, len(paths)), strict=True))


@functools.partial(jax.jit, static_argnums=1)
def _rows(leaf: PyTree, count: int) -> list[PyTree]:
    """The rows of a stack; as one program, since starting one for each array of each layer takes longer than to copy them."""
    return [jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(count)]
