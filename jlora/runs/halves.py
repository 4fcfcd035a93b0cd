"""What a run trains, and what it keeps frozen beside it."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jlora._typing import Params, PRNGKeyArray, PyTree
from jlora.files import load_adapter
from jlora.files.adapters import open_adapter
from jlora.lora import LoraConfig, add_lora, split
from jlora.models import Model
from jlora.tree.paths import flatten, path_string


class Halves(NamedTuple):
    adapter: Params
    """What is trained."""
    base: Params | None
    """What is frozen; None: nothing."""


def adapted(params: Params, lora: LoraConfig, *, key: PRNGKeyArray, init_adapter: str | None, model: Model) -> Halves:
    """The parameters with an adapter on, at its first values or at those of another.

    Raises:
        FileNotFoundError, ValueError: when `init_adapter` is none, or not one of this config, with the difference.
    """
    adapter, base = split(add_lora(params, lora, key=key))
    if init_adapter is None:
        return Halves(adapter, base)
    given, _ = split(load_adapter(init_adapter, params, model=model))
    wrong = [
        f"{name}: the adapter has {theirs}, this run {ours}" for name, ours, theirs in _differences(adapter, given)
    ]
    if wrong:
        more = [f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        raise ValueError(
            f"`init_adapter` must be an adapter of this run's flags; {init_adapter!r} is not:\n  "
            + "\n  ".join(wrong[:_LISTED] + more)
            + "\nGive the flags that it was trained with (`jlora inspect` shows them), or merge it and adapt what comes of it."
        )
    values = jax.tree.leaves(given)
    return Halves(jax.tree.unflatten(jax.tree.structure(adapter), values), base)


_LISTED = 4


def _differences(ours: PyTree, theirs: PyTree) -> list[tuple[str, Any, Any]]:
    """(what, in ours, in theirs) of the arrays and scalings that two adapter halves do not have in common."""
    here, there = (_described(half) for half in (ours, theirs))
    return [
        (path, here.get(path, "none"), there.get(path, "none"))
        for path in {**here, **there}
        if here.get(path) != there.get(path)
    ]


def _described(half: PyTree) -> dict[str, Any]:
    arrays = {path_string(path): list(x.shape) for path, x in jax.tree.leaves_with_path(half)}
    scalings = {path: getattr(w, "scaling", None) for path, w in flatten(half).items()}
    return arrays | {f"{path}/scaling": scaling for path, scaling in scalings.items() if scaling is not None}


def digest(init_adapter: str) -> str:
    """SHA-256 of the weights of an adapter."""
    with Path(open_adapter(init_adapter).weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
