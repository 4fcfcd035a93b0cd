"""Which kernels of a tree a `LoraConfig` means: PEFT's matching rules, and an error for every pattern that means none."""

import re
from collections.abc import Iterable
from typing import Any

from jlora._modules import (
    ALL_LINEAR,
    HEADS,
    describe,
    layer_paths,
    linear_kernels,
    module_path,
    name_matches,
    names_match,
    nearest,
    spans,
)
from jlora._tree import flatten
from jlora.lora.config import LoraConfig, pattern_matches


def layer_index(module: str) -> int | None:
    """The layer number in a module path, by PEFT's rule."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return None if match is None else int(match[1])


def select(params: Any, config: LoraConfig) -> dict[str, str]:
    """Module path -> leaf path of the kernels to adapt, in the tree's order.

    Raises:
        ValueError: when a pattern of the config matches nothing (all of them in one error, with the names there are), or
            matches something that is not a linear kernel.
    """
    kernels = linear_kernels(params)
    problems = []

    def candidate(module):
        if config.targets == ALL_LINEAR:
            return module.rpartition(".")[2] not in HEADS
        return names_match(config.targets, module)

    targeted = [m for m in kernels if candidate(m)]
    if isinstance(config.targets, str):
        dead = [] if targeted else [config.targets]
    else:
        dead = [name for name in config.targets if not any(name_matches(name, m) for m in kernels)]
    others = {module_path(p) for path, leaf in flatten(params).items() for p in layer_paths(path, leaf)} - set(kernels)
    for name in dead:
        hits = sorted(m for m in others if names_match(name if isinstance(config.targets, str) else (name,), m))
        if hits:
            problems.append(
                f"`targets` {name!r} names {hits[0]!r}, which is not a linear kernel [in, out]. jlora adapts linear "
                "kernels: take it out of `targets`."
            )
        else:
            tied = " A head that is tied to the embedding has no kernel of its own." if name in HEADS else ""
            problems.append(
                f"`targets` {name!r} matches no linear kernel.{tied}{_kind_hint(name, kernels, config) or nearest(name, kernels)}"
            )

    layers = config.layers()
    if layers is not None:
        there = {layer_index(m) for m in targeted}
        missing = [i for i in layers if i not in there]
        if missing and targeted:
            problems.append(
                f"`layers_to_transform` {missing} matches no layer of the targets; there are "
                f"{spans(i for i in there if i is not None) or 'no numbered layers'}."
            )
        # PEFT takes a module whose whole path is a target before it looks at layers: "lm_head" is one.
        by_path = set() if config.targets == ALL_LINEAR else set(config.targets)
        targeted = [m for m in targeted if m in by_path or layer_index(m) in layers]

    excludes = (config.exclude,) if isinstance(config.exclude, str) else config.exclude
    for name in excludes:
        rule = name if isinstance(config.exclude, str) else (name,)
        if targeted and not any(names_match(rule, m) for m in targeted):
            problems.append(f"`exclude` {name!r} excludes none of the targets.{nearest(name, targeted)}")
    chosen = [m for m in targeted if not (config.exclude and names_match(config.exclude, m))]
    if targeted and not chosen:
        problems.append(f"`exclude` {config.exclude!r} leaves nothing of `targets` {config.targets!r}.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if chosen and not any(pattern_matches(key, m) for m in chosen):
                problems.append(f"`{field}` {key!r} matches none of the adapted modules.{nearest(key, chosen)}")
    if problems:
        raise ValueError(
            "The LoRA config does not fit these parameters:\n  "
            + "\n  ".join(problems)
            + f"\nLinear kernels there are: {describe(kernels)}."
        )
    return {module: kernels[module] for module in chosen}


def _kind_hint(name: str, modules: Iterable[str], config: LoraConfig) -> str:
    if not isinstance(config.targets, str) and re.search(r"[\\*+?()\[\]|^$]", name):
        return " A list item is a name, never a regular expression: pass the expression as a string, not in a list."
    if isinstance(config.targets, str) and any(name_matches(name, module) for module in modules):
        return f" A string is a regular expression for the whole module path: for the name, pass a list, [{name!r}]."
    return ""
