"""Parameter trees by path, "model/layers/3/self_attn/q_proj/kernel": the leaves there are, and `rows`, the leaves that the
per-layer form of the tree has.

`Weight` values count as leaves here, so a wrapped tree has the same paths as the tree it was made from.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._typing import DTypeLike, PyTree
from jlora.weight import is_weight as is_weight

LAYER_CONTAINERS = ("layers", "h")
"""Names of the nodes whose children "0", "1", … are the layers, in Llama-like and GPT-2 checkpoints."""
LEAF_NAMES = ("kernel", "embedding", "scale", "bias")
"""What Flax calls the leaves of a module."""


def path_string(key_path: Iterable[Any]) -> str:
    """A JAX key path as "a/b/c"."""
    parts = []
    for entry in key_path:
        for field in ("key", "name", "idx"):
            if hasattr(entry, field):
                parts.append(str(getattr(entry, field)))
                break
        else:
            parts.append(str(entry))
    return "/".join(parts)


def flatten(tree: PyTree) -> dict[str, PyTree]:
    """Leaves by path, `Weight` values whole."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)
    return {path_string(path): leaf for path, leaf in leaves}


def map_with_path(fn: Callable[[str, PyTree], PyTree], tree: PyTree) -> PyTree:
    """`fn(path, leaf)` over every leaf, `Weight` values whole; same structure."""
    return jax.tree_util.tree_map_with_path(lambda p, x: fn(path_string(p), x), tree, is_leaf=is_weight)


def nest(flat: dict[str, PyTree]) -> dict[str, PyTree]:
    """Nested dictionaries from leaves by path: the inverse of `flatten` on dictionaries."""
    tree: dict[str, PyTree] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def layer_path(path: str, index: int) -> str | None:
    """The path of layer `index` of a stacked leaf, or None when `path` is not in a stacked container.

    >>> layer_path("model/layers/self_attn/q_proj/kernel", 3)
    'model/layers/3/self_attn/q_proj/kernel'
    >>> layer_path("model/norm/scale", 3) is None
    True
    """
    container = re.fullmatch(rf"((?:.*/)?(?:{'|'.join(LAYER_CONTAINERS)}))/(?!\d+/)(.*)", path)
    return None if container is None else f"{container[1]}/{index}/{container[2]}"


def per_layer_paths(path: str, depth: int) -> list[str]:
    """The paths of the layers of a stacked leaf; the path itself outside a stacked container."""
    return [p for i in range(depth) if (p := layer_path(path, i)) is not None] or [path]


def split_layer_path(path: str) -> tuple[str, int] | None:
    """(path in the stacked tree, layer index) of a per-layer path, or None outside the layers.

    >>> split_layer_path("transformer/h/11/ln_1/bias")
    ('transformer/h/ln_1/bias', 11)
    """
    layer = re.fullmatch(rf"((?:.*/)?(?:{'|'.join(LAYER_CONTAINERS)}))/(\d+)/(.*)", path)
    return None if layer is None else (f"{layer[1]}/{layer[3]}", int(layer[2]))


def is_array(leaf: PyTree) -> bool:
    """Whether the leaf stands for an array; a tree may hold functions and settings too, such as an Equinox module's."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def module_path(path: str) -> str:
    """The checkpoint's module path of a leaf: "model/layers/3/mlp/up_proj/kernel" -> "model.layers.3.mlp.up_proj"."""
    parent, _, name = path.rpartition("/")
    return (parent if parent and name in LEAF_NAMES else path).replace("/", ".")


class Row(NamedTuple):
    """A leaf as the per-layer form has it: a leaf of the tree, or one layer of a stacked one."""

    path: str
    """"model/layers/3/mlp/up_proj/kernel"."""
    leaf_path: str
    """Its path in the tree: "model/layers/mlp/up_proj/kernel" where layers are stacked."""
    layer: int | None
    """Of the layer, where the leaf is a stack of layers."""
    leaf: Any
    """As the tree has it: all layers of a stack."""

    @property
    def module(self) -> str:
        """ "model.layers.3.mlp.up_proj"."""
        return module_path(self.path)

    @property
    def kind(self) -> str:
        """What the leaf is to its module: "kernel", "embedding", "scale", "bias" in Flax's names."""
        return self.path.rpartition("/")[2]

    @property
    def ndim(self) -> int:
        """Axes of one layer's."""
        return self.leaf.ndim - (self.layer is not None)

    @property
    def value(self) -> Any:
        """The layer's own."""
        return self.leaf if self.layer is None else jax.tree.map(lambda x: x[self.layer], self.leaf)


def rows_of(path: str, leaf: Any) -> list[Row]:
    """The rows that one leaf stands for: itself, or one for each layer of a stacked leaf."""
    shaped = leaf.representative if is_weight(leaf) else leaf
    # A kernel with two axes is one kernel, whatever the nodes above it are called.
    if layer_path(path, 0) is None or not is_array(shaped) or (path.endswith("/kernel") and shaped.ndim < 3):
        return [Row(path, path, None, leaf)]
    return [Row(row, path, i, leaf) for i, row in enumerate(per_layer_paths(path, shaped.shape[0]))]


def rows(tree: Any) -> list[Row]:
    """The leaves of a tree as the per-layer form has them; halves of a `split` too."""
    return [row for path, leaf in flatten(tree).items() for row in rows_of(path, leaf)]


def cast(params: PyTree, dtype: DTypeLike) -> PyTree:
    """The tree with its frozen float leaves in `dtype`.

    Integer leaves and packed codes are left alone, and the factors of an adapter keep their float32 master copies
    (they are cast to the activations' dtype where they are used).
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be a floating point type; got {dtype}. Pass jnp.bfloat16 or jnp.float32.")

    def in_dtype(leaf):
        if is_weight(leaf):
            return leaf.cast(dtype)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(in_dtype, params, is_leaf=is_weight)


def count(params: PyTree) -> int:
    """Number of parameters: what the values stand for plus what adapters add. `count(split(params)[0])`: the trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_weight))


def nbytes(params: PyTree) -> int:
    """Bytes of every stored array, packed codes as packed."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
