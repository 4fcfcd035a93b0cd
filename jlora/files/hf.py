"""Hugging Face checkpoints and GGUF models -> (model, params)."""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, DTypeLike, Int, JsonObject, NamedTokens, PyTree
from jlora.files.adapters import CONFIG as ADAPTER_CONFIG
from jlora.files.finite import FiniteCheck
from jlora.files.gguf_packed import Blocks, kept_specs
from jlora.files.gguf_read import GGUFCheckpoint, config_fields
from jlora.files.names import HEAD, is_ignorable, is_transposed, mismatches, wrong_dtypes
from jlora.files.opened import names_in, open_checkpoint
from jlora.files.packing import DenseWeight, PackedWeight, check_declared, stored_weight
from jlora.models import Model, abstract_params, model_from_config
from jlora.quant import KEEP, Kept, QuantSpec, quantizable, quantize_rows
from jlora.storage.checkpoint_files import CONFIG
from jlora.storage.gguf import SUFFIX, GGUFFile, is_gguf
from jlora.storage.hub_id import is_hub_id
from jlora.storage.stops import GENERATION_CONFIG, SpecialTokens, generation_config, stop_ids, token_ids
from jlora.storage.structured import read_json
from jlora.storage.tensors import Tensors
from jlora.tree.modules import modules_of
from jlora.tree.paths import flatten, nest, split_layer_path


class AdapterBeside(UserWarning):
    """A model is loaded from a directory that holds an adapter too; transformers would put it on."""


class PackedTwice(UserWarning):
    """The weights of a quantized file are decoded and quantized again."""


