"""Several adapters on one base: their factors side by side, and which of them each row of a batch goes through."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._typing import Array, Float, Int, PyTree
from jlora.lora.seam import embed, linear
from jlora.lora.weight import AdaptedWeight, LoraWeight
from jlora.tree.modules import nearest
from jlora.tree.paths import flatten, is_weight, map_with_path
from jlora.weight import Weight, as_dense, einsum, register_node
from jlora.weight.roles import LINEAR

Choice: TypeAlias = str | None | Sequence[str | None] | Int[Array, "*batch"]
"""An adapter's name, None for the base alone, or one of these (or a number in the order of the names, -1: none) for each row."""


@functools.partial(
    register_node,
    data_fields=("base", "lora_A", "lora_B", "ids"),
    meta_fields=("names", "ranks", "scalings", "dropouts"),
)
@dataclasses.dataclass(frozen=True)
class RoutedWeight(AdaptedWeight):
    """Stands for `base + scalings[i] * lora_A[i] @ lora_B[i]`, where i is chosen by `ids`: once, or for each row of a batch.

    A choice is a value, not a shape: another one compiles nothing. Smaller ranks are filled up with zeros. Every child may
    carry the same leading axes (stacked layers).

    Reference: the products of a batch of adapters are those of Punica, Chen et al., 2023, arXiv:2310.18547, section 3.
    """

    TRAINED = ("lora_A", "lora_B")
    FROZEN = ("base", "ids")
    OPTIONAL = ("ids",)

    base: Float[Array, "*stack d_in d_out"] | Weight
    """Frozen, shared by all."""
    lora_A: Float[Array, "*stack adapters d_in rank"]
    """float32."""
    lora_B: Float[Array, "*stack adapters rank d_out"]
    """float32."""
    names: tuple[str, ...]
    """Of the adapters, in the order of the factors."""
    ranks: tuple[int, ...]
    """Of each adapter here; 0: it leaves this weight alone."""
    scalings: tuple[float, ...]
    """As in `LoraWeight`."""
    dropouts: tuple[float, ...]
    """As in `LoraWeight`; kept for `unstack_adapters`, as nothing is dropped here."""
    ids: Int[Array, "*stack"] | Int[Array, "*stack batch"] | None = None
    """The choice, put there by `route`: int32, -1 for the base alone. None: not chosen yet."""

    @property
    def lead(self) -> Array | jax.ShapeDtypeStruct:
        a = self.lora_A
        return jax.ShapeDtypeStruct((*a.shape[:-3], *a.shape[-2:]), a.dtype)

    @property
    def per_row(self) -> bool:
        """Whether every row of a batch has its own choice."""
        return self.ids is not None and self.ids.ndim > self.lora_A.ndim - 3

    def matmul(self, x, *, transpose, out_dtype):
        base = linear(x, self.base, transpose=transpose, out_dtype=out_dtype)
        ids, scale = self._choice(x.shape[:-1])
        first, second = (self.lora_B, self.lora_A) if transpose else (self.lora_A, self.lora_B)
        if not self.per_row:
            inner = linear(x, first[ids], transpose=transpose)
            return base + (scale * linear(inner, second[ids], transpose=transpose)).astype(out_dtype)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        spec = "bti,boi->bto" if transpose else "bti,bio->bto"
        update: Any = einsum(spec, x.dtype, einsum(spec, x.dtype, rows, first[ids]), second[ids])
        return base + (scale[:, None, None] * update).astype(out_dtype).reshape(base.shape)

    def take(self, ids):
        rows = embed(ids, self.base)
        chosen, scale = self._choice(ids.shape)
        tokens = jnp.clip(ids, 0, self.shape[0] - 1)
        if not self.per_row:
            return rows + (scale * linear(self.lora_A[chosen][tokens], self.lora_B[chosen])).astype(rows.dtype)
        of_row = chosen.reshape(-1, *(1,) * (ids.ndim - 1))
        factors = self.lora_A[of_row, tokens].reshape(ids.shape[0], -1, self.lora_A.shape[-1])
        update: Any = einsum("bti,bio->bto", factors.dtype, factors, self.lora_B[chosen])
        return rows + (scale[:, None, None] * update).astype(rows.dtype).reshape(rows.shape)

    def dense(self, dtype=None):
        if self.per_row:
            raise ValueError(
                "Rows that go through different adapters have no one dense weight. Choose one first: "
                f"`merge(route(params, {self.names[0]!r}))`."
            )
        ids, scale = self._choice(())
        update = jnp.matmul(self.lora_A[ids], self.lora_B[ids], precision=jax.lax.Precision.HIGHEST)
        return (as_dense(self.base, jnp.float32) + scale * update).astype(dtype or self.dtype)

    def cast(self, dtype):
        return self if self.base is None else dataclasses.replace(self, base=self._base_in(dtype))

    def _choice(self, rows: tuple[int, ...]) -> tuple[Array, Array]:
        """(index into the factors, scaling), each [] or [batch]; the index is in range, and the scaling of "none" is 0."""
        if self.ids is None:
            raise ValueError(
                f"These parameters hold the adapters {', '.join(map(repr, self.names))} and none is chosen. Choose with "
                f"`route(params, {self.names[0]!r})`, or with a name for each row of the batch."
            )
        if self.per_row and (not rows or rows[0] != self.ids.shape[0]):
            raise ValueError(
                f"`route` chose adapters for a batch of {self.ids.shape[0]} rows; got a batch of shape {rows}. Give `route` one "
                "choice for each row."
            )
        return jnp.maximum(self.ids, 0), jnp.asarray((*self.scalings, 0.0), jnp.float32)[self.ids]

    def adapter(self, name: str) -> Any:
        """This weight with the adapter of that name only: a `LoraWeight`, or the base where it has none."""
        i = self.names.index(name)
        if self.ranks[i] == 0:
            return self.base
        rank = self.ranks[i]
        a, b = self.lora_A[..., i, :, :rank], self.lora_B[..., i, :rank, :]
        return LoraWeight(self.base, a, b, scaling=self.scalings[i], dropout=self.dropouts[i])

    def __repr__(self):
        return f"RoutedWeight(base={self.base!r}, adapters={dict(zip(self.names, self.ranks, strict=True))})"


