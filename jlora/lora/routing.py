"""Several adapters on one base: their factors side by side, and which of them each row of a batch goes through."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._typing import AnyArray, Array, Int, Params, PyTree
from jlora.lora.kinds import LoraWeight, RoutedWeight, as_lora
from jlora.lora.transform import map_adapted
from jlora.tree.modules import nearest
from jlora.tree.paths import flatten, map_with_path
from jlora.weight import Inseparable, is_adapted
from jlora.weight.roles import LINEAR

Choice: TypeAlias = str | None | Sequence[str | None] | Int[AnyArray, "*batch"]
"""An adapter's name, None for the base alone, or one of these (or a number in the order of the names, -1: none) for each row."""


def stack_adapters(trees: Mapping[str, Params]) -> Any:
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

    return map_with_path(
        lambda path, _: _side_by_side(path, {name: leaves[path] for name, leaves in flat.items()}), trees[first[0]]
    )


def _side_by_side(path: str, leaves: Mapping[str, Any]) -> Any:
    plain = {name: _as_update(path, name, leaf) for name, leaf in leaves.items() if is_adapted(leaf)}
    bases = {name: plain[name].base if name in plain else leaf for name, leaf in leaves.items()}
    (first, base), *others = bases.items()
    for name, other in others:
        if not _equal(base, other):
            raise ValueError(
                f"The adapters {first!r} and {name!r} have different bases at {path!r}. Adapters share the weights they were "
                "trained on: load both onto the same parameters."
            )
    if not plain:
        return base
    widest = max(w.rank for w in plain.values())
    nothing = _nothing(next(iter(plain.values())))
    rows = [plain.get(name, nothing) for name in leaves]
    return RoutedWeight(
        base=base,
        lora_A=jnp.stack([_widened(w.lora_A, -1, widest) for w in rows], axis=-3),
        lora_B=jnp.stack([_widened(w.lora_B, -2, widest) for w in rows], axis=-3),
        names=tuple(leaves),
        ranks=tuple(w.rank for w in rows),
        scalings=tuple(w.scaling for w in rows),
        dropouts=tuple(w.dropout for w in rows),
    )


def _as_update(path: str, name: str, leaf: Any) -> LoraWeight:
    """An adapted leaf as a plain low-rank update, whatever its kind."""
    only = f"at {path!r}; side by side stand plain low-rank updates only. Load that adapter by itself."
    try:
        update = as_lora(leaf)
    except Inseparable as error:
        raise ValueError(f"The adapter {name!r} has {error} {only}") from None
    if update.roles != LINEAR:
        raise ValueError(f"The adapter {name!r} has a kernel of roles {update.roles!r} {only}")
    if update.magnitude is not None:
        raise ValueError(f"The adapter {name!r} has a DoRA magnitude {only}")
    return update


def _equal(a: PyTree, b: PyTree) -> bool:
    """Whether two leaves have the same values. The same arrays are not compared."""
    ours, theirs = jax.tree.flatten(a), jax.tree.flatten(b)
    pairs = zip(ours[0], theirs[0], strict=False)
    same = ours[1] == theirs[1] and len(ours[0]) == len(theirs[0])
    return same and all(x is y or (x.dtype == y.dtype and bool(jnp.array_equal(x, y))) for x, y in pairs)


def _nothing(like: LoraWeight) -> LoraWeight:
    """An update of rank 0."""
    return LoraWeight(like.base, like.lora_A[..., :0], like.lora_B[..., :0, :], scaling=0.0)


def _widened(factor: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, size - factor.shape[axis])
    return jnp.pad(factor, widths)


def unstack_adapters(params: PyTree) -> dict[str, PyTree]:
    """The inverse of `stack_adapters`: name -> the tree with that adapter alone, as `save_adapter` takes it."""

    return {name: map_adapted(lambda w, name=name: w.alone(name), params) for name in adapter_names(params)}


def adapter_names(params: PyTree) -> tuple[str, ...]:
    """Names of the adapters that stand side by side in `params`.

    Raises:
        ValueError: when there are none.
    """
    for leaf in flatten(params).values():
        if is_adapted(leaf) and leaf.adapters:
            return leaf.adapters
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
        >>> jlora.linear(jnp.ones((3, 7, 4)), chosen["proj"]["kernel"]).shape  # three rows of seven tokens
        (3, 7, 6)
    """
    ids = _as_ids(adapter_ids, adapter_names(params))
    return map_adapted(lambda w: w.choosing(ids), params)


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
