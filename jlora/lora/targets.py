"""Which kernels of a tree a `LoraConfig` means: PEFT's matching rules, and an error for every pattern that means none."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

from jlora._typing import PyTree
from jlora.lora.config import LoraConfig
from jlora.tree.modules import (
    ALL_LINEAR,
    HEADS,
    describe,
    embedding_tables,
    layer_paths,
    linear_kernels,
    module_path,
    name_matches,
    names_match,
    nearest,
    pattern_matches,
    spans,
    unclear_kernels,
)
from jlora.tree.paths import flatten
from jlora.weight import Weight


def layer_index(module: str) -> int | None:
    """The layer number in a module path, by PEFT's rule."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return None if match is None else int(match[1])


def select(params: PyTree, config: LoraConfig, roles: Mapping[str, str] | None = None) -> dict[str, str]:
    """Module path -> leaf path of the kernels and embeddings to adapt. `roles`: those stated, by leaf path.

    Raises:
        ValueError: when a pattern of the config matches nothing (all of them in one error, with the names there are),
            matches something that is neither a linear kernel nor an embedding, or a kernel with axes that `roles` says
            nothing about.
    """
    chosen, problems = selection(params, config, roles)
    if problems:
        kernels = linear_kernels(params, roles) | ({} if config.targets == ALL_LINEAR else embedding_tables(params))
        raise ValueError(
            "The LoRA config does not fit these parameters:\n  "
            + "\n  ".join(problems)
            + f"\nLinear kernels there are: {describe(kernels)}."
        )
    return chosen


