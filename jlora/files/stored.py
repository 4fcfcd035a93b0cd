"""What the readers of adapter directories share: where the trained children of an adapted tree lie in a file."""

import abc
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora._typing import Params, PyTree
from jlora.files.names import FLOATS, mismatches, wrong_dtypes
from jlora.lora import AdaptedWeight
from jlora.storage.tensors import Tensors
from jlora.tree.paths import map_with_path, rows, rows_of
from jlora.weight import is_adapted


def does_not_fit(directory: Path, problems: Iterable[str]) -> ValueError:
    """The error that lists all that speaks against loading an adapter."""
    return ValueError(
        f"The adapter in {str(directory)!r} does not fit these parameters:\n  "
        + "\n  ".join(problems)
        + "\nNothing was loaded. Check that it was trained on this base model."
    )


class StoredAdapter(abc.ABC):
    """An adapted tree whose trained children are in a file."""

    def __init__(self, adapted: Params):
        self.adapted = adapted
        self.rows = [row for row in rows(adapted) if is_adapted(row.leaf)]
        self.modules = {row.module for row in self.rows if not row.leaf.WHOLE}

    @abc.abstractmethod
    def stored_as(self, path: str, weight: AdaptedWeight) -> dict[str, tuple[str, bool]]:
        """Trained child of the leaf at a per-layer path -> (name in the file, whether it is stored transposed)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape."""
        shapes = {}
        for row in self.rows:
            for field, (name, transposed) in self.stored_as(row.path, row.leaf).items():
                shape = getattr(row.leaf, field).shape[0 if row.layer is None else 1 :]
                shapes[name] = shape[::-1] if transposed else shape
        return shapes

    def read(
        self,
        file: Tensors,
        directory: Path,
        *,
        ignorable: Iterable[str] = (),
        also: Iterable[str] = (),
        hints: Iterable[str] = (),
    ) -> PyTree:
        """The tree with its trained children from the file.

        Args:
            ignorable: names that the file may hold besides.
            also: problems found before, for the same error.
            hints: what may explain others, and is no problem where there are none.

        Raises:
            ValueError: for missing, unexpected and mis-shaped tensors and those that are no floats, all in one error; for those
                with values that are NaN or infinite.
        """
        shapes = self.shapes()
        problems = [*also, *mismatches(shapes, file.shapes, ignorable)]
        problems += wrong_dtypes(dict.fromkeys(shapes, FLOATS), file.dtypes)
        if problems:
            raise does_not_fit(directory, [*problems, *hints])
        return map_with_path(lambda path, leaf: self._leaf(file, path, leaf), self.adapted)

    def _leaf(self, file: Tensors, path: str, leaf: PyTree) -> PyTree:
        if not is_adapted(leaf):
            return leaf
        layers = rows_of(path, leaf)
        names = [self.stored_as(row.path, leaf) for row in layers]

        def child(field):
            arrays = [_finite(file, name) for name, _ in (of_row[field] for of_row in names)]
            arrays = [array.T if names[0][field][1] else array for array in arrays]
            return jnp.asarray(arrays[0] if layers[0].layer is None else np.stack(arrays))

        return leaf.with_children(**{field: child(field) for field in names[0]})


def _finite(file: Tensors, name: str) -> np.ndarray:
    array = file.read(name).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name!r} of the adapter is NaN or infinite: training has diverged, or the file is damaged. Nothing was loaded. Take "
            "an earlier checkpoint of it."
        )
    return array