def load(
    name: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    quantize: QuantSpec | Kept | None = None,
    stack: bool = False,
    remat: str = "none",
) -> tuple[Model, dict[str, PyTree]]:
    """A pretrained model and its parameters, from a Hugging Face directory or hub id, or a GGUF file.

    Reads safetensors, single or sharded, memory-mapped and one tensor at a time, the largest first: the peak is the
    parameters plus one dense tensor. Checkpoints that bitsandbytes quantized to NF4 are read as they are packed; the blocks of
    a GGUF file are decoded, unless they are to be kept.

    Args:
        name: a directory with config.json and safetensors, a hub id such as "gpt2" (downloaded to the hub's cache), or a
            .gguf file, of a split model the first.
        dtype: of parameters and activations: jnp.bfloat16 or jnp.float32; or jnp.float16, which trains under
            `jlora.train.dynamic_loss_scale`. (Weights of a quantized checkpoint decode to the dtype they were quantized from.)
        quantize: `jlora.NF4()`, `Int8()`, `Int4()`, `Int4G128()`, `MXFP4()` or one of ggml's formats, such as `Q4_1()`: packs
            every linear kernel but the head, as soon as it is read. "keep": those of a GGUF file stay in its own blocks, where
            they are of a type in `jlora.quant.GGML_TYPES`; other types, embeddings and the head are decoded.
        stack: build the stacked form, which the model runs as one scan (see `stack_layers`).
        remat: what the backward pass calculates again: "none", "attention" (its weights), "dots" (all of a layer but the outputs
            of its linear modules) or "layer", which keeps each layer's input alone.

    Returns:
        (Flax module, parameters); `model.apply({"params": params}, input_ids)` gives float32 logits. `model.config.eos_token_id`
        is all that ends a generation: of generation_config.json, config.json and the tokenizer (see `stop_ids`).

    Raises:
        FileNotFoundError: no such directory or hub id, or no safetensors in it.
        ValueError: a family or config field that the graphs do not compute; missing, unexpected and mis-shaped tensors,
            all in one error; weights that are NaN or infinite; `quantize` for a checkpoint that is quantized otherwise; "keep"
            for what packs nothing that is kept, and with `stack` for layers that are packed in several formats.
        ImportError: for a GGUF file, without the package gguf.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"`dtype` must be jnp.bfloat16 or jnp.float32, or jnp.float16; got {dtype!r}.") from error
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.float16):
        raise ValueError(f"`dtype` must be jnp.bfloat16 or jnp.float32, or jnp.float16; got {dtype}.")
    if isinstance(quantize, str) and quantize != KEEP:
        raise ValueError(f'`quantize` must be a format, such as `jlora.NF4()`, or "keep"; got {quantize!r}.')
    directory = find(name)
    if all((directory / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        warnings.warn(
            f"{str(directory)!r} holds a model and an adapter, which is not on: put it on with `jlora.load_adapter(directory, "
            "params)` (--adapter DIRECTORY).",
            AdapterBeside,
            stacklevel=2,
        )
    model = _with_stops(model_from_config(read_config(directory), dtype=dtype, remat=remat), directory)
    expected = flatten(abstract_params(model))
    checkpoint = open_checkpoint(directory)
    names = names_in(checkpoint, expected)
    weights: dict[str, PackedWeight | DenseWeight] = {
        path: stored_weight(
            checkpoint,
            names[path],
            leaf.shape,
            transposed=is_transposed(path, model),
            is_kernel=path.endswith("/kernel"),
        )
        for path, leaf in expected.items()
    }
    if quantize == KEEP:
        weights |= _kept(checkpoint, model, weights, dtype, stack=stack, where=directory)
    _check(directory, model, names, weights, checkpoint)
    spec = quantize if isinstance(quantize, QuantSpec) else None
    to_pack = quantizable(modules_of(abstract_params(model))) if spec else set()
    packed = {str(weight.spec): weight.spec for weight in weights.values() if not isinstance(weight, DenseWeight)}
    if spec and any(stored != spec for stored in packed.values()):
        raise ValueError(
            f"{str(directory)!r} is quantized already, as {next(iter(packed))}; it cannot be loaded as {quantize}. "
            "Leave `quantize` out, or load the dense original."
        )
    if spec and isinstance(checkpoint, GGUFCheckpoint) and checkpoint.packed:
        warnings.warn(
            f"{str(directory)!r} is quantized already ({', '.join(checkpoint.packed)}); packing what it decodes to as {quantize} "
            'rounds a second time, which costs quality. Keep it as it is, with `quantize="keep"` (--quantize keep), or pack the '
            "original checkpoint.",
            PackedTwice,
            stacklevel=2,
        )
    flat: dict[str, PyTree] = {}
    finite = FiniteCheck()
    # Largest first: its copies are made while there is little else.
    for path in sorted(names, key=lambda p: -math.prod(expected[p].shape)):
        to = spec if path in to_pack else None
        value = _read(checkpoint, names[path], weights[path], dtype, is_transposed(path, model), to, finite)
        layer = split_layer_path(path) if stack else None
        if layer is None:
            flat[path] = value
        else:
            stacked_path, index = layer
            stacked = flat.get(stacked_path)
            flat[stacked_path] = _set_row(
                _zeros(model.config.depth, value) if stacked is None else stacked, value, index
            )
    finite.finish(directory)
    return model, nest(flat)


def _with_stops(model: Model, directory: Path) -> Model:
    """The model with every stop of its directory as its end of text."""
    declared = token_ids(
        generation_config(directory).get("eos_token_id"), where=repr(str(directory / GENERATION_CONFIG))
    )
    tokens = None
    with suppress(ValueError):  # a model runs without a tokenizer; `load_tokenizer` says what is wrong with it
        tokens = SpecialTokens.of(directory)
    return add_stops(model, tokens, declared)


def add_stops(model: Model, tokenizer: NamedTokens | None, declared: Iterable[int] = ()) -> Model:
    """The model whose end of text is also those `declared`, which go first, and the tokenizer's: see `stop_ids`."""
    own = token_ids(model.config.eos_token_id, where="config.json")
    stops = stop_ids((*declared, *own), tokenizer, vocab_size=model.config.vocab_size)
    if stops == own:
        return model
    ids = stops[0] if len(stops) == 1 else stops or None
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_id=ids))


def _read(
    checkpoint: Tensors,
    name: str,
    weight: PackedWeight | DenseWeight,
    dtype: DTypeLike,
    transposed: bool,
    spec: QuantSpec | None,
    finite: FiniteCheck,
):
    """One leaf: packed as it is stored, or dense in `dtype` and then packed by `spec`."""
    if not isinstance(weight, DenseWeight):
        packed = weight.read(checkpoint, name)
        finite.see(name, packed)
        return packed
    stored = weight.read(checkpoint, name, dtype)
    finite.see(name, stored)
    if spec is None:
        return stored.T if transposed else stored
    packed = quantize_rows(stored if transposed else stored.T, spec)
    finite.see(f"{name} (as {spec.name})", packed)  # a scale in float16 may overflow
    return packed


