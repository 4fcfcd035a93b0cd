"""Which kernels of a tree a `LoraConfig` means: PEFT's matching rules, and an error for every pattern that means none."""

import dataclasses
import re
import warnings
from collections.abc import Container, Iterable, Iterator

from jlora.lora.config import LoraConfig
from jlora.tree.modules import (
    ALL_LINEAR,
    HEADS,
    Modules,
    Named,
    describe,
    layer_of,
    name_matches,
    named,
    names_match,
    nearest,
    pattern_matches,
    spans,
)
from jlora.tree.paths import Row
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
    """(What `select` gives, what it would raise): a line for each pattern that means nothing."""
    adaptable = _adaptable(there, config)
    found, unclear = _named(config, adaptable), _named(config, there.unclear)
    if config.targets == ALL_LINEAR:
        _warn_of_unclear(there, unclear.chosen)
    problems = [
        *(() if config.targets == ALL_LINEAR else _problems_of_roles(there, unclear.chosen)),
        *_dead_targets(there, config, adaptable, unclear.targeted),
        *_dead_layers(config, found.targeted),
        *_dead_excludes(config, found.in_layers, unclear.targeted),
        *_nothing_left(config, found.in_layers, found.chosen),
        *_dead_patterns(config, found.chosen),
    ]
    return {module: adaptable[module] for module in found.chosen}, problems


def meant(there: Modules, config: LoraConfig) -> tuple[set[str], set[str]]:
    """(Modules to adapt, per-layer paths of the leaves to train whole) that a config means, whose other names are passed over."""
    modules = set(_named(config, _adaptable(there, config)).chosen)
    saved = {row.path for rows in _saved(there, config).values() for row in rows}
    tokens = {row.path for name in config.tokens for row in _tables(there, name)}
    return modules, select_biases(there, config, modules) | saved | tokens


def _named(config: LoraConfig, modules: Iterable[str]) -> Named:
    return named(modules, config.targets, layers=config.layers(), exclude=config.exclude)


def _adaptable(there: Modules, config: LoraConfig) -> dict[str, str]:
    """Module path -> leaf path of what `targets` may name. "all-linear" means kernels alone, as in PEFT; embeddings are adapted
    by name."""
    return {**there.kernels, **({} if config.targets == ALL_LINEAR else there.embeddings)}


def _dead_targets(
    there: Modules, config: LoraConfig, adaptable: Iterable[str], unclear: Iterable[str]
) -> Iterator[str]:
    """A line for each name in `targets`, or the expression, that means no kernel."""
    known = [*adaptable, *unclear]
    if isinstance(config.targets, str):
        dead = [] if named(known, config.targets).targeted else [config.targets]
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
    saved = _saved(there, config)
    problems += [
        line for name, rows in saved.items() if not rows for line in _problems_of_saving(there, name, rows, ())
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
        bias=config.bias if select_biases(there, config, chosen) else "none",
        **patterns,
    )
    return living, problems


def _problems_of_roles(there: Modules, modules: Iterable[str]) -> Iterator[str]:
    """What speaks against adapting modules with more axes than two, whose purpose nobody has stated."""
    shapes = {row.leaf_path: tuple(row.leaf.shape) for row in there.rows if row.leaf_path in there.unclear.values()}
    for module in modules:
        name = module.rpartition(".")[2]
        yield (
            f"{module!r} {shapes[there.unclear[module]]} has more axes than [in, out], and which are which is never guessed. State "
            f"it: `add_lora(…, roles={{{name!r}: …}})` with one letter for each axis (i in, o out, b stack), such as "
            f'"ioo" for (d_model, heads, head_dim); or name {name!r} in `exclude`.'
        )


