"""The modules of a parameter tree, under the names of its checkpoint, and PEFT's rules for naming several at once.

`modules_of` is the one view of a tree that all else is chosen from: each leaf under its per-layer path, whatever the form of the
tree, and which of them are kernels and embeddings.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import regex

from jlora.tree.paths import LEAF_NAMES, Row, is_array, module_path, rows, split_layer_path
from jlora.weight import is_weight
from jlora.weight.roles import check_roles

ALL_LINEAR = "all-linear"
HEADS = ("lm_head",)
"""Output heads, which "all-linear" leaves out (QLoRA and PEFT do)."""
MATCH_SECONDS = 0.5
_NOT_RE = regex.compile(r"\[:\^?\w+:\]|(?<!\\)\{[^\d,}]")
"""Where `regex`, which keeps time, reads an expression otherwise than `re`: POSIX classes and approximate matching."""


def layer_of(module: str) -> int | None:
    """The layer number in a module path, by PEFT's rule."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return None if match is None else int(match[1])


@dataclasses.dataclass(frozen=True)
class Modules:
    """A tree seen once, by its modules. Of a stacked leaf, each layer is a module of its own."""

    rows: tuple[Row, ...]
    roles: Mapping[str, str]
    """Leaf path -> what its trailing axes are for, where somebody has said so."""
    kernels: Mapping[str, str]
    """Module path -> leaf path of every linear kernel: a leaf called "kernel", or one of a tree that uses none of Flax's leaf
    names, with two axes (three when stacked), and every leaf whose roles are stated."""
    unclear: Mapping[str, str]
    """The same of what would be kernels, but for axes that nobody has said the purpose of."""
    embeddings: Mapping[str, str]
    """The same of every embedding table."""

    @property
    def names(self) -> set[str]:
        """Of all modules."""
        return {row.module for row in self.rows}


def modules_of(tree: Any, patterns: Mapping[str, str] | None = None) -> Modules:
    """The modules of a tree, or of a half that `split` made.

    Args:
        patterns: module pattern (as in `LoraConfig.rank_pattern`; the first match wins) -> roles of the leaf's trailing axes.

    Raises:
        ValueError: for roles that cannot be, do not fit a leaf's axes, match no leaf, or differ from those of a packed one.
    """
    seen = tuple(rows(tree))
    roles = _roles(seen, patterns or {})
    arrays = [row for row in seen if is_array(row.leaf)]
    named = any(row.kind in LEAF_NAMES for row in arrays)
    candidates = [row for row in arrays if not named or row.leaf_path in roles or row.kind == "kernel"]
    return Modules(
        rows=seen,
        roles=roles,
        kernels={row.module: row.leaf_path for row in candidates if row.leaf_path in roles or row.ndim == 2},
        unclear={row.module: row.leaf_path for row in candidates if row.leaf_path not in roles and row.ndim > 2},
        embeddings={row.module: row.leaf_path for row in arrays if is_embedding(row.path) and row.leaf.ndim == 2},
    )


def _roles(seen: Iterable[Row], patterns: Mapping[str, str]) -> dict[str, str]:
    """Leaf path -> roles, where they are stated: by these patterns, or before by `quantize_params`."""
    layers: dict[str, list[Row]] = {}
    for row in seen:
        if _may_be_kernel(row):
            layers.setdefault(row.leaf_path, []).append(row)
    stated, used = {}, set()
    for path, of_leaf in layers.items():
        pattern = next((p for p in patterns if any(pattern_matches(p, row.module) for row in of_leaf)), None)
        if pattern is None:
            continue
        used.add(pattern)
        roles, row = check_roles(patterns[pattern]), of_leaf[0]
        if row.ndim != len(roles):
            raise ValueError(
                f"`roles` {roles!r} for {path!r} names {len(roles)} axes; the leaf has {row.ndim}"
                f"{' besides the layers' * (row.layer is not None)}: {tuple(row.leaf.shape)}. Give every axis one letter."
            )
        stated[path] = roles
    dead = sorted(set(patterns) - used)
    if dead:
        names = [module_path(path) for path in layers]
        raise ValueError(
            f"`roles` {dead[0]!r} matches no leaf with two axes or more.{nearest(dead[0], names)} Those there are: "
            f"{describe(names)}."
        )
    packed = {row.leaf_path: row.leaf.packed_roles for row in seen if is_weight(row.leaf) and row.leaf.packed_roles}
    for path in packed.keys() & stated.keys():
        if stated[path].lstrip("b") != packed[path]:
            raise ValueError(
                f"`roles` {stated[path]!r} for {path!r} differ from {packed[path]!r}, under which it was quantized. State the "
                "same, or leave it out: a quantized kernel knows its own."
            )
    return packed | stated


def _may_be_kernel(row: Row) -> bool:
    """A module's name stands for its kernel; stacked, its bias and scale have two axes as well."""
    return is_array(row.leaf) and row.leaf.ndim > 1 and row.kind not in ("bias", "scale")


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule for `rank_pattern` keys: a regular expression for the module path or its dotted end."""
    return _matches(rf"(.*\.)?({key})$", module)


def is_embedding(path: str) -> bool:
    """Whether the leaf is an embedding table [vocab, d_model]."""
    return path.rpartition("/")[2] == "embedding"


def names_match(names: str | Sequence[str], module: str) -> bool:
    """PEFT's rule for `target_modules` and `exclude_modules`."""
    if isinstance(names, str):
        return _matches(names, module, whole=True)
    return any(name_matches(name, module) for name in names)


class Named(NamedTuple):
    """Modules chosen by names, step by step."""

    targeted: list[str]
    """What the targets name."""
    in_layers: list[str]
    """Of these, those in the layers."""
    chosen: list[str]
    """Of these, those that are not excluded."""


def named(
    modules: Iterable[str],
    targets: str | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    exclude: str | Sequence[str] = (),
) -> Named:
    """PEFT's rules for `target_modules`, `layers_to_transform` and `exclude_modules`, in its order.

    "all-linear" names all but output heads. A module whose whole path is a target is taken whatever its layer: "lm_head" is one.
    """
    if targets == ALL_LINEAR:
        targeted = [m for m in modules if m.rpartition(".")[2] not in HEADS]
    else:
        targeted = [m for m in modules if names_match(targets, m)]
    by_path = () if isinstance(targets, str) else targets
    in_layers = [m for m in targeted if layers is None or m in by_path or layer_of(m) in layers]
    return Named(targeted, in_layers, [m for m in in_layers if not (exclude and names_match(exclude, m))])


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
        found = split_layer_path(module.replace(".", "/"))
        tail = module if found is None else module.split(f".{found[1]}.", 1)[1]
        groups.setdefault(tail, []).extend([] if found is None else [found[1]])
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
