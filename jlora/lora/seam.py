"""The seam: every product by a stored weight in a model goes through `linear`, every lookup through `embed`.

Model code never learns what kind of weight it holds.
"""

import jax.numpy as jnp

from jlora._typing import AnyArray, Array, DTypeLike, Float, Int
from jlora.weight import Weight, dense_matmul


def linear(
    x: Float[AnyArray, "*batch d_in"],
    w: AnyArray | Weight,
    *,
    transpose: bool = False,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch d_out"]:
    """`x @ w` for a kernel `w [d_in, d_out]` of any kind; `x @ w.T` with `transpose`.

    The product runs in `x.dtype` with float32 accumulation, and the gradient with respect to `x` likewise.

    Args:
        x: float32, bfloat16 or float16.
        w: a dense array or any `Weight`; dense kernels are cast to `x.dtype`.
        transpose: multiply by the transpose (an embedding [vocab, d_model] used as output head).
        out_dtype: dtype of the result; default `x.dtype`.

    Raises:
        ValueError: when the axis of `x` does not fit that of `w`.
    """
    if w.ndim != 2 or x.shape[-1] != w.shape[1 if transpose else 0]:
        raise ValueError(
            f"`linear` multiplies x [*, d_in] by a kernel [d_in, d_out]{' transposed' if transpose else ''}; got x "
            f"{tuple(x.shape)} and w {tuple(w.shape)}. Stored kernels are [in, out]: transpose a PyTorch `Linear.weight`"
            " first, and run a stacked tree through the model or `unstack_layers`."
        )
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    # An array has no methods of ours: here and in `embed` the two are told apart, so that nobody else need.
    product = w.matmul if isinstance(w, Weight) else lambda x, **kw: dense_matmul(x, w, **kw)
    return product(x, transpose=transpose, out_dtype=out_dtype)


def embed(ids: Int[AnyArray, "*batch"], w: AnyArray | Weight) -> Float[Array, "*batch d_model"]:
    """Rows `w[ids]` of an embedding [vocab, d_model] of any kind. Ids outside the vocabulary are clipped to it."""
    return w.take(ids) if isinstance(w, Weight) else jnp.take(w, ids, axis=0, mode="clip")
