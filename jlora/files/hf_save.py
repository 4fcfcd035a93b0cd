"""(model, params) -> Hugging Face checkpoints."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import DTypeLike, Json, Params, PretrainedTokenizer, PyTree
from jlora.files.names import hf_name, is_transposed
from jlora.files.origin import Origin
from jlora.files.packing import Packing, writable, writable_said
from jlora.files.tokenizer import load_tokenizer
from jlora.lora import merge
from jlora.models import Model, family_of, refuse_adapted_tie
from jlora.quant import QuantizedTensor, QuantSpec
from jlora.storage import save_sharded
from jlora.storage.checkpoint_files import CONFIG, TERMS, TOKENIZER, WEIGHTS, matching
from jlora.storage.gguf import is_gguf
from jlora.storage.stops import GENERATION_CONFIG, stop_ids, token_ids, with_stops
from jlora.storage.whole import Content, check_writable, remove_partial, whole_files
from jlora.tree.paths import flatten, is_weight, per_layer_paths, split_layer_path


def save_pretrained(
    directory: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: PretrainedTokenizer | str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A dense transformers checkpoint: safetensors (sharded above `max_shard_bytes`), config.json, tokenizer files.

    Adapters are merged in float32. With `base` it is that checkpoint's own files with other weights: each tensor in the dtype
    that it has there, its config.json and generation_config.json but for the fields that are no longer true and the tokens
    that end a generation, its tokenizer's files byte for byte, and its licence.

    Args:
        tokenizer: a transformers tokenizer, or a directory whose tokenizer files are copied; None: those of `base`.
        base: directory of the checkpoint that `model` was loaded from, or its GGUF file, whose config and tokenizer are written as
            files; None: the files are made of `model.config`.
        dtype: of every tensor; None: the base's, or that of the parameters without `base`.

    Raises:
        FileExistsError: when the directory holds a model or a tokenizer already.
        ValueError: when a merged tensor is not finite in its dtype, `base` is another model's, or an adapted embedding is also
            the output head: `jlora.untie` the model first, which makes two tensors of them.
    """
    directory = Path(directory)
    refuse_checkpoint(directory)
    origin = None if base is None else Origin.read(base)
    tokenizer = _tokenizer(tokenizer, origin)
    tensors = merged_tensors(model, params, origin=origin, dtype=dtype)
    embedding = tensors[hf_name(model.config.embedding_path)].dtype
    said = jnp.dtype(dtype) if dtype is not None else embedding if origin is None else origin.dtype
    files = _companions(model, origin, tokenizer, str(said), quantization=None)
    _write(directory, tensors, files, tokenizer, max_shard_bytes)


