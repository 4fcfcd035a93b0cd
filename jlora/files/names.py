"""Checkpoint names <-> tree paths: one rule, read in both directions."""

import difflib
import re
from collections.abc import Iterable, Mapping

from jlora.models import Model
from jlora.tree.modules import HEADS
from jlora.tree.paths import module_path

# Buffers that old checkpoints carry and that hold no parameters: causal masks and rotary frequencies.
_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)

HEAD = "lm_head.weight"


def hf_name(path: str) -> str:
    """ "model/layers/0/mlp/up_proj/kernel" -> "model.layers.0.mlp.up_proj.weight"."""
    parent, _, name = path.rpartition("/")
    return f"{parent.replace('/', '.')}.{'bias' if name == 'bias' else 'weight'}"


def is_transposed(path: str, model: Model) -> bool:
    """Whether the checkpoint stores this leaf as [out, in]."""
    # The head is torch's Linear also in GPT-2, whose other kernels are Conv1Ds.
    return path.endswith("/kernel") and (model.config.transposed_kernels or module_path(path) in HEADS)


def checkpoint_names(paths: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Tree path -> name in a checkpoint that has the names `present`; the hub's GPT-2 files lack the "transformer." prefix."""
    names = {path: hf_name(path) for path in paths}
    present = list(present)
    if not any(n.startswith("transformer.") for n in present):
        names = {path: n.removeprefix("transformer.") for path, n in names.items()}
    return names


def is_ignorable(name: str, model: Model) -> bool:
    """Whether a tensor that no parameter asks for may be left out: a known buffer, or the copy of a tied head."""
    return bool(_BUFFERS.fullmatch(name)) or (name == HEAD and model.config.tie_word_embeddings)


def mismatches(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], ignorable: Iterable[str] = ()
) -> list[str]:
    """Missing, unexpected and mis-shaped names as lines for one error."""
    ignorable = set(ignorable)
    missing = [name for name in expected if name not in found]
    other = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    extra = [name for name in found if name not in expected and name not in ignorable]
    shown = 20
    lines = [_missing(name, expected[name], extra) for name in missing[:shown]]
    lines += [f"shape: {name} is {tuple(found[name])}, should be {tuple(expected[name])}" for name in other]
    lines += [f"unexpected: {name} {tuple(found[name])}" for name in extra]
    more = max(0, len(missing) - shown) + max(0, len(lines) - shown)
    return lines[:shown] + ([f"and {more} more"] if more else [])


def check_shapes(found: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]]) -> None:
    """Raises a ValueError for updates, by module, that are not of the shapes of the model's weights."""
    problems = mismatches({module: model[module] for module in found}, found)
    if problems:
        raise ValueError("The adapter does not fit the model:\n  " + "\n  ".join(problems))


def _missing(name: str, shape: tuple[int, ...], extra: list[str]) -> str:
    close = difflib.get_close_matches(name, extra[:1000], n=1)
    return f"missing: {name} {shape}" + (f" (there is {close[0]})" if close else "")


FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that are read as weights."""


def wrong_dtypes(accepted: Mapping[str, tuple[str, ...]], found: Mapping[str, str]) -> list[str]:
    """Tensors whose dtype is none of the accepted ones, as lines for one error."""
    return [
        f"dtype: {name} is {found[name]}, should be {' or '.join(dtypes)}"
        for name, dtypes in accepted.items()
        if name in found and found[name] not in dtypes
    ]
