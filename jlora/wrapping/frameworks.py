"""From a module of Flax Linen, Flax NNX or Equinox to a function of a plain tree, wrapped."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jlora._typing import PyTree
from jlora.wrapping.api import Wrapped, wrap


def wrap_linen(module: PyTree, **options: Any) -> Wrapped:
    """`module.apply` as `f(params, *args, **kwargs)`, through `wrap`.

    Args:
        module: a `flax.linen.Module`.
        options: those of `wrap`.

    Returns:
        A function of the tree `module.init(…)["params"]`, whose leaves may be adapted or quantized, and of the arguments
        of `module.apply`: `rngs`, `mutable` and `method` mean what they mean there. `collections={"batch_stats": …}`
        are the variables other than parameters.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jlora
        >>> module, x, key = nn.Dense(3), jnp.ones((2, 4)), jax.random.key(0)
        >>> params = jlora.add_lora(module.init(key, x)["params"], jlora.LoraConfig(rank=2), key=key)
        >>> jlora.wrap_linen(module)(params, x).shape
        (2, 3)
    """

    def apply(params, *args, collections: Mapping[str, PyTree] | None = None, **kwargs):
        return module.apply({**(collections or {}), "params": params}, *args, **kwargs)

    return wrap(apply, **options)


def wrap_nnx(module: PyTree, *, mutable: bool = False, **options: Any) -> tuple[PyTree, ...]:
    """A Flax NNX module as a function of its parameters, through `wrap`, and those parameters.

    Args:
        module: a `flax.nnx.Module`, which is not changed.
        mutable: whether a call may change what is no parameter: the statistics of a normalization, the counter of a
            dropout's random stream.
        options: those of `wrap`.

    Returns:
        `f(params, *args, **kwargs)` and `params`, the `nnx.Param` state as nested dictionaries. All other state is that of
        `module` in every call. With `mutable`: `f(params, state, *args, **kwargs) -> (result, state)`, `params`, `state`.

    Raises (on a call):
        ValueError: when the call changes state without `mutable`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from flax import nnx
        >>> f, params = jlora.wrap_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> params = jlora.add_lora(params, jlora.LoraConfig(rank=2), key=jax.random.key(0))
        >>> f(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    from flax import nnx

    graph, *states = nnx.split(module, nnx.Param, ...)
    params, start = map(nnx.to_pure_dict, states)

    def apply(params, state, *args, **kwargs):
        filled = jax.tree.map(lambda x: x, states)  # new containers, which the next line writes into
        for part, values in zip(filled, (params, state), strict=True):
            nnx.replace_by_pure_dict(part, values)
        model = nnx.merge(graph, *filled)
        result = model(*args, **kwargs)
        _, _, after = nnx.split(model, nnx.Param, ...)
        return result, nnx.to_pure_dict(after)

    if mutable:
        return wrap(apply, **options), params, start

    def apply_alone(params, *args, **kwargs):
        result, state = apply(params, start, *args, **kwargs)
        if changed := _changed(start, state):
            raise ValueError(
                f"The call changed {', '.join(changed)} of `{type(module).__name__}`, which would be lost. "
                "Use `f, params, state = wrap_nnx(module, mutable=True)`, whose function takes and returns that state, "
                "or switch the module to inference with `module.eval()` first."
            )
        return result

    return wrap(apply_alone, **options), params


def _changed(before: PyTree, after: PyTree) -> list[str]:
    """Paths of the leaves that are other arrays than they were, or that are new or gone."""
    old, new = (
        {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}
        for tree in (before, after)
    )
    return sorted(path for path in old.keys() | new.keys() if old.get(path) is not new.get(path))


def wrap_equinox(module: Callable, **options: Any) -> tuple[Wrapped, PyTree]:
    """An Equinox module as a function of its arrays, through `wrap`, and those arrays.

    Args:
        module: an `equinox.Module`, or any other pytree that is called.
        options: those of `wrap`.

    Returns:
        `f(params, *args, **kwargs)` and `params`: the module with `()` for what is no array (its functions, a bias that it
        has not), so that JAX's own transformations and `split` take it. Leaves are replaced in place. Equinox stores the
        kernel of a `Linear` as [out, in]: its role is "oi".

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jlora
        >>> key = jax.random.key(0)
        >>> f, params = jlora.wrap_equinox(eqx.nn.MLP(4, 3, 8, 1, key=key))
        >>> config = jlora.LoraConfig(rank=2, targets=["layers.0.weight", "layers.1.weight"])
        >>> params = jlora.add_lora(params, config, key=key, roles={"weight": "oi"})
        >>> jax.vmap(f, (None, 0))(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    # `()` is a tree without leaves; None, as of `equinox.partition`, is how `split` marks what the other half has.
    leaves, treedef = jax.tree.flatten(module, is_leaf=lambda x: x is None)
    traced = [isinstance(x, jax.Array | np.ndarray) for x in leaves]

    def apply(params, *args, **kwargs):
        arrays = treedef.flatten_up_to(params)
        filled = [array if is_array else x for array, x, is_array in zip(arrays, leaves, traced, strict=True)]
        return jax.tree.unflatten(treedef, filled)(*args, **kwargs)

    params = jax.tree.unflatten(treedef, [x if is_array else () for x, is_array in zip(leaves, traced, strict=True)])
    return wrap(apply, **options), params