def stack_adapters(trees: Mapping[str, PyTree]) -> PyTree:
    """One tree that holds several adapters of one base, by name; choose among them with `route`.

    Args:
        trees: name -> the base's parameters with that adapter on (`add_lora`, `load_adapter`), all per-layer or all stacked.
            They may differ in rank, scaling and targets. PiSSA becomes the plain LoRA of twice the rank that it is.

    Returns:
        The tree with a `RoutedWeight` wherever one of them is adapted. The base is that of the first tree, not copied.

    Raises:
        ValueError: when the bases differ, or a weight is more than a low-rank update (DoRA, trained biases and modules).
    """
    if not trees:
        raise ValueError("`stack_adapters` needs at least one adapter; got none.")
    flat = {name: flatten(tree) for name, tree in trees.items()}
    first, *others = flat.items()
    for name, leaves in others:
        if leaves.keys() != first[1].keys():
            path = sorted(leaves.keys() ^ first[1].keys())[0]
            raise ValueError(
                f"The adapters {first[0]!r} and {name!r} are on different trees: only one has {path!r}. Load both onto the same "
                "parameters."
            )

    def one(path, leaf):
        return _side_by_side(path, {name: leaves[path] for name, leaves in flat.items()})

    return map_with_path(one, trees[first[0]])


def _side_by_side(path: str, leaves: Mapping[str, PyTree]) -> PyTree:
    for name, leaf in leaves.items():
        kind = _other_kind(leaf)
        if kind:
            raise ValueError(
                f"The adapter {name!r} has {kind} at {path!r}; side by side stand plain low-rank updates only. Load that "
                "adapter by itself."
            )
    plain = {n: w.without_residual() if _is_residual(w) else w for n, w in leaves.items()}
    bases = {n: w.base if isinstance(w, LoraWeight) else w for n, w in plain.items()}
    (first, base), *others = bases.items()
    for name, other in others:
        if not _equal(base, other):
            raise ValueError(
                f"The adapters {first!r} and {name!r} have different bases at {path!r}. Adapters share the weights they were "
                "trained on: load both onto the same parameters."
            )
    adapted = [w for w in plain.values() if isinstance(w, LoraWeight)]
    if not adapted:
        return base
    like, widest = adapted[0], max(w.rank for w in adapted)
    factors = [(w.lora_A, w.lora_B) if isinstance(w, LoraWeight) else _nothing(like) for w in plain.values()]
    return RoutedWeight(
        base=base,
        lora_A=jnp.stack([_widened(a, -1, widest) for a, _ in factors], axis=-3),
        lora_B=jnp.stack([_widened(b, -2, widest) for _, b in factors], axis=-3),
        names=tuple(plain),
        ranks=tuple(w.rank if isinstance(w, LoraWeight) else 0 for w in plain.values()),
        scalings=tuple(w.scaling if isinstance(w, LoraWeight) else 0.0 for w in plain.values()),
        dropouts=tuple(w.dropout if isinstance(w, LoraWeight) else 0.0 for w in plain.values()),
    )


def _other_kind(leaf: object) -> str:
    """What a leaf is beside a dense or quantized weight or its low-rank update, or ""."""
    if not isinstance(leaf, AdaptedWeight):
        return ""
    if not isinstance(leaf, LoraWeight):
        return f"a {type(leaf).__name__}"
    if leaf.roles != LINEAR:
        return f"a kernel of roles {leaf.roles!r}"
    return "" if leaf.magnitude is None else "a DoRA magnitude"


