"""Operations on the axes of one side of a kernel, done alike to the kernel and to the factor that owns the side."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._typing import Array


def _reshape(x, at, operand, count, new):
    return x.reshape(*x.shape[:at], *new, *x.shape[at + count :])


def _permute(x, at, operand, permutation):
    moved = [at + k for k in permutation]
    return jnp.transpose(x, (*range(at), *moved, *range(at + len(moved), x.ndim)))


def _slice(x, at, operand, axis, start, limit, stride):
    return lax.slice_in_dim(x, start, limit, stride, axis=at + axis)


def _dynamic_slice(x, at, operand, axis, size):
    return lax.dynamic_slice_in_dim(x, operand, size, axis=at + axis)


def _take(x, at, operand, axis):
    return jnp.take(x, operand, axis=at + axis, mode="clip")


def _reverse(x, at, operand, axes):
    return lax.rev(x, [at + axis for axis in axes])


_OPERATIONS = {
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "take": _take,
    "reverse": _reverse,
}


@dataclasses.dataclass(frozen=True)
class SideOp:
    """One operation, static but for an operand (traced indices)."""

    name: str
    arguments: tuple[Any, ...]

    def __call__(self, x: Array, at: int, operand: Array | None = None) -> Array:
        """Done to the axes of `x` from `at` on, which are those of the side."""
        return _OPERATIONS[self.name](x, at, operand, *self.arguments)

    def sizes(self, old: tuple[int, ...], operand: Array | None) -> tuple[int, ...]:
        """Sizes of the side afterwards."""
        return jax.eval_shape(lambda x, i: self(x, 0, i), jax.ShapeDtypeStruct(old, jnp.float32), operand).shape

    @property
    def only_shape(self) -> bool:
        """Whether the elements stay in their order."""
        return self.name == "reshape"

    @property
    def keeps_all(self) -> bool:
        """Whether every element is still there, once."""
        return self.name in ("reshape", "permute", "reverse")

    @classmethod
    def reshape(cls, count: int, new: tuple[int, ...]) -> "SideOp":
        return cls("reshape", (count, tuple(map(int, new))))

    @classmethod
    def permute(cls, permutation: tuple[int, ...]) -> "SideOp":
        return cls("permute", (tuple(permutation),))

    @classmethod
    def slice(cls, axis: int, start: int, limit: int, stride: int = 1) -> "SideOp":
        return cls("slice", (axis, int(start), int(limit), int(stride)))

    @classmethod
    def dynamic_slice(cls, axis: int, size: int) -> "SideOp":
        return cls("dynamic_slice", (axis, int(size)))

    @classmethod
    def take(cls, axis: int) -> "SideOp":
        return cls("take", (axis,))

    @classmethod
    def reverse(cls, axes: tuple[int, ...]) -> "SideOp":
        return cls("reverse", (tuple(axes),))


def group(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes of equally many elements, cut into the smallest runs whose sizes have the same product.

    >>> group((4, 6), (4, 2, 3))
    [([0], [0]), ([1], [1, 2])]
    >>> group((4, 1, 6), (4, 6))
    [([0], [0]), ([1], []), ([2], [1])]
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1 and not (j < len(new) and new[j] == 1):
            runs.append(([i], []))
            i += 1
            continue
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            runs.append(([], [j]))
            j += 1
            continue
        left, right = [i], [j]
        i, j = i + 1, j + 1
        while (a := math.prod(old[k] for k in left)) != (b := math.prod(new[k] for k in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs
