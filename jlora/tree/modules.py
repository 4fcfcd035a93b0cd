"""The modules of a parameter tree, under the names of its checkpoint, and PEFT's rules for naming several at once."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

import regex

from jlora._typing import PyTree
from jlora.tree.paths import flatten, layer_path, per_layer_paths, split_layer_path
from jlora.weight.roles import check_roles

ALL_LINEAR = "all-linear"
HEADS = ("lm_head",)
"""Output heads, which "all-linear" leaves out (QLoRA and PEFT do)."""
MATCH_SECONDS = 0.5
_NOT_RE = regex.compile(r"\[:\^?\w+:\]|(?<!\\)\{[^\d,}]")
"""Where `regex`, which keeps time, reads an expression otherwise than `re`: POSIX classes and approximate matching."""
_LEAF_NAMES = ("kernel", "embedding", "scale", "bias")


def module_path(path: str) -> str:
    """The checkpoint's module path of a leaf: "model/layers/3/mlp/up_proj/kernel" -> "model.layers.3.mlp.up_proj"."""
    parent, _, name = path.rpartition("/")
    return (parent if parent and name in _LEAF_NAMES else path).replace("/", ".")


def layer_paths(path: str, leaf: PyTree) -> list[str]:
    """The per-layer paths that a leaf stands for: itself, or one for each layer of a stacked leaf."""
    # A kernel with two axes is one kernel, whatever the nodes above it are called.
    if layer_path(path, 0) is None or not is_array(leaf) or (path.endswith("/kernel") and leaf.ndim < 3):
        return [path]
    return per_layer_paths(path, leaf.shape[0])


def is_array(leaf: PyTree) -> bool:
    """Whether the leaf stands for an array; a tree may hold functions and settings too, such as an Equinox module's."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def linear_kernels(params: PyTree, roles: Mapping[str, str] | None = None) -> dict[str, str]:
    """Module path -> leaf path in `params` of every linear kernel, one entry for each layer of a stacked kernel.

    A kernel is a leaf called "kernel", or a leaf of a tree that uses none of Flax's leaf names, with two axes (three when stacked);
    and every leaf whose axes are stated in `roles`, by leaf path.
    """
    found = {}
    for path, leaf in _kernel_leaves(params, roles or {}).items():
        paths = layer_paths(path, leaf)
        if path in (roles or {}) or leaf.ndim == 2 + (paths != [path]):
            found |= {module_path(p): path for p in paths}
    return found


def unclear_kernels(params: PyTree, roles: Mapping[str, str]) -> dict[str, str]:
    """Module path -> leaf path of what would be a linear kernel, but for axes that nobody has said the purpose of."""
    found = {}
    for path, leaf in _kernel_leaves(params, roles).items():
        paths = layer_paths(path, leaf)
        if path not in roles and leaf.ndim > 2 + (paths != [path]):
            found |= {module_path(p): path for p in paths}
    return found


def _kernel_leaves(params: PyTree, roles: Mapping[str, str]) -> dict[str, PyTree]:
    leaves = {path: leaf for path, leaf in flatten(params).items() if is_array(leaf)}
    named = any(path.rpartition("/")[2] in _LEAF_NAMES for path in leaves)
    return {
        path: leaf for path, leaf in leaves.items() if not named or path in roles or path.rpartition("/")[2] == "kernel"
    }


def stated_roles(params: PyTree, patterns: Mapping[str, str]) -> dict[str, str]:
    """Leaf path -> roles of its trailing axes, from module patterns (those of `rank_pattern`; the first match wins).

    Raises:
        ValueError: for roles that cannot be, do not fit a leaf's axes, or match no leaf.
    """
    stated, used = {}, set()
    for path, leaf in flatten(params).items():
        modules = [module_path(p) for p in layer_paths(path, leaf)] if _may_be_kernel(path, leaf) else []
        pattern = next((p for p in patterns if any(pattern_matches(p, m) for m in modules)), None)
        if pattern is None:
            continue
        used.add(pattern)
        roles, stack = check_roles(patterns[pattern]), len(modules) > 1 or modules != [module_path(path)]
        if leaf.ndim != len(roles) + stack:
            raise ValueError(
                f"`roles` {roles!r} for {path!r} names {len(roles)} axes; the leaf has {leaf.ndim - stack}"
                f"{' besides the layers' * stack}: {tuple(leaf.shape)}. Give every axis one letter."
            )
        stated[path] = roles
    dead = sorted(set(patterns) - used)
    if dead:
        names = [module_path(p) for p, leaf in flatten(params).items() if _may_be_kernel(p, leaf)]
        raise ValueError(
            f"`roles` {dead[0]!r} matches no leaf with two axes or more.{nearest(dead[0], names)} Those there are: "
            f"{describe(names)}."
        )
    return stated


def _may_be_kernel(path: str, leaf: PyTree) -> bool:
    """A module's name stands for its kernel; stacked, its bias and scale have two axes as well."""
    return is_array(leaf) and leaf.ndim > 1 and path.rpartition("/")[2] not in ("bias", "scale")


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule for `rank_pattern` keys: a regular expression for the module path or its dotted end."""
    return _matches(rf"(.*\.)?({key})$", module)


def is_embedding(path: str) -> bool:
    """Whether the leaf is an embedding table [vocab, d_model]."""
    return path.rpartition("/")[2] == "embedding"


def embedding_tables(params: PyTree) -> dict[str, str]:
    """Module path -> leaf path of every embedding table."""
    return {
        module_path(path): path
        for path, leaf in flatten(params).items()
        if is_embedding(path) and is_array(leaf) and leaf.ndim == 2
    }


def names_match(names: str | Sequence[str], module: str) -> bool:
    """PEFT's rule for `target_modules` and `exclude_modules`."""
    if isinstance(names, str):
        return _matches(names, module, whole=True)
    return any(name_matches(name, module) for name in names)


