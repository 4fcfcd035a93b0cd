"""The kernels of a GGUF file left in its own blocks: what `quantize="keep"` means."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from jlora.files.gguf_read import GGUFCheckpoint
from jlora.files.packing import DenseWeight, TensorTypes
from jlora.models import Model, abstract_params
from jlora.quant import GGML_TYPES, QuantizedTensor, from_file, quantizable
from jlora.quant.ggml import GGML
from jlora.storage.gguf import is_gguf
from jlora.storage.tensors import Tensors
from jlora.tree.modules import modules_of
from jlora.tree.paths import flatten, split_layer_path


class KeptDense(UserWarning):
    """Kernels of a quantized file are decoded although it was to be kept: of their types there is no packed form here."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A kernel of a GGUF file that stays packed."""

    dense: DenseWeight
    """As the checkpoint reads it otherwise."""
    shape: tuple[int, ...]
    """[out, in]"""
    spec: GGML
    dtype: str
    """That it is to decode to."""

    def tensors(self, name: str) -> TensorTypes:
        return self.dense.tensors(name)

    def read(self, checkpoint: GGUFCheckpoint, name: str) -> QuantizedTensor:
        return from_file(jnp.asarray(checkpoint.blocks(name)), self.spec, self.dtype)


def kept_specs(checkpoint: Tensors, model: Model, *, stack: bool, where: Path) -> dict[str, GGML]:
    """Tree path -> format, of the kernels that stay as the file packs them: every linear one but the head.

    Raises:
        ValueError: for a checkpoint that is no GGUF file, and for a file that packs no kernel in a format that there is here; with
            `stack`, for layers that it packs in several formats.
    """
    rows = ", ".join(GGML_TYPES)
    if not isinstance(checkpoint, GGUFCheckpoint):
        raise _no_blocks(where)
    types = {
        path: checkpoint.file.tensors[checkpoint.paths[path]].type
        for path in quantizable(modules_of(abstract_params(model)))
        if checkpoint.paths[path] in checkpoint.file.tensors
    }
    specs = {path: GGML_TYPES[kind.name]() for path, kind in types.items() if kind.name in GGML_TYPES}
    if not specs:
        there = ", ".join(sorted({kind.name for kind in types.values()}))
        raise ValueError(
            f'`quantize` "keep" leaves kernels packed, and those of {str(where)!r} are {there}; packed forms there are of '
            f"{rows}. Leave `quantize` out."
        )
    others = sorted(kind.name for kind in types.values() if kind.name not in GGML_TYPES and kind.block > 1)
    if others:
        warnings.warn(
            f"{len(others)} of the {len(types)} linear kernels of {str(where)!r} are decoded, not kept: they are "
            f"{', '.join(dict.fromkeys(others))}, and packed forms there are of {rows}.",
            KeptDense,
            stacklevel=3,
        )
    unlike = _unlike(specs, model) if stack else None
    if unlike is not None:
        raise ValueError(
            f"The layers of {str(where)!r} cannot be stacked as they are packed: {unlike!r} is of several formats in it. Take them "
            "per layer, without `stack` (--form per-layer)."
        )
    return specs


def _no_blocks(where: Path) -> ValueError:
    return ValueError(
        f'`quantize` "keep" leaves the blocks of a GGUF file as they are, and {str(where)!r} is none. Leave `quantize` out: '
        "kernels that bitsandbytes packed are used as they are anyway, and dense ones are packed by naming a format."
    )


def _unlike(specs: Mapping[str, GGML], model: Model) -> str | None:
    """The kernel, as its stacked path, that layers have in several formats, so that they cannot be stacked; None: there is none."""
    found: dict[str, GGML | None] = {}
    for path in flatten(abstract_params(model)):
        layer = split_layer_path(path)
        if layer is not None and found.setdefault(layer[0], specs.get(path)) != specs.get(path):
            return layer[0]
    return None


def stacks_as_packed(path: Path) -> bool:
    """Whether all layers of a GGUF file pack their kernels alike.

    Raises:
        ValueError: when it is none.
    """
    if not is_gguf(path):
        raise _no_blocks(path)
    checkpoint = GGUFCheckpoint(path)
    return _unlike(kept_specs(checkpoint, checkpoint.model, stack=False, where=path), checkpoint.model) is None
