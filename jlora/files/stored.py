"""What the readers of adapter directories share: where the trained children of an adapted tree lie in a file."""

import abc
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora._typing import Params, PyTree
from jlora.files.names import FLOATS, mismatches, wrong_dtypes
from jlora.lora import AdaptedWeight, LoraWeight
from jlora.storage import Checkpoint
from jlora.tree.modules import layer_paths, module_path
from jlora.tree.paths import flatten, map_with_path


def lora_modules(paths: Mapping[str, PyTree]) -> set[str]:
    """Modules with a low-rank update, among adapted leaves by per-layer path."""
    return {module_path(path) for path, weight in paths.items() if isinstance(weight, LoraWeight)}


def misfit(directory: Path, problems: Iterable[str]) -> ValueError:
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
        self.leaves = {path: leaf for path, leaf in flatten(adapted).items() if isinstance(leaf, AdaptedWeight)}
        rows = {row: leaf for path, leaf in self.leaves.items() for row in layer_paths(path, leaf.lead)}
        self.modules = lora_modules(rows)

    @abc.abstractmethod
    def stored_as(self, path: str, weight: AdaptedWeight) -> dict[str, tuple[str, bool]]:
        """Trained child of the leaf at a per-layer path -> (name in the file, whether it is stored transposed)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape."""
        shapes = {}
        for path, leaf in self.leaves.items():
            rows = layer_paths(path, leaf.lead)
            for row in rows:
                for field, (name, transposed) in self.stored_as(row, leaf).items():
                    shape = getattr(leaf, field).shape[0 if rows == [path] else 1 :]
                    shapes[name] = shape[::-1] if transposed else shape
        return shapes

    def read(
        self,
        file: Checkpoint,
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
            raise misfit(directory, [*problems, *hints])
        return map_with_path(lambda path, leaf: self._leaf(file, path, leaf), self.adapted)

    def _leaf(self, file: Checkpoint, path: str, leaf: PyTree) -> PyTree:
        if not isinstance(leaf, AdaptedWeight):
            return leaf
        rows = layer_paths(path, leaf.lead)
        names = [self.stored_as(row, leaf) for row in rows]

        def child(field):
            arrays = [_finite(file, name) for name, _ in (of_row[field] for of_row in names)]
            arrays = [array.T if names[0][field][1] else array for array in arrays]
            return jnp.asarray(arrays[0] if rows == [path] else np.stack(arrays))

        return leaf.with_children(**{field: child(field) for field in names[0]})


def _finite(file: Checkpoint, name: str) -> np.ndarray:
    array = file.read(name).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name!r} of the adapter is NaN or infinite: training has diverged, or the file is damaged. Nothing was loaded. Take "
            "an earlier checkpoint of it."
        )
    return array
