"""(model, params) -> Hugging Face checkpoints."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._tree import flatten, is_weight, per_layer_paths, split_layer_path
from jlora._typing import Params
from jlora.formats import save_sharded
from jlora.formats.files import check_writable, whole_files, write_text
from jlora.io.bnb import quantization_config, to_tensors
from jlora.io.names import hf_name, is_transposed
from jlora.lora import merge
from jlora.models import Model, refuse_adapted_tie
from jlora.quant import NF4, NF4Tensor


def save_pretrained(
    directory: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A dense transformers checkpoint: safetensors (sharded above `max_shard_bytes`), config.json, tokenizer files.

    Adapters are merged in float32 and cast to the base's dtype. Nothing that is in the directory is overwritten.

    Raises:
        FileExistsError: when the directory holds weights already, or a file that would be overwritten.
        ValueError: when a merged tensor is not finite, or an adapted embedding is also the output head: `jlora.untie` the
            model first, which makes two tensors of them.
    """
    directory = Path(directory)
    refuse_weights(directory)
    tensors = merged_tensors(model, params)
    dtype = str(next(iter(tensors.values())).dtype)
    _write(directory, model, tensors, {"dtype": dtype, "torch_dtype": dtype}, tokenizer, max_shard_bytes)


def merged_tensors(model: Model, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a dense checkpoint, under transformers' names and in its layout, adapters merged.

    Raises:
        ValueError: when one is not finite, or an adapted embedding is also the output head.
    """
    refuse_adapted_tie(model, params)
    tensors = {}
    for path, leaf in layer_rows(model, params):
        array = np.asarray(merge(leaf))
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{path!r} is not finite after merging; nothing was written. The adapter has diverged.")
        tensors[hf_name(path)] = array.T if is_transposed(path, model) else array
    return tensors


def save_quantized(
    directory: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A 4-bit checkpoint in bitsandbytes' format, which transformers loads; the packed bytes are written as they are.

    Args:
        params: with NF4 kernels, from `load(…, quantize=NF4())` or `quantize_params`.

    Raises:
        FileExistsError: when the directory holds weights already, or a file that would be overwritten.
        ValueError: when nothing is quantized to NF4, or kernels are adapted or quantized in other ways: `merge` and
            quantize again, or save the adapter beside the quantized base.
    """
    directory = Path(directory)
    refuse_weights(directory)
    tensors: dict[str, np.ndarray] = {}
    packed: dict[str, NF4Tensor] = {}
    dense = []
    for path, leaf in layer_rows(model, params):
        if isinstance(leaf, NF4Tensor):
            packed[path] = leaf
            tensors |= to_tensors(hf_name(path), leaf)
        elif is_weight(leaf):
            raise ValueError(
                f"`save_quantized` writes NF4 and dense weights; {path!r} is a {type(leaf).__name__}. Save an adapter with "
                "`save_adapter`, or `merge` it into dense weights (`save_pretrained`)."
            )
        else:
            dense += [path] if path.endswith("/kernel") else []
            tensors[hf_name(path)] = np.asarray(leaf).T if is_transposed(path, model) else np.asarray(leaf)
    if not packed:
        raise ValueError(
            "`save_quantized` found no NF4 weight. Load with `quantize=jlora.NF4()`, or use `save_pretrained`."
        )
    dtype = str(next(leaf.dtype for leaf in flatten(params).values() if not is_weight(leaf)))
    example = next(iter(packed.values()))
    spec = NF4(block_size=example.block_size, double_quant=example.double_quant)
    # transformers leaves the head dense by itself, but a list of other modules replaces that rule.
    skipped = [hf_name(path).removesuffix(".weight") for path in dense]
    only_head = not any(split_layer_path(path) for path in dense)
    fields = {
        "dtype": dtype,
        "torch_dtype": dtype,
        "quantization_config": quantization_config(spec, dtype, [] if only_head else sorted({*skipped, "lm_head"})),
    }
    _write(directory, model, tensors, fields, tokenizer, max_shard_bytes)


def layer_rows(model: Model, params: Params) -> Iterator[tuple[str, Any]]:
    """Per-layer paths and their leaves; the layers of a stacked tree one after the other."""
    depth = model.config.depth
    for path, leaf in flatten(params).items():
        paths = per_layer_paths(path, depth)
        for i, row_path in enumerate(paths):
            yield row_path, leaf if row_path == path else jax.tree.map(lambda x, i=i: x[i], leaf)


def refuse_weights(directory: str | os.PathLike) -> None:
    """Raises what writing a checkpoint there would raise, so that it can be said before a model is loaded.

    Raises:
        FileExistsError: when the directory holds weights or a config already.
        PermissionError and other OSErrors: when nothing can be written there.
    """
    directory = Path(directory)
    existing = sorted(f.name for pattern in ("*.safetensors*", "config.json") for f in directory.glob(pattern))
    if existing:
        raise FileExistsError(
            f"{str(directory)!r} already holds {existing[0]!r}; choose another directory or remove it first."
        )
    check_writable(directory)


def _write(
    directory: Path,
    model: Model,
    tensors: Mapping[str, np.ndarray],
    extra: Mapping[str, Any],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Weights, config.json with the fields `extra`, generation_config.json and the tokenizer's files."""
    with whole_files(directory, last="config.json", needed=sum(t.nbytes for t in tensors.values())) as partial:
        for _ in save_sharded(partial, tensors, max_shard_bytes=max_shard_bytes):
            pass
        fields = {**model.config.to_hf(), **extra}
        write_text(partial / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")
        special = {k: fields[k] for k in ("bos_token_id", "eos_token_id") if fields.get(k) is not None}
        write_text(partial / "generation_config.json", json.dumps(special, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