def selection(
    params: PyTree, config: LoraConfig, roles: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """(What `select` gives, what it would raise): a line for each pattern that means nothing."""
    # "all-linear" means kernels alone, as in PEFT; embeddings are adapted by name.
    kernels = linear_kernels(params, roles) | ({} if config.targets == ALL_LINEAR else embedding_tables(params))
    problems = []

    def candidate(module):
        if config.targets == ALL_LINEAR:
            return module.rpartition(".")[2] not in HEADS
        return names_match(config.targets, module)

    targeted = [m for m in kernels if candidate(m)]
    unclear = {m: path for m, path in unclear_kernels(params, roles or {}).items() if candidate(m)}
    if config.targets == ALL_LINEAR:
        _warn_of_unclear(unclear, config)
    else:
        problems += _problems_of_roles(params, config, unclear)
    if isinstance(config.targets, str):
        dead = [] if targeted or unclear else [config.targets]
    else:
        dead = [name for name in config.targets if not any(name_matches(name, m) for m in (*kernels, *unclear))]
    others = {module_path(row) for row in _rows(params)} - set(kernels)
    for name in dead:
        hits = sorted(m for m in others if names_match(name if isinstance(config.targets, str) else (name,), m))
        if hits:
            problems.append(
                f"`targets` {name!r} names {hits[0]!r}, which is not a linear kernel [in, out] or an embedding. jlora "
                "adapts these: take it out of `targets`, or name it in `modules_to_save` to train it whole. If it is a kernel by "
                f'another name, say so: `add_lora(…, roles={{{name!r}: "io"}})`, or the roles of all its axes.'
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
        if targeted and not any(names_match(rule, m) for m in (*targeted, *unclear)):
            problems.append(f"`exclude` {name!r} excludes none of the targets.{nearest(name, targeted)}")
    chosen = [m for m in targeted if not (config.exclude and names_match(config.exclude, m))]
    if targeted and not chosen:
        problems.append(f"`exclude` {config.exclude!r} leaves nothing of `targets` {config.targets!r}.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if chosen and not any(pattern_matches(key, m) for m in chosen):
                problems.append(f"`{field}` {key!r} matches none of the adapted modules.{nearest(key, chosen)}")
    return {module: kernels[module] for module in chosen}, problems


def without_idle(params: PyTree, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """A config that says no more than what there is in these parameters, and a line for each name in it that means nothing.

    For adapters that exist: PEFT passes over such names, and which tensors there must be follows from the others. Modules are
    named by whole paths. A config that means nothing at all is given back as it is.
    """
    chosen, problems = selection(params, config)
    if not chosen:
        return config, problems
    leaves = _rows(params)
    saved = {name: _saved(name, leaves) for name in config.modules_to_save}
    problems += [
        line for name, rows in saved.items() if not rows for line in _problems_of_saving(name, rows, leaves, set())
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
        modules_to_save=tuple(name for name, rows in saved.items() if rows),
        bias=config.bias if select_biases(params, config, chosen) else "none",
        **patterns,
    )
    return living, problems


def _problems_of_roles(params: PyTree, config: LoraConfig, unclear: Mapping[str, str]) -> Iterator[str]:
    """What speaks against adapting targets with more axes than two, whose purpose nobody has stated."""
    leaves = flatten(params)
    for module, path in unclear.items():
        if config.exclude and names_match(config.exclude, module):
            continue
        shape = tuple(leaves[path].shape)
        name = module.rpartition(".")[2]
        yield (
            f"{module!r} {shape} has more axes than [in, out], and which are which is never guessed. State it: "
            f"`add_lora(…, roles={{{name!r}: …}})` with one letter for each axis (i in, o out, b stack), such as "
            f'"ioo" for (d_model, heads, head_dim); or name {name!r} in `exclude`.'
        )


def _warn_of_unclear(unclear: Mapping[str, str], config: LoraConfig) -> None:
    """Convolutions are no linear kernels, for "all-linear" as for PEFT; but a kernel for heads would be missed."""
    left = [m for m, path in unclear.items() if path.rpartition("/")[2] == "kernel"]
    left = [m for m in left if not (config.exclude and names_match(config.exclude, m))]
    if left:
        warnings.warn(
            f"'all-linear' leaves out the kernels with more axes than [in, out]: {describe(left)}. To adapt them, state what "
            f"each axis is for, `add_lora(…, roles={{{left[0].rpartition('.')[2]!r}: …}})`; to be silent, name them in `exclude`.",
            stacklevel=4,
        )


def select_whole(params: PyTree, config: LoraConfig, modules: Iterable[str]) -> set[str]:
    """Per-layer paths of the leaves to train whole: the biases that `bias` means, and all of `modules_to_save`.

    Args:
        modules: the modules with a low-rank update, as `select` gave them.

    Raises:
        ValueError: when a name in `modules_to_save` matches nothing, or what is adapted or quantized.
    """
    modules = set(modules)
    leaves = _rows(params)
    whole = select_biases(params, config, modules)
    problems = []
    for name in config.modules_to_save:
        rows = _saved(name, leaves)
        problems += _problems_of_saving(name, rows, leaves, modules)
        whole |= rows
    if problems:
        raise ValueError("The LoRA config does not fit these parameters:\n  " + "\n  ".join(problems))
    return whole


def _saved(name: str, leaves: Iterable[str]) -> set[str]:
    """Those of the leaves that a name in `modules_to_save` means."""
    return {row for row in leaves if any(m.endswith(name) for m in _and_parents(module_path(row)))}


def _problems_of_saving(name: str, rows: set[str], leaves: dict[str, PyTree], modules: set[str]) -> Iterator[str]:
    """What speaks against training `rows` whole, which are those of `leaves` that `name` in `modules_to_save` means."""
    if not rows:
        hint = nearest(name, {module_path(row) for row in leaves})
        if name in HEADS:
            hint = " This model has no head of its own: its embedding is the head."
        yield f"`modules_to_save` {name!r} matches no module.{hint}"
    twice = sorted({module_path(row) for row in rows} & modules)
    packed = sorted(row for row in rows if isinstance(leaves[row], Weight))
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


def select_biases(params: PyTree, config: LoraConfig, modules: Iterable[str]) -> set[str]:
    """Per-layer paths of the biases that `bias` means; `modules` are those with a low-rank update."""
    wanted = {"none": lambda _: False, "all": lambda _: True, "lora_only": set(modules).__contains__}[config.bias]
    return {row for row in _rows(params) if row.rpartition("/")[2] == "bias" and wanted(module_path(row))}


def _rows(params: PyTree) -> dict[str, PyTree]:
    """Leaves by per-layer path: a stacked leaf once for each layer."""
    return {row: leaf for path, leaf in flatten(params).items() for row in layer_paths(path, leaf)}


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