def _warn_of_unclear(there: Modules, modules: Iterable[str]) -> None:
    """Convolutions are no linear kernels, for "all-linear" as for PEFT; but a kernel for heads would be missed."""
    left = [m for m in modules if there.unclear[m].rpartition("/")[2] == "kernel"]
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
    modules, saved = set(modules), _saved(there, config)
    problems = [line for name, rows in saved.items() for line in _problems_of_saving(there, name, rows, modules)]
    if problems:
        raise ValueError("The LoRA config does not fit these parameters:\n  " + "\n  ".join(problems))
    return select_biases(there, config, modules) | {row.path for rows in saved.values() for row in rows}


INPUT_EMBEDDINGS = ("embed_tokens", "wte")


def select_tokens(there: Modules, config: LoraConfig, others: Container[str]) -> dict[str, tuple[int, ...]]:
    """Path of an embedding or a head -> the tokens whose rows are trained.

    Args:
        others: paths of the leaves that are adapted otherwise.

    Raises:
        ValueError: when a name matches no embedding or head, or one that is packed, adapted otherwise or has no such row.
    """
    found, problems = {}, []
    for name, tokens in config.tokens.items():
        said = f"`trainable_token_indices`{f' {name!r}' if name else ''}"
        tables = _tables(there, name)
        if not tables:
            problems.append(f"{said} matches no embedding and no head.{nearest(name, there.names) if name else ''}")
        for row in tables:
            rows = row.leaf.shape[row.kind == "kernel"]
            if row.path in others:
                problems.append(
                    f"{said} trains rows of {row.module!r}, which is adapted as a whole too. Take it out of one."
                )
            elif is_weight(row.leaf):
                problems.append(f"{said} trains rows of {row.module!r}, which is packed. Load it dense.")
            elif max(tokens) >= rows:
                problems.append(
                    f"{said} has the token {max(tokens)}; {row.module!r} has rows for 0..{rows - 1}. Make them first: `model, "
                    f"params = jlora.grow(model, params, {max(tokens) + 1})`."
                )
            found[row.path] = tokens
    if problems:
        raise ValueError("The LoRA config does not fit these parameters:\n  " + "\n  ".join(problems))
    return found


def _tables(there: Modules, name: str) -> list[Row]:
    """The embedding or head of this name, "": the input embedding."""
    names = (name,) if name else INPUT_EMBEDDINGS
    tables = [row for row in there.rows if row.kind == "embedding" or row.module.rpartition(".")[2] in HEADS]
    return [row for row in tables if any(row.module == n or row.module.endswith(f".{n}") for n in names)]


def _saved(there: Modules, config: LoraConfig) -> dict[str, list[Row]]:
    """Name in `modules_to_save` -> the leaves it means."""
    return {
        name: [row for row in there.rows if any(m.endswith(name) for m in _and_parents(row.module))]
        for name in config.modules_to_save
    }


def _problems_of_saving(there: Modules, name: str, rows: Iterable[Row], modules: Container[str]) -> Iterator[str]:
    """What speaks against training these leaves whole, which `name` in `modules_to_save` means."""
    if not rows:
        hint = nearest(name, there.names)
        if name in HEADS:
            hint = " This model has no head of its own: its embedding is the head."
        yield f"`modules_to_save` {name!r} matches no module.{hint}"
    twice = sorted(row.module for row in rows if row.module in modules)
    packed = sorted((row for row in rows if is_weight(row.leaf)), key=lambda row: row.path)
    if twice:
        yield (
            f"`modules_to_save` {name!r} and `targets` both name {twice[0]!r}: a module is trained whole or by a low-rank "
            "update. Take it out of one of them, or add it to `exclude`."
        )
    elif packed:
        row = packed[0]
        yield (
            f"`modules_to_save` {name!r} names {row.module!r}, which is quantized ({type(row.leaf).__name__}) and cannot be "
            "trained whole. Load it dense, or adapt it with `targets`."
        )


def select_biases(there: Modules, config: LoraConfig, modules: Container[str]) -> set[str]:
    """Per-layer paths of the biases that `bias` means; `modules` are those with a low-rank update."""
    if config.bias == "none":
        return set()
    return {row.path for row in there.rows if row.kind == "bias" and (config.bias == "all" or row.module in modules)}


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