def _matches(expression: str, module: str, *, whole: bool = False) -> bool:
    """Python's `re.match` or, for the whole path, `re.fullmatch`, under a limit of time: an expression from a file may be one that
    takes years.

    Raises:
        ValueError: when it takes longer than a thousand times what it should.
    """
    if _NOT_RE.search(expression):
        raise ValueError(
            f"The regular expression {expression[:200]!r} has braces without numbers or a class [:name:], which Python's `re` "
            "reads letter by letter. Write the characters out."
        )
    try:
        compiled = regex.compile(expression)
        return (compiled.fullmatch if whole else compiled.match)(module, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"The regular expression {expression[:200]!r} takes more than {MATCH_SECONDS} s to compare with {module!r}: it repeats "
            "what repeats, such as (.+)+. Write it without nested repetition."
        ) from None
    except regex.error as error:
        raise ValueError(f"{expression[:200]!r} is not a regular expression: {error}.") from error


def name_matches(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def describe(modules: Iterable[str]) -> str:
    """Module names for a message, layers folded: "self_attn.q_proj (layers 0-15), lm_head"."""
    groups: dict[str, list[int]] = {}
    for module in modules:
        layer = split_layer_path(module.replace(".", "/"))
        tail = module if layer is None else re.split(r"\.\d+\.", module, maxsplit=1)[-1]
        groups.setdefault(tail, []).extend([] if layer is None else [layer[1]])
    shown = [name + (f" (layers {spans(layers)})" if layers else "") for name, layers in groups.items()]
    return (", ".join(shown[:24]) + (f" and {len(shown) - 24} more" if len(shown) > 24 else "")) or "none"


def spans(numbers: Iterable[int]) -> str:
    """ "0-3, 7" for 0 1 2 3 7."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def nearest(name: str, modules: Iterable[str]) -> str:
    modules = list(modules)
    tails = {m.rpartition(".")[2] for m in modules} | {".".join(m.split(".")[-2:]) for m in modules}
    close = difflib.get_close_matches(name, sorted(tails), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