def merged_tensors(
    model: Model, params: Params, *, origin: Origin | None = None, dtype: DTypeLike | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a dense checkpoint, under transformers' names and in its layout, adapters merged.

    Args:
        origin: gives each tensor the dtype that it has there.
        dtype: gives all of them this one instead.

    Raises:
        ValueError: when one is not finite, or an adapted embedding is also the output head.
    """
    refuse_adapted_tie(model, params)
    tensors = {}
    for path, leaf in layer_rows(model, params):
        array, name = np.asarray(merge(leaf)), hf_name(path)
        wanted = array.dtype if dtype is None and origin is None else jnp.dtype(dtype or origin.dtype_of(name))  # pyright: ignore[reportOptionalMemberAccess]
        with np.errstate(over="ignore"):  # found below
            stored = array.astype(wanted, copy=False)
        if not np.isfinite(stored.astype(np.float32)).all():
            why = (
                "The adapter has diverged."
                if not np.isfinite(array.astype(np.float32)).all()
                else f"It holds values beyond {wanted}, in which the base stores it; write `dtype` float32 (--dtype float32)."
            )
            raise ValueError(f"{path!r} is not finite after merging; nothing was written. {why}")
        tensors[name] = stored.T if is_transposed(path, model) else stored
    return tensors


def save_quantized(
    directory: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: PretrainedTokenizer | str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A checkpoint whose kernels stay packed (NF4: bitsandbytes' format, which transformers loads); the bytes are written as
    they are.

    Args:
        params: with kernels in one format of `PACKINGS`, NF4, from `load(…, quantize=NF4())` or `quantize_params`.
        tokenizer, base: as in `save_pretrained`.
        dtype: of the weights that stay dense, and to which the others decode; None: as in `save_pretrained`.

    Raises:
        FileExistsError: when the directory holds weights already, or a file that would be overwritten.
        ValueError: when nothing is quantized, kernels are adapted or quantized in several ways (`merge` and quantize again, or
            save the adapter beside the quantized base), or no checkpoint holds the format.
    """
    directory = Path(directory)
    refuse_checkpoint(directory)
    origin = None if base is None else Origin.read(base)
    tokenizer = _tokenizer(tokenizer, origin)
    as_loaded = next(leaf.dtype for leaf in flatten(params).values() if not is_weight(leaf))
    chosen = jnp.dtype(dtype) if dtype is not None else origin.dtype if origin is not None else as_loaded
    tensors: dict[str, np.ndarray] = {}
    packings: dict[str, tuple[Packing, QuantSpec]] = {}
    dense, held = [], writable()
    for path, leaf in layer_rows(model, params):
        spec = leaf.spec if isinstance(leaf, QuantizedTensor) else None
        packing = held.get(spec.name) if spec is not None else None
        if spec is not None and packing is not None:
            packings.setdefault(packing.name, (packing, spec))
            decoded = str(chosen) if dtype is not None or origin is not None else leaf.logical_dtype
            tensors |= packing.tensors(hf_name(path), dataclasses.replace(leaf, logical_dtype=decoded))
        elif is_weight(leaf):
            kind = f"{spec.name} {type(leaf).__name__}" if spec is not None else type(leaf).__name__
            raise ValueError(
                f"`save_quantized` writes dense weights and {writable_said()}; {path!r} is a {kind}. Save an adapter with "
                "`save_adapter`, or `merge` it into dense weights (`save_pretrained`)."
            )
        else:
            dense += [path] if path.endswith("/kernel") else []
            array = np.asarray(leaf).astype(
                chosen if dtype is not None or origin is not None else leaf.dtype, copy=False
            )
            tensors[hf_name(path)] = array.T if is_transposed(path, model) else array
    if not packings:
        formats = " or ".join(packing.format.__name__ for packing in held.values())
        raise ValueError(
            f"`save_quantized` found no {formats} weight. Load with `quantize=jlora.NF4()`, or use `save_pretrained`."
        )
    if len(packings) > 1:
        raise ValueError(
            f"A checkpoint is packed in one way; these kernels are in {' and in '.join(packings)}. Quantize all of them alike."
        )
    ((packing, spec),) = packings.values()
    # transformers leaves the head dense by itself, but a list of other modules replaces that rule.
    skipped = [hf_name(path).removesuffix(".weight") for path in dense]
    only_head = not any(split_layer_path(path) for path in dense)
    said = packing.declaration(spec, str(chosen), [] if only_head else sorted({*skipped, "lm_head"}))
    files = _companions(model, origin, tokenizer, str(chosen), quantization=said)
    _write(directory, tensors, files, tokenizer, max_shard_bytes)


def layer_rows(model: Model, params: Params) -> Iterator[tuple[str, PyTree]]:
    """Per-layer paths and their leaves; the layers of a stacked tree one after the other."""
    depth = model.config.depth
    for path, leaf in flatten(params).items():
        paths = per_layer_paths(path, depth)
        for i, row_path in enumerate(paths):
            yield row_path, leaf if row_path == path else jax.tree.map(lambda x, i=i: x[i], leaf)


def refuse_checkpoint(directory: str | os.PathLike) -> None:
    """Raises what writing a checkpoint there would raise, so that it can be said before a model is loaded.

    What a killed process had put there of one is taken back first.

    Raises:
        FileExistsError: when what a checkpoint is made of is there: two that are mixed are neither.
        PermissionError and other OSErrors: when nothing can be written there.
    """
    directory = Path(directory)
    remove_partial(directory / CONFIG)
    existing = matching(directory, (*WEIGHTS, CONFIG, GENERATION_CONFIG, "adapter_config.json", *TOKENIZER))
    if existing:
        raise FileExistsError(
            f"{str(directory)!r} already holds {min(existing)!r}; choose another directory or remove it first."
        )
    check_writable(directory)


def _tokenizer(
    tokenizer: PretrainedTokenizer | str | os.PathLike | None, origin: Origin | None
) -> PretrainedTokenizer | str | os.PathLike | None:
    """The same, but a GGUF file's tokenizer in place of the file, which has no files of a tokenizer to copy."""
    if tokenizer is None and origin is not None:
        tokenizer = origin.directory
    if isinstance(tokenizer, str | os.PathLike) and is_gguf(Path(tokenizer)):
        return load_tokenizer(tokenizer)
    return tokenizer


def _companions(
    model: Model,
    origin: Origin | None,
    tokenizer: PretrainedTokenizer | str | os.PathLike | None,
    dtype: str,
    *,
    quantization: Mapping[str, Json] | None,
) -> dict[str, Content]:
    """Name -> content of the files beside the weights; those of a tokenizer only where they are copied."""
    stops = stop_ids(
        token_ids(model.config.eos_token_id, where="the model's config"),
        None if isinstance(tokenizer, str | os.PathLike) else tokenizer,
        vocab_size=model.config.vocab_size,
    )
    copied = matching(Path(tokenizer), TOKENIZER) if isinstance(tokenizer, str | os.PathLike) else {}
    if origin is None:
        fields = {**family_of(model.config).write(model.config), "dtype": dtype, "torch_dtype": dtype}
        if quantization is not None:
            fields["quantization_config"] = quantization
        special = {k: fields[k] for k in ("bos_token_id", "eos_token_id") if fields.get(k) is not None}
        return {CONFIG: _json(fields), GENERATION_CONFIG: _json(with_stops(special, stops)), **copied}
    return {
        CONFIG: origin.config_of(model, dtype, quantization),
        GENERATION_CONFIG: origin.generation_config_of(stops),
        **copied,
        **({} if is_gguf(origin.directory) else matching(origin.directory, TERMS)),
    }


def _json(fields: Mapping[str, Json]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _write(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    files: Mapping[str, Content],
    tokenizer: PretrainedTokenizer | str | os.PathLike | None,
    max_shard_bytes: int,
) -> None:
    """Weights, the `files` beside them, and those of a tokenizer that is not copied."""
    with whole_files(directory, last=CONFIG, needed=sum(t.nbytes for t in tensors.values())) as partial:
        for _ in save_sharded(partial, tensors, max_shard_bytes=max_shard_bytes):
            pass
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike):
            tokenizer.save_pretrained(partial)
