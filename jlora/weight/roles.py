"""What each axis of a kernel is for: stack, input or output, one letter an axis.

"io" is a kernel [in, out]; "ioo" a query kernel (d_model, heads, head_dim); "iio" an output kernel (heads, head_dim,
d_model); "bio" a stack of kernels; "iiio" a convolution HWIO; "oi" a kernel stored transposed. A low-rank update
multiplies all in-axes by its A and all out-axes by its B, so with more axes than two the roles must be stated.
"""

import re

LINEAR = "io"
_LETTERS = {"b": "stack (leading)", "i": "in", "o": "out"}


def check_roles(roles: str) -> str:
    """`roles` itself.

    Raises:
        ValueError: unless it names at least one in- and one out-axis, with stack axes first.
    """
    if not isinstance(roles, str) or not re.fullmatch(r"b*(?=.*i)(?=.*o)[io]+", roles):
        letters = ", ".join(f"{letter!r} {meaning}" for letter, meaning in _LETTERS.items())
        raise ValueError(
            f"`roles` names every axis of a kernel by one letter ({letters}), in-axes and out-axes at least one each; got "
            f'{roles!r}. Write "ioo" for a kernel (d_model, heads, head_dim), "bio" for a stack of kernels.'
        )
    return roles


def order(roles: str) -> tuple[int, ...]:
    """The permutation that brings the axes into the order stack, in, out; it keeps the order of each kind.

    >>> order("oio")
    (1, 0, 2)
    """
    return tuple(sorted(range(len(roles)), key=lambda axis: "bio".index(roles[axis])))


def inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes another."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def sizes(roles: str, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the axes of one role, in a shape whose trailing axes `roles` names."""
    trailing = shape[len(shape) - len(roles) :]
    return tuple(size for letter, size in zip(roles, trailing, strict=True) if letter == role)
