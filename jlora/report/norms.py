"""Where an adapter learned: the size of its update of every module, from its files alone."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jlora.files.adapters import open_adapter, update_tensors
from jlora.files.peft import PEFT
from jlora.lora.kinds import AdaptedWeight, LowRankWeight
from jlora.weight import Inseparable
from jlora.weight.node import rebuilt


class Update(NamedTuple):
    """Of one module."""

    module: str
    """As the checkpoint names it: "model.layers.3.mlp.up_proj"."""
    norm: float
    """The Frobenius norm of `scaling * A @ B`."""

    @property
    def layer(self) -> int | None:
        """None: it is in no layer, as an embedding."""
        found = re.search(r"\.(\d+)\.", self.module)
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """The module within its layer: "mlp.up_proj"."""
        return re.split(r"\.\d+\.", self.module, maxsplit=1)[-1]


def update_norms(directory: str | os.PathLike) -> list[Update]:
    """Of an adapter directory in PEFT's layout, in the order of its file; of DoRA that of the update before columns are scaled.

    Raises:
        FileNotFoundError, ValueError: when the adapter cannot be read.
        Inseparable: for a kind whose update is none of two factors without the base, such as MiSS.
    """
    found = open_adapter(directory)
    if found.layout is not PEFT:
        raise ValueError(f"{os.fspath(directory)!r} is in {found.layout.name}'s layout; the report reads PEFT's.")
    config, tensors = found.layout.config(found), found.tensors
    form = config.weight.PEFT
    assert form is not None  # its config was read
    updates = []
    for module, names in update_tensors(found.layout, tensors.shapes, config.weight).items():
        children = {child: tensors.read(name).astype(np.float64) for child, name in names.items()}
        children = {child: x.T if form.tensors[child][1] else x for child, x in children.items()}
        updates.append(Update(module, config.scaling_of(module) * frobenius(*_factors(config.weight, children))))
    return updates


def _factors(kind: type[AdaptedWeight], children: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module."""
    weight = rebuilt(object.__new__(kind), base=None, **children)  # the half that is trained, as `split` leaves it
    if not isinstance(weight, LowRankWeight):
        raise Inseparable(weight, "is no update of two factors")
    a, b = weight.factors()  # NumPy's, as the children are: nothing is compiled
    return np.asarray(a), np.asarray(b)


def frobenius(a: np.ndarray, b: np.ndarray) -> float:
    """The Frobenius norm of `a @ b`, [in, rank] and [rank, out], which is not formed: ``|AB|^2 = trace(A^T A B B^T)``.

    >>> round(frobenius(np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])), 6), round(5**0.5 * 5, 6)
    (11.18034, 11.18034)
    """
    return float(np.sqrt(max(0.0, np.sum((a.T @ a) * (b @ b.T)))))
