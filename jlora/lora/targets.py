"""Which kernels of a tree a `LoraConfig` means: PEFT's matching rules, and an error for every pattern that means none."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jlora._tree import flatten, layer_path, per_layer_paths, split_layer_path
from jlora.lora.config import ALL_LINEAR, LoraConfig, pattern_matches

HEADS = ("lm_head",)
"""Output heads, which "all-linear" leaves out (QLoRA and PEFT do)."""
_LEAF_NAMES = ("kernel", "embedding", "scale", "bias")


def module_path(path: str) -> str:
    """The checkpoint's module path of a leaf: "model/layers/3/mlp/up_proj/kernel" -> "model.layers.3.mlp.up_proj"."""
    parent, _, name = path.rpartition("/")
    return (parent if parent and name in _LEAF_NAMES else path).replace("/", ".")


def layer_paths(path: str, leaf: Any) -> list[str]:
    """The per-layer paths that a leaf stands for: itself, or one for each layer of a stacked leaf."""
    # A kernel with two axes is one kernel, whatever the nodes above it are called.
    if layer_path(path, 0) is None or (path.endswith("/kernel") and leaf.ndim < 3):
        return [path]
    return per_layer_paths(path, leaf.shape[0])


def linear_kernels(params: Any) -> dict[str, str]:
    """Module path -> leaf path in `params` of every linear kernel, one entry for each layer of a stacked kernel.

    A kernel is a leaf called "kernel", or a leaf of a tree that uses none of Flax's leaf names, with two axes (three when stacked).
    """
    leaves = flatten(params)
    named = any(path.rpartition("/")[2] in _LEAF_NAMES for path in leaves)
    found = {}
    for path, leaf in leaves.items():
        if named and path.rpartition("/")[2] != "kernel":
            continue
        paths = layer_paths(path, leaf)
        if leaf.ndim == 2 + (paths != [path]):
            found |= {module_path(p): path for p in paths}
    return found


def _names_match(names: str | Sequence[str], module: str) -> bool:
    """PEFT's rule for `target_modules` and `exclude_modules`."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_name_matches(name, module) for name in names)


def _name_matches(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


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
        return _names_match(config.targets, module)

    targeted = [m for m in kernels if candidate(m)]
    if isinstance(config.targets, str):
        dead = [] if targeted else [config.targets]
    else:
        dead = [name for name in config.targets if not any(_name_matches(name, m) for m in kernels)]
    others = {module_path(p) for path, leaf in flatten(params).items() for p in layer_paths(path, leaf)} - set(kernels)
    for name in dead:
        hits = sorted(m for m in others if _names_match(name if isinstance(config.targets, str) else (name,), m))
        if hits:
            problems.append(
                f"`targets` {name!r} names {hits[0]!r}, which is not a linear kernel [in, out]. jlora adapts linear "
                "kernels: take it out of `targets`."
            )
        else:
            problems.append(
                f"`targets` {name!r} matches no linear kernel.{_kind_hint(name, kernels, config) or _nearest(name, kernels)}"
            )

    layers = config.layers()
    if layers is not None:
        there = {layer_index(m) for m in targeted}
        missing = [i for i in layers if i not in there]
        if missing and targeted:
            problems.append(
                f"`layers_to_transform` {missing} matches no layer of the targets; there are "
                f"{_spans(i for i in there if i is not None) or 'no numbered layers'}."
            )
        # PEFT takes a module whose whole path is a target before it looks at layers: "lm_head" is one.
        by_path = set() if config.targets == ALL_LINEAR else set(config.targets)
        targeted = [m for m in targeted if m in by_path or layer_index(m) in layers]

    excludes = (config.exclude,) if isinstance(config.exclude, str) else config.exclude
    for name in excludes:
        rule = name if isinstance(config.exclude, str) else (name,)
        if targeted and not any(_names_match(rule, m) for m in targeted):
            problems.append(f"`exclude` {name!r} excludes none of the targets.{_nearest(name, targeted)}")
    chosen = [m for m in targeted if not (config.exclude and _names_match(config.exclude, m))]
    if targeted and not chosen:
        problems.append(f"`exclude` {config.exclude!r} leaves nothing of `targets` {config.targets!r}.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if chosen and not any(pattern_matches(key, m) for m in chosen):
                problems.append(f"`{field}` {key!r} matches none of the adapted modules.{_nearest(key, chosen)}")
    if problems:
        raise ValueError(
            "The LoRA config does not fit these parameters:\n  "
            + "\n  ".join(problems)
            + f"\nLinear kernels there are: {describe(kernels)}."
        )
    return {module: kernels[module] for module in chosen}


def describe(modules: Iterable[str]) -> str:
    """Module names for a message, layers folded: "self_attn.q_proj (layers 0-15), lm_head"."""
    groups: dict[str, list[int]] = {}
    for module in modules:
        layer = split_layer_path(module.replace(".", "/"))
        tail = module if layer is None else re.split(r"\.\d+\.", module, maxsplit=1)[-1]
        groups.setdefault(tail, []).extend([] if layer is None else [layer[1]])
    shown = [name + (f" (layers {_spans(layers)})" if layers else "") for name, layers in groups.items()]
    return (", ".join(shown[:24]) + (f" and {len(shown) - 24} more" if len(shown) > 24 else "")) or "none"


def _spans(numbers: Iterable[int]) -> str:
    """ "0-3, 7" for 0 1 2 3 7."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _nearest(name: str, modules: Iterable[str]) -> str:
    modules = list(modules)
    tails = {m.rpartition(".")[2] for m in modules} | {".".join(m.split(".")[-2:]) for m in modules}
    close = difflib.get_close_matches(name, sorted(tails), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _kind_hint(name: str, modules: Iterable[str], config: LoraConfig) -> str:
    if not isinstance(config.targets, str) and re.search(r"[\\*+?()\[\]|^$]", name):
        return " A list item is a name, never a regular expression: pass the expression as a string, not in a list."
    if isinstance(config.targets, str) and any(_name_matches(name, module) for module in modules):
        return f" A string is a regular expression for the whole module path: for the name, pass a list, [{name!r}]."
    return ""