def _is_residual(w: object) -> bool:
    return isinstance(w, LoraWeight) and isinstance(w.base, LoraWeight)


def _equal(a: PyTree, b: PyTree) -> bool:
    """Whether two leaves have the same values. The same arrays are not compared."""
    ours, theirs = jax.tree.flatten(a), jax.tree.flatten(b)
    pairs = zip(ours[0], theirs[0], strict=False)
    same = ours[1] == theirs[1] and len(ours[0]) == len(theirs[0])
    return same and all(x is y or (x.dtype == y.dtype and bool(jnp.array_equal(x, y))) for x, y in pairs)


def _nothing(like: LoraWeight) -> tuple[Array, Array]:
    """Factors of rank 0."""
    return like.lora_A[..., :0], like.lora_B[..., :0, :]


def _widened(factor: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, size - factor.shape[axis])
    return jnp.pad(factor, widths)


def unstack_adapters(params: PyTree) -> dict[str, PyTree]:
    """The inverse of `stack_adapters`: name -> the tree with that adapter alone, as `save_adapter` takes it."""

    def only(name):
        return lambda w: w.adapter(name) if isinstance(w, RoutedWeight) else w

    return {name: jax.tree.map(only(name), params, is_leaf=is_weight) for name in adapter_names(params)}


def adapter_names(params: PyTree) -> tuple[str, ...]:
    """Names of the adapters that stand side by side in `params`.

    Raises:
        ValueError: when there are none.
    """
    for leaf in flatten(params).values():
        if isinstance(leaf, RoutedWeight):
            return leaf.names
    raise ValueError(
        "These parameters do not hold several adapters. Make them with `load_adapters(directory, params)` or `stack_adapters`."
    )


def route(params: PyTree, adapter_ids: Choice) -> PyTree:
    """The parameters with a choice among their adapters. Under `jit`, or passed to it, other choices compile nothing anew.

    Args:
        params: made by `stack_adapters` or `load_adapters`.
        adapter_ids: a name, for the whole batch, or None for the base alone; or a choice for each row: a sequence of these, or
            int32 [batch] of numbers in the order of `adapter_names`, -1 for the base alone (traced or not).

    Raises:
        ValueError: for a name or number that there is none of (traced numbers cannot be looked at: below 0 is the base, and
            above the last is the last).

    Example:
        >>> import jlora
        >>> base, key = {"proj": {"kernel": jnp.ones((4, 6))}}, jax.random.key(0)
        >>> trees = {n: jlora.add_lora(base, jlora.LoraConfig(rank=r), key=key) for n, r in (("a", 2), ("b", 3))}
        >>> chosen = route(stack_adapters(trees), ["a", "b", None])
        >>> linear(jnp.ones((3, 7, 4)), chosen["proj"]["kernel"]).shape  # three rows of seven tokens
        (3, 7, 6)
    """
    ids = _as_ids(adapter_ids, adapter_names(params))

    def one(w):
        if not isinstance(w, RoutedWeight):
            return w
        stack = w.lora_A.shape[:-3]
        return dataclasses.replace(w, ids=jnp.broadcast_to(ids, (*stack, *ids.shape)))

    return jax.tree.map(one, params, is_leaf=is_weight)


def _as_ids(choice: Choice, names: tuple[str, ...]) -> Int[Array, "*batch"]:
    if isinstance(choice, jax.Array | np.ndarray):
        if not jnp.issubdtype(choice.dtype, jnp.integer) or choice.ndim > 1:
            raise ValueError(
                f"`adapter_ids` must be integers, [batch] or one; got {choice.dtype} {tuple(choice.shape)}. Pass int32 numbers in "
                f"the order of {names}, or the names themselves."
            )
        if isinstance(choice, Tracer):
            return jnp.clip(choice, -1, len(names) - 1).astype(jnp.int32)
        wrong = [i for i in np.ravel(choice).tolist() if not -1 <= i < len(names)]
        if wrong:
            raise ValueError(
                f"`adapter_ids` must be in -1..{len(names) - 1}; got {wrong[0]}. The adapters are {', '.join(names)}."
            )
        return jnp.asarray(choice, jnp.int32)
    if choice is None or isinstance(choice, str):
        return jnp.asarray(_index(choice, names), jnp.int32)
    return jnp.asarray([_index(name, names) for name in choice], jnp.int32)


def _index(name: object, names: tuple[str, ...]) -> int:
    if name is None:
        return -1
    if isinstance(name, int) and -1 <= name < len(names):
        return name
    if name not in names:
        raise ValueError(
            f"There is no adapter {name!r}; the adapters are {', '.join(map(repr, names))}.{nearest(str(name), names)}"
        )
    return names.index(name)
