"""`quantize`, `dequantize`, and `quantize_params` for the kernels of a tree."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora._typing import AnyArray, Array, DTypeLike, Float, PyTree
from jlora.quant.spec import QuantSpec
from jlora.quant.tensor import QuantizedTensor, quantize_kernel, quantize_rows
from jlora.tree.modules import ALL_LINEAR, Modules, describe, modules_of, named, nearest
from jlora.tree.paths import flatten, is_weight, map_with_path
from jlora.weight import materialize
from jlora.weight.roles import check_roles


def quantize(
    w: Float[AnyArray, "*stack d_in d_out"] | Float[AnyArray, " n"], spec: QuantSpec, *, roles: str | None = None
) -> QuantizedTensor:
    """Packs a weight; stacked weights are packed layer by layer.

    Args:
        w: float32, bfloat16 or float16; quantized in float32.
        spec: `NF4(…)`, `Int8(…)`, `Int4(…)`, `Int4G128()`, `MXFP4()`, or one of ggml's: `Q8_0()`, `Q4_0()`, `Q4_1()`, `Q5_0()`
            or `Q5_1()`.
        roles: what each trailing axis is for, for kernels that are not [*stack, in, out]: "ioo" for (d_model, heads,
            head_dim), "oi" for one that is stored transposed; leading axes it does not name are stack axes. The bytes
            are those of the kernel brought to [in, out], blocks along the in-axes.

    Returns:
        An `NF4Tensor` for `NF4`, a `QuantizedTensor` for the others.

    Raises:
        TypeError: when `w` is not a float array.
        ValueError: when `roles` does not fit, and when `w` is empty, a scalar, not finite, or beyond what the scales of the
            format reach (under `jit`, where values cannot be looked at, such a block decodes to NaN or infinity instead); for
            `Q4_K()`, `Q5_K()` and `Q6_K()`, which only files hold.

    Example:
        >>> from jlora import NF4
        >>> q = quantize(jnp.ones((128, 64)), NF4())
        >>> q
        NF4Tensor(shape=(128, 64), dtype=float32, block_size=64, double_quant)
        >>> float(dequantize(q)[0, 0])
        1.0
    """
    if isinstance(w, QuantizedTensor):  # what this function makes: it must not be taken for an array
        raise TypeError(f"`quantize` takes a dense array; got {w!r}, which is quantized already.")
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"`quantize` takes a floating point array; got {w.dtype}.")
    if w.ndim == 0 or w.size == 0:
        raise ValueError(f"`quantize` needs at least one axis and one element; got shape {w.shape}.")
    if not isinstance(w, Tracer):
        check_finite(w, "w")
    if roles is None:
        q = quantize_rows(jnp.swapaxes(w, -1, -2) if w.ndim > 1 else w, spec)
    elif w.ndim < len(check_roles(roles)):
        raise ValueError(f"`roles` {roles!r} names {len(roles)} axes; `w` has {w.ndim}: {w.shape}. Name each of them.")
    else:
        q = quantize_kernel(w, spec, roles)
    if not isinstance(w, Tracer):
        _check_reach(q, w)
    return q


def check_finite(w: Array, name: str) -> None:
    """Raises a ValueError when `w`, a concrete array called `name`, has a value that is NaN or infinite."""
    bad = w.size - int(_count_finite(w))
    if bad:
        raise ValueError(
            f"Quantization needs finite values; {bad} of the {w.size} of {name!r} are NaN or infinite, and their blocks "
            "would be lost. Repair the weight first."
        )


def _check_reach(q: QuantizedTensor, w: Array) -> None:
    """Raises a ValueError when a scale has overflowed: float16 ends at 65504."""
    floats = [leaf for leaf in jax.tree.leaves(q) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if sum(leaf.size - int(_count_finite(leaf)) for leaf in floats):
        raise ValueError(
            f"The largest magnitude of `w`, {float(jnp.abs(w).max()):.4g}, is beyond what the scales of {q.spec.name} hold. Pass a "
            "format with float32 scales, such as jlora.Int8()."
        )


@jax.jit
def _count_finite(w: Array) -> Array:
    return jnp.sum(jnp.isfinite(w))


def dequantize(q: QuantizedTensor, dtype: DTypeLike | None = None) -> Float[Array, "*shape"]:
    """The dense weight, decoded in float32 and cast to `dtype` (default: that of the weight that was quantized)."""
    return materialize(q, dtype)


def quantizable(there: Modules, targets: str | Sequence[str] = ALL_LINEAR) -> set[str]:
    """Leaf paths of the kernels that `targets` names, by the rules of `LoraConfig.targets`.

    Raises:
        ValueError: when a target matches no kernel, or the output head, which stays dense as in QLoRA and bitsandbytes.
    """
    kernels = there.kernels
    body = named(kernels, ALL_LINEAR).chosen
    chosen = {kernels[module] for module in named(body, targets).chosen}
    rules = [targets] if isinstance(targets, str) else [(name,) for name in targets]
    dead = [rule for rule in rules if not named(body, rule).chosen]
    if dead or not chosen:
        rule = dead[0] if dead else targets
        name = rule if isinstance(rule, str) else "".join(rule)
        heads = [module for module in named(kernels, rule).chosen if module not in body]
        reason = f"names the output head {heads[0]!r}, which stays dense" if heads else "matches no linear kernel"
        raise ValueError(
            f"`targets` {name!r} {reason}.{nearest(name, body)} Linear kernels there are: {describe(body)}."
        )
    return chosen


def quantize_params(
    params: PyTree,
    spec: QuantSpec,
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    roles: Mapping[str, str] | None = None,
) -> PyTree:
    """The tree with its linear kernels quantized; embeddings, norms, biases and the output head stay as they are.

    Args:
        roles: module pattern -> what each axis is for, as in `add_lora`; kernels that are not [in, out] are quantized only
            when theirs are stated, as in `quantize`.

    Raises:
        ValueError: when a target or a pattern of `roles` matches no kernel, or a kernel is adapted or quantized already:
            quantize, then `add_lora`.
    """
    there = modules_of(params, roles)
    chosen = quantizable(there, targets)
    wrapped = [path for path, leaf in flatten(params).items() if path in chosen and is_weight(leaf)]
    if wrapped:
        kind = type(flatten(params)[wrapped[0]]).__name__
        raise ValueError(
            f"`quantize_params` takes dense kernels; {wrapped[0]!r} is a {kind}. Quantize the base first, then `add_lora`; "
            "`merge(params)` makes a quantized or adapted tree dense."
        )

    def quantized(path, leaf):
        return quantize(leaf, spec, roles=there.roles.get(path)) if path in chosen else leaf

    return map_with_path(quantized, params)
