"""Named tensors of a file, whatever its format."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tensors(Protocol):
    """A file, or several that belong together, of which one tensor is read at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape, without reading any tensor."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Name -> dtype, by safetensors' names of them."""
        ...

    def read(self, name: str) -> np.ndarray: ...
