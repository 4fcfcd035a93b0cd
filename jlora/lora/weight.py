"""Adapted weights: `LoraWeight`, a frozen weight plus a low-rank update that is never formed, and `FullWeight`, trained whole."""

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora._typing import Array, DTypeLike, Float, Key, PyTree
from jlora.lora.seam import embed, linear
from jlora.quant.tensor import unfold
from jlora.weight import Weight, as_dense, dense_matmul, rebuilt, register_node
from jlora.weight.roles import LINEAR

_TINY = 1e-30
"""Floor of a squared norm: a column of zeros is scaled by 0 / 1e-15, not 0 / 0."""


class AdaptedWeight(Weight):
    """A frozen `base` and what is trained on top of it, or in its place.

    `split` leaves None in the place of the children that went to the other side.
    """

    TRAINED: ClassVar[tuple[str, ...]]
    """The children that `split` puts into the adapter half; float32."""
    FROZEN: ClassVar[tuple[str, ...]]
    """All other children."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Children that some values do without."""

    base: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def size(self) -> int:
        return self.trained_size + (0 if self.base is None else self.base.size)

    @property
    def trained_size(self) -> int:
        """Number of parameters that are trained."""
        return sum(0 if (child := getattr(self, name)) is None else child.size for name in self.TRAINED)

    @property
    @abc.abstractmethod
    def lead(self) -> Array | jax.ShapeDtypeStruct:
        """A trained child that every such value has: its leading axes are the stack's, in the adapter half too."""

    def with_children(self, **children: object) -> "AdaptedWeight":
        """The same value with these children in place of its own."""
        return rebuilt(self, **children)

    def adapter_half(self) -> "AdaptedWeight":
        return self.with_children(**dict.fromkeys(self.FROZEN))

    def base_half(self) -> "AdaptedWeight":
        return self.with_children(**dict.fromkeys(self.TRAINED))

    def mask(self) -> "AdaptedWeight":
        """The same structure holding booleans: True for what is trained."""
        children = {
            name: jax.tree.map(lambda _, name=name: name in self.TRAINED, getattr(self, name))
            for name in (*self.TRAINED, *self.FROZEN)
        }
        return self.with_children(**children)

    def origin(self) -> Array | Weight:
        """The weight as it was before it was adapted."""
        return self.base.origin() if isinstance(self.base, AdaptedWeight) else self.base

    def _base_in(self, dtype: DTypeLike) -> Array | Weight:
        return self.base.cast(dtype) if isinstance(self.base, Weight) else self.base.astype(dtype)


