"""What an optimizer asks of each trained array: its shape in one layer, and what it is for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jlora._typing import PyTree
from jlora.tree.modules import HEADS, is_embedding
from jlora.tree.paths import flatten, module_path, path_string, rows_of


class Parameter(NamedTuple):
    """A trained array."""

    name: str
    """Its own, in its module: "lora_B", "magnitude", "value", "kernel", "scale"."""
    shape: tuple[int, ...]
    """Of one layer's."""
    stacked: bool
    """Whether the array is a stack of layers."""
    embedding: bool
    """Whether it is of an embedding."""
    head: bool
    """Whether it is of an output head."""

    @property
    def is_matrix(self) -> bool:
        """Biases, norms' scales and DoRA's magnitudes are none: they are not decayed (transformers'
        `Trainer.get_decay_parameter_names`), nor has an orthogonalized update a meaning for them."""
        return len(self.shape) >= 2

    @property
    def is_faster(self) -> bool:
        """Whether LoRA+ trains it at the higher rate: B, and vectors, as PEFT's `create_loraplus_optimizer` does."""
        return not self.is_matrix or (self.name == "lora_B" and not self.embedding)


Parameters = Mapping[str, Parameter]
"""Path -> parameter, of every array of a tree that is trained."""


def parameters_of(adapter: PyTree) -> dict[str, Parameter]:
    """The arrays of the adapter half of a `split`, or of whole parameters, by path; shapes are enough."""
    found = {}
    for path, leaf in flatten(adapter).items():
        stacked = rows_of(path, leaf)[0].layer is not None
        head = module_path(path).rpartition(".")[2] in HEADS
        for inner, x in jax.tree.leaves_with_path(leaf):
            full = "/".join(filter(None, (path, path_string(inner))))
            found[full] = Parameter(full.rpartition("/")[2], x.shape[stacked:], stacked, is_embedding(path), head)
    return found


def labels(parameters: Parameters, label: Callable[[Parameter], Any]) -> Callable[[PyTree], PyTree]:
    """What `optax.masked` and `optax.partition` take: a tree -> the labels of its arrays. Also of a part of the tree, where
    they look at one."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: label(parameters[path_string(path)]), tree)