def _kept(
    checkpoint: Tensors,
    model: Model,
    weights: Mapping[str, PackedWeight | DenseWeight],
    dtype: jnp.dtype,
    *,
    stack: bool,
    where: Path,
) -> dict[str, PackedWeight | DenseWeight]:
    """The kernels that stay as a GGUF file packs them."""
    specs = kept_specs(checkpoint, model, stack=stack, where=where)
    shapes = {path: leaf.shape[::-1] for path, leaf in flatten(abstract_params(model)).items()}
    dense = {path: weight for path, weight in weights.items() if isinstance(weight, DenseWeight)}
    return {path: Blocks(dense[path], shapes[path], spec, dtype.name) for path, spec in specs.items()}


def _zeros(depth: int, row: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros((depth, *x.shape), x.dtype), row)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stacked: PyTree, row: PyTree, index: Int[Array, ""] | int) -> PyTree:
    return jax.tree.map(lambda s, r: jax.lax.dynamic_update_index_in_dim(s, r, index, 0), stacked, row)


def _check(
    directory: Path,
    model: Model,
    names: Mapping[str, str],
    weights: Mapping[str, PackedWeight | DenseWeight],
    checkpoint: Tensors,
) -> None:
    shapes, dtypes = {}, {}
    for path, weight in weights.items():
        for tensor, (shape, accepted) in weight.tensors(names[path]).items():
            shapes[tensor], dtypes[tensor] = shape, accepted
    ignorable = [name for name in checkpoint.shapes if is_ignorable(name, model)]
    problems = mismatches(shapes, checkpoint.shapes, ignorable)
    problems += wrong_dtypes(dtypes, checkpoint.dtypes)
    if problems:
        said = "metadata" if isinstance(checkpoint, GGUFCheckpoint) else CONFIG
        raise ValueError(
            f"The tensors in {str(directory)!r} do not fit its {said} ({model.config.model_type}):\n  "
            + "\n  ".join(problems)
            + f"\nNothing was loaded. Check that {said} and the weights are of the same checkpoint."
        )
    _check_tie(directory, model, names, checkpoint)


def _check_tie(directory: Path, model: Model, names: Mapping[str, str], checkpoint: Tensors) -> None:
    """A tied head may be stored a second time; with other values it is a head of its own, and transformers 5 uses it."""
    embedding = names[model.config.embedding_path]
    if not model.config.tie_word_embeddings or HEAD not in checkpoint.shapes:
        return
    if not np.array_equal(checkpoint.read(HEAD), checkpoint.read(embedding)):
        raise ValueError(
            f"config.json in {str(directory)!r} ties the output head to the embedding, and the file holds a {HEAD!r} of other "
            f"values than {embedding!r}: transformers 5 uses that head, transformers 4 does not. Nothing was loaded. Set "
            '"tie_word_embeddings": false in config.json to use it, or remove the tensor.'
        )


def find(name: str | os.PathLike) -> Path:
    """The local directory of a checkpoint, or its GGUF file; a hub id is downloaded (configuration, tokenizer and safetensors
    only)."""
    directory = Path(name).expanduser()
    if directory.is_dir() or is_gguf(directory):
        return directory
    text = os.fspath(name)
    if directory.suffix == SUFFIX and not directory.exists():
        raise FileNotFoundError(f"There is no file {text!r}.")
    if not is_hub_id(text):
        raise FileNotFoundError(
            f"{text!r} is not a directory and no GGUF file. Pass a Hugging Face model directory, a .gguf file, or a hub id such as "
            "'gpt2'."
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        twice = ["consolidated*", "original/*"]  # the same weights in their makers' own format
        return Path(snapshot_download(text, allow_patterns=wanted, ignore_patterns=twice))
    except Exception as error:  # the hub client raises a dozen unrelated types for "not there" and "no network"
        raise FileNotFoundError(
            f"{text!r} is neither a directory here nor could it be downloaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Check the spelling, the network, and for gated models `hf auth login`."
        ) from error


def read_config(directory: Path) -> JsonObject:
    """The fields of `config.json`, or of the one that a GGUF file's metadata mean."""
    if is_gguf(directory):
        return config_fields(GGUFFile(directory))
    path = directory / CONFIG
    if not path.is_file():
        adapter = (directory / ADAPTER_CONFIG).is_file()
        files = sorted(file.name for file in directory.glob(f"*{SUFFIX}"))
        raise FileNotFoundError(
            f"There is no config.json in {str(directory)!r}."
            + (
                " It holds an adapter: load its base model, then `jlora.load_adapter(directory, params)`."
                if adapter
                else f" It holds {', '.join(files[:5])}: pass one of them."
                if files
                else ""
            )
        )
    fields = read_json(path)
    if fields.get("quantization_config"):
        check_declared(fields["quantization_config"], where=str(directory))
    return fields