@functools.partial(
    register_node,
    data_fields=("base", "lora_A", "lora_B", "magnitude", "base_norm", "key"),
    meta_fields=("scaling", "dropout", "roles"),
)
@dataclasses.dataclass(frozen=True)
class LoraWeight(AdaptedWeight):
    """Stands for `base + scaling * lora_A @ lora_B`; with a `magnitude` (DoRA) for that with its columns scaled to these norms.

    Invariants: the sum is never formed by `matmul`; `base` gets no gradient from `split`; with `key` None the value
    is deterministic. Every child may carry the same leading axes (stacked layers).

    With other `roles` than "io" the base has its own axes, lora_A [*stack, *in, rank] all of its in-axes and lora_B
    [*stack, rank, *out] all of its out-axes; such a weight is used through `jlora.wrap`.

    References: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685, section 4.1; Liu et
    al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2402.09353, section 4.
    """

    TRAINED = ("lora_A", "lora_B", "magnitude")
    FROZEN = ("base", "base_norm", "key")
    OPTIONAL = ("magnitude", "base_norm", "key")

    base: Float[Array, "*stack_and_axes"] | Weight
    """The frozen weight: a dense array [*stack, d_in, d_out] or another `Weight` (a quantized base makes this QLoRA). With
    PiSSA the residual, a `LoraWeight` that takes the initial update away from the original. None in the adapter half of
    `split`, as the trained children are in the other half: what trees are made of need not be what values are made of."""
    lora_A: Float[Array, "*stack_and_in rank"]
    """[*stack, d_in, rank]. Trained; float32 whatever the base."""
    lora_B: Float[Array, "*stack_rank_and_out"]
    """[*stack, rank, d_out]. Trained; float32, zero at first (lora_A in an embedding), so that training starts at the base
    model."""
    scaling: float
    """`alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
    dropout: float = 0.0
    """Probability that an element of the update's input is dropped, when there is a key. Lookups drop nothing, as in PEFT."""
    key: Key[Array, "*stack"] | None = None
    """This step's dropout key; put there by `with_dropout` and nowhere else."""
    magnitude: Float[Array, "*stack d_out"] | None = None
    """DoRA: trained, float32; the norms of the base's columns at first. None: plain LoRA."""
    base_norm: Float[Array, "*stack d_out"] | None = None
    """DoRA: norms of the base's columns, float32; a constant that a step would otherwise read the whole kernel for."""
    roles: str = LINEAR
    """What each of the trailing axes of the base is for; see `add_lora`."""

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading stack axes."""
        return self.lora_A.shape[: self.lora_A.ndim - 1 - self.roles.count("i")]

    @property
    def lead(self):
        return self.lora_A

    def without_residual(self) -> "LoraWeight":
        """The same weight as an update of its original, `[A, A0] @ [B, -B0]`: with PiSSA the base is a residual, the
        original less A0 B0. Twice the rank also without a residual: then A0 and B0 are zeros."""
        if isinstance(self.base, LoraWeight):
            a, b = self.base.lora_A, self.base.lora_B
        else:
            a, b = jnp.zeros_like(self.lora_A), jnp.zeros_like(self.lora_B)
        original = self.origin()
        return dataclasses.replace(
            self,
            base=original,
            lora_A=jnp.concatenate([self.lora_A, a], axis=-1),
            lora_B=jnp.concatenate([self.lora_B, -b], axis=-2),
            base_norm=None if self.base_norm is None else column_norms(original),
        )

    def matmul(self, x, *, transpose, out_dtype):
        self._check_linear("multiplied by")
        if self.magnitude is None:
            base = linear(x, self.base, transpose=transpose, out_dtype=out_dtype)
            return base + self._update(self._drop(x), transpose).astype(out_dtype)
        if transpose:
            # The columns are this product's inputs: scaling them is scaling x.
            x = x * self._column_scale(self._cross(x.dtype)).astype(x.dtype)
            return dataclasses.replace(self, magnitude=None).matmul(x, transpose=True, out_dtype=out_dtype)
        return self._dora_matmul(x, out_dtype)

    def _update(self, x, transpose):
        """`scaling * x A B`."""
        first, second = (self.lora_B, self.lora_A) if transpose else (self.lora_A, self.lora_B)
        # Two skinny products, in this order: A @ B would cost as much as the base and gradients of its size.
        return self.scaling * linear(linear(x, first, transpose=transpose), second, transpose=transpose)

    def _dora_matmul(self, x, out_dtype):
        """base(x) + (m / norm - 1) base(x') + (m / norm) scaling x' A B, where x' is x after dropout.

        Term by term as in PEFT: what is not dropped of x and what is scaled meet different inputs.
        """
        flat, dropped = x.reshape(-1, x.shape[-1]), self._drop(x).reshape(-1, x.shape[-1])
        rows = [flat] if self._keeps_all else [flat, dropped]
        # One product for all that meets the base: a quantized kernel is unpacked once, and not before x is there.
        probe = jax.lax.stop_gradient(self.lora_A).T.astype(x.dtype)
        products = linear(jnp.concatenate([*rows, probe]), self.base, out_dtype=out_dtype)
        tokens, rank = flat.shape[0], self.rank
        base, scaled, cross = products[:tokens], products[-tokens - rank : -rank], products[-rank:]
        scale = self._column_scale(cross)
        change = (scale - 1.0) * scaled + scale * self._update(dropped, False)
        return (base + change.astype(out_dtype)).reshape(*x.shape[:-1], -1)

    def _cross(self, dtype):
        """`A^T W` [rank, d_out], the product that the norm needs of the base."""
        return linear(jax.lax.stop_gradient(self.lora_A).T.astype(dtype), self.base, out_dtype=jnp.float32)

    def _column_scale(self, cross: Float[Array, "rank d_out"]) -> Float[Array, " d_out"]:
        """`magnitude / norm`, where norm is that of the columns of `base + scaling * A @ B`, detached (DoRA, section 4.3).

        |W + s A B|^2 = |W|^2 + 2 s sum((A^T W) * B) + s^2 sum((A^T A B) * B), column by column: no product is of W's size.
        """
        assert self.magnitude is not None and self.base_norm is not None
        a, b, cross = jax.lax.stop_gradient((self.lora_A, self.lora_B, cross.astype(jnp.float32)))
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        change = 2.0 * cross + self.scaling * product(product(a.T, a), b)
        squared = jnp.square(self.base_norm) + self.scaling * jnp.sum(change * b, axis=0)
        return self.magnitude / jnp.sqrt(jnp.maximum(squared, _TINY))

    def take(self, ids):
        self._check_linear("looked up in")
        rows = embed(ids, self.base)
        update = self.scaling * linear(embed(ids, self.lora_A), self.lora_B)
        if self.magnitude is None:
            return rows + update.astype(rows.dtype)
        return (self._column_scale(self._cross(rows.dtype)) * (rows + update)).astype(rows.dtype)

    def dense(self, dtype=None):
        update = self._product()
        total = as_dense(self.base, jnp.float32) + self.scaling * update
        if self.magnitude is not None:
            squared = jnp.sum(jnp.square(total), axis=-2)
            total = total * (self.magnitude / jnp.sqrt(jnp.maximum(squared, _TINY)))[..., None, :]
        return total.astype(dtype or self.dtype)

    def _product(self) -> Array:
        """`lora_A @ lora_B` with the axes of the base."""
        a, b = self.lora_A, self.lora_B
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        if self.roles == LINEAR:
            return product(a, b)
        stack = self.stack
        flat = product(a.reshape(*stack, -1, self.rank), b.reshape(*stack, self.rank, -1))
        return unfold(flat, self.roles, self.shape[len(stack) :])

    def _check_linear(self, verb: str) -> None:
        if self.roles.lstrip("b") != LINEAR:
            raise ValueError(
                f"Only kernels [in, out] are {verb} directly; this one has the axes {self.shape} with roles {self.roles!r}. "
                "Call the function that uses it through `jlora.wrap`."
            )

    def cast(self, dtype):
        if self.base is None:  # the adapter half of `split`
            return self
        base = self._base_in(dtype)
        return dataclasses.replace(self, base=base, base_norm=None if self.base_norm is None else column_norms(base))

    @property
    def _keeps_all(self) -> bool:
        return self.key is None or self.dropout == 0.0

    def _drop(self, x):
        if self.key is None or self.dropout == 0.0:
            return x
        kept = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))

    def __repr__(self):
        rank = "?" if self.lora_A is None else self.rank
        kind = "" if self.magnitude is None else ", DoRA"
        kind += "" if self.roles == LINEAR else f", roles={self.roles!r}"
        return f"LoraWeight(base={self.base!r}, rank={rank}, scaling={self.scaling}, dropout={self.dropout}{kind})"


@functools.partial(register_node, data_fields=("base", "value"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class FullWeight(AdaptedWeight):
    """A dense leaf that is trained as a whole, its frozen original beside it: PEFT's `bias` and `modules_to_save`.

    Stands for `value`, in the dtype of `base`.
    """

    TRAINED = ("value",)
    FROZEN = ("base",)

    base: Float[Array, "*shape"]
    """The original: what `remove_lora` gives, and what a tied output head goes on using, as in PEFT."""
    value: Float[Array, "*shape"]
    """Trained; float32, equal to `base` at first."""

    @property
    def lead(self):
        return self.value

    def matmul(self, x, *, transpose, out_dtype):
        return dense_matmul(x, self.value, transpose=transpose, out_dtype=out_dtype)

    def take(self, ids):
        return embed(ids, self.value).astype(self.dtype)

    def dense(self, dtype=None):
        return self.value.astype(dtype or self.dtype)

    def cast(self, dtype):
        return self if self.base is None else dataclasses.replace(self, base=self._base_in(dtype))


@jax.jit
def column_norms(w: Float[Array, "*stack d_in d_out"] | Weight) -> Float[Array, "*stack d_out"]:
    """Euclidean norm of every column of a weight, one layer of a stack at a time, in float32."""
    if w.ndim > 2:
        return jax.lax.map(column_norms, w)
    return jnp.sqrt(jnp.sum(jnp.square(as_dense(w, jnp.float32)), axis=0))
