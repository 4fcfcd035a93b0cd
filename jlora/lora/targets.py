"""Which kernels of a tree a `LoraConfig` means: PEFT's matching rules, and an error for every pattern that means none."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jlora.lora.config import LoraConfig
from jlora.tree.modules import (
    ALL_LINEAR,
    HEADS,
    Modules,
    describe,
    layer_of,
    module_path,
    name_matches,
    names_match,
    nearest,
    pattern_matches,
    spans,
)
from jlora.weight import is_weight


def select(there: Modules, config: LoraConfig) -> dict[str, str]:
    """Module path -> leaf path of the kernels and embeddings to adapt.

    Raises:
        ValueError: when a pattern of the config matches nothing (all of them in one error, with the names there are),
            matches something that is neither a linear kernel nor an embedding, or a kernel with axes whose roles nobody
            has stated.
    """
    chosen, problems = selection(there, config)
    if problems:
        raise ValueError(
            "The LoRA config does not fit these parameters:\n  "
            + "\n  ".join(problems)
            + f"\nLinear kernels there are: {describe(_adaptable(there, config))}."
        )
    return chosen


def selection(there: Modules, config: LoraConfig) -> tuple[dict[str, str], list[str]]:
    """(What `select` gives, what it would raise): a line for each pattern that means nothing.

    PEFT's order: `targets` among what can be adapted, of these those in `layers_to_transform`, less those in `exclude`.
    """
    adaptable = _adaptable(there, config)
    unclear = {m: path for m, path in there.unclear.items() if _is_target(config, m)}
    targeted = [m for m in adaptable if _is_target(config, m)]
    in_layers = [m for m in targeted if _is_in_layers(config, m)]
    chosen = [m for m in in_layers if not _is_excluded(config, m)]
    if config.targets == ALL_LINEAR:
        _warn_of_unclear(unclear, config)
    problems = [
        *(() if config.targets == ALL_LINEAR else _problems_of_roles(there, config, unclear)),
        *_dead_targets(there, config, adaptable, unclear),
        *_dead_layers(config, targeted),
        *_dead_excludes(config, in_layers, unclear),
        *_nothing_left(config, in_layers, chosen),
        *_dead_patterns(config, chosen),
    ]
    return {module: adaptable[module] for module in chosen}, problems


def _adaptable(there: Modules, config: LoraConfig) -> dict[str, str]:
    """Module path -> leaf path of what `targets` may name. "all-linear" means kernels alone, as in PEFT; embeddings are adapted
    by name."""
    return {**there.kernels, **({} if config.targets == ALL_LINEAR else there.embeddings)}


def _is_target(config: LoraConfig, module: str) -> bool:
    if config.targets == ALL_LINEAR:
        return module.rpartition(".")[2] not in HEADS
    return names_match(config.targets, module)


def _is_in_layers(config: LoraConfig, module: str) -> bool:
    layers = config.layers()
    # PEFT takes a module whose whole path is a target before it looks at layers: "lm_head" is one.
    by_path = config.targets != ALL_LINEAR and module in config.targets
    return layers is None or by_path or layer_of(module) in layers


def _is_excluded(config: LoraConfig, module: str) -> bool:
    return bool(config.exclude) and names_match(config.exclude, module)


def _dead_targets(
    there: Modules, config: LoraConfig, adaptable: Iterable[str], unclear: Iterable[str]
) -> Iterator[str]:
    """A line for each name in `targets`, or the expression, that means no kernel."""
    known = [*adaptable, *unclear]
    if isinstance(config.targets, str):
        dead = [] if any(_is_target(config, m) for m in known) else [config.targets]
    else:
        dead = [name for name in config.targets if not any(name_matches(name, m) for m in known)]
    others = there.names - set(adaptable)
    for name in dead:
        hits = sorted(m for m in others if names_match(name if isinstance(config.targets, str) else (name,), m))
        if hits:
            yield (
                f"`targets` {name!r} names {hits[0]!r}, which is not a linear kernel [in, out] or an embedding. jlora "
                "adapts these: take it out of `targets`, or name it in `modules_to_save` to train it whole. If it is a kernel by "
                f'another name, say so: `add_lora(…, roles={{{name!r}: "io"}})`, or the roles of all its axes.'
            )
        else:
            tied = " A head that is tied to the embedding has no kernel of its own." if name in HEADS else ""
            hint = _kind_hint(name, adaptable, config) or nearest(name, adaptable)
            yield f"`targets` {name!r} matches no linear kernel.{tied}{hint}"


def _dead_layers(config: LoraConfig, targeted: Iterable[str]) -> Iterator[str]:
    there = {layer_of(m) for m in targeted}
    missing = [i for i in config.layers() or () if i not in there]
    if missing and there:
        numbers = spans(i for i in there if i is not None) or "no numbered layers"
        yield f"`layers_to_transform` {missing} matches no layer of the targets; there are {numbers}."


def _dead_excludes(config: LoraConfig, targeted: list[str], unclear: Iterable[str]) -> Iterator[str]:
    names = (config.exclude,) if isinstance(config.exclude, str) else config.exclude
    for name in names if targeted else ():
        rule = name if isinstance(config.exclude, str) else (name,)
        if not any(names_match(rule, m) for m in (*targeted, *unclear)):
            yield f"`exclude` {name!r} excludes none of the targets.{nearest(name, targeted)}"


def _nothing_left(config: LoraConfig, targeted: list[str], chosen: list[str]) -> Iterator[str]:
    if targeted and not chosen:
        yield f"`exclude` {config.exclude!r} leaves nothing of `targets` {config.targets!r}."


def _dead_patterns(config: LoraConfig, chosen: list[str]) -> Iterator[str]:
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) if chosen else ():
            if not any(pattern_matches(key, m) for m in chosen):
                yield f"`{field}` {key!r} matches none of the adapted modules.{nearest(key, chosen)}"


def without_idle(there: Modules, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """A config that says no more than what there is in these parameters, and a line for each name in it that means nothing.

    For adapters that exist: PEFT passes over such names, and which tensors there must be follows from the others. Modules are
    named by whole paths. A config that means nothing at all is given back as it is.
    """
    chosen, problems = selection(there, config)
    if not chosen:
        return config, problems
    leaves = _leaves(there)
    saved = {name: _saved(name, leaves) for name in config.modules_to_save}
    problems += [
        line for name, taken in saved.items() if not taken for line in _problems_of_saving(name, taken, leaves, set())
    ]
    patterns = {
        field: {
            key: value for key, value in getattr(config, field).items() if any(pattern_matches(key, m) for m in chosen)
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    living = dataclasses.replace(
        config,
        targets=tuple(chosen),
        exclude=(),
        layers_to_transform=None,
        modules_to_save=tuple(name for name, taken in saved.items() if taken),
        bias=config.bias if select_biases(there, config, chosen) else "none",
        **patterns,
    )
    return living, problems


def _problems_of_roles(there: Modules, config: LoraConfig, unclear: Mapping[str, str]) -> Iterator[str]:
    """What speaks against adapting targets with more axes than two, whose purpose nobody has stated."""
    shapes = {row.leaf_path: tuple(row.leaf.shape) for row in there.rows if row.leaf_path in unclear.values()}
    for module, path in unclear.items():
        if _is_excluded(config, module):
            continue
        name = module.rpartition(".")[2]
        yield (
            f"{module!r} {shapes[path]} has more axes than [in, out], and which are which is never guessed. State it: "
            f"`add_lora(…, roles={{{name!r}: …}})` with one letter for each axis (i in, o out, b stack), such as "
            f'"ioo" for (d_model, heads, head_dim); or name {name!r} in `exclude`.'
        )


def _warn_of_unclear(unclear: Mapping[str, str], config: LoraConfig) -> None:
    """Convolutions are no linear kernels, for "all-linear" as for PEFT; but a kernel for heads would be missed."""
    left = [m for m, path in unclear.items() if path.rpartition("/")[2] == "kernel"]
    left = [m for m in left if not _is_excluded(config, m)]
    if left:
        warnings.warn(
            f"'all-linear' leaves out the kernels with more axes than [in, out]: {describe(left)}. To adapt them, state what "
            f"each axis is for, `add_lora(…, roles={{{left[0].rpartition('.')[2]!r}: …}})`; to be silent, name them in `exclude`.",
            stacklevel=4,
        )


def select_whole(there: Modules, config: LoraConfig, modules: Iterable[str]) -> set[str]:
    """Per-layer paths of the leaves to train whole: the biases that `bias` means, and all of `modules_to_save`.

    Args:
        modules: the modules with a low-rank update, as `select` gave them.

    Raises:
        ValueError: when a name in `modules_to_save` matches nothing, or what is adapted or quantized.
    """
    modules = set(modules)
    leaves = _leaves(there)
    whole = select_biases(there, config, modules)
    problems = []
    for name in config.modules_to_save:
        taken = _saved(name, leaves)
        problems += _problems_of_saving(name, taken, leaves, modules)
        whole |= taken
    if problems:
        raise ValueError("The LoRA config does not fit these parameters:\n  " + "\n  ".join(problems))
    return whole


def _saved(name: str, leaves: Iterable[str]) -> set[str]:
    """Those of the leaves that a name in `modules_to_save` means."""
    return {row for row in leaves if any(m.endswith(name) for m in _and_parents(module_path(row)))}


def _problems_of_saving(name: str, taken: set[str], leaves: dict[str, Any], modules: set[str]) -> Iterator[str]:
    """What speaks against training those of `leaves` whole that `name` in `modules_to_save` means."""
    if not taken:
        hint = nearest(name, {module_path(row) for row in leaves})
        if name in HEADS:
            hint = " This model has no head of its own: its embedding is the head."
        yield f"`modules_to_save` {name!r} matches no module.{hint}"
    twice = sorted({module_path(path) for path in taken} & modules)
    packed = sorted(path for path in taken if is_weight(leaves[path]))
    if twice:
        yield (
            f"`modules_to_save` {name!r} and `targets` both name {twice[0]!r}: a module is trained whole or by a low-rank "
            "update. Take it out of one of them, or add it to `exclude`."
        )
    elif packed:
        yield (
            f"`modules_to_save` {name!r} names {module_path(packed[0])!r}, which is quantized "
            f"({type(leaves[packed[0]]).__name__}) and cannot be trained whole. Load it dense, or adapt it with `targets`."
        )


def select_biases(there: Modules, config: LoraConfig, modules: Iterable[str]) -> set[str]:
    """Per-layer paths of the biases that `bias` means; `modules` are those with a low-rank update."""
    wanted = {"none": lambda _: False, "all": lambda _: True, "lora_only": set(modules).__contains__}[config.bias]
    return {row.path for row in there.rows if row.kind == "bias" and wanted(row.module)}


def _leaves(there: Modules) -> dict[str, Any]:
    return {row.path: row.leaf for row in there.rows}


def _and_parents(module: str) -> list[str]:
    """ "a.b.c" -> "a.b.c", "a.b", "a"."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _kind_hint(name: str, modules: Iterable[str], config: LoraConfig) -> str:
    if not isinstance(config.targets, str) and re.search(r"[\\*+?()\[\]|^$]", name):
        return " A list item is a name, never a regular expression: pass the expression as a string, not in a list."
    if isinstance(config.targets, str) and any(name_matches(name, module) for module in modules):
        return f" A string is a regular expression for the whole module path: for the name, pass a list, [{name!r}]."
    return ""
