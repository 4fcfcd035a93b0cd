"""Hugging Face checkpoints <-> (model, params)."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._tree import flatten, nest, per_layer_paths, split_layer_path
from jlora._typing import Array, Params
from jlora.formats import Checkpoint, save_sharded
from jlora.io.names import checkpoint_names, hf_name, is_ignorable, is_transposed, mismatches
from jlora.lora import merge
from jlora.models import Model, abstract_params, model_from_config

_FLOATS = ("F64", "F32", "F16", "BF16")


def load(
    name: str | os.PathLike, *, dtype: Any = jnp.bfloat16, stack: bool = False, remat: str = "none"
) -> tuple[Model, dict[str, Any]]:
    """A pretrained model and its parameters, from a Hugging Face directory or hub id.

    Reads safetensors, single or sharded, memory-mapped and one tensor at a time: the peak is the parameters plus one tensor.

    Args:
        name: a directory with config.json and safetensors, or a hub id such as "gpt2" (downloaded to the hub's cache).
        dtype: of parameters and activations: jnp.bfloat16 or jnp.float32.
        stack: build the stacked form, which the model runs as one scan (see `stack_layers`).
        remat: "layer" keeps only each layer's input for the backward pass; "none" keeps everything.

    Returns:
        (Flax module, parameters); `model.apply({"params": params}, input_ids)` gives float32 logits.

    Raises:
        FileNotFoundError: no such directory or hub id, or no safetensors in it.
        ValueError: a family or config field that the graphs do not compute; missing, unexpected and mis-shaped tensors,
            all in one error.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"`dtype` must be jnp.bfloat16 or jnp.float32 (float16 overflows in training); got {dtype}.")
    directory = find(name)
    model = model_from_config(read_config(directory), dtype=dtype, remat=remat)
    expected = flatten(abstract_params(model))
    with Checkpoint(directory) as checkpoint:
        names = checkpoint_names(expected, checkpoint.shapes)
        _check(directory, model, expected, names, checkpoint)
        flat: dict[str, Array] = {}
        for path, tensor_name in names.items():
            tensor = _to_device(checkpoint.read(tensor_name), dtype, is_transposed(path, model))
            layer = split_layer_path(path) if stack else None
            if layer is None:
                flat[path] = tensor
            else:
                stacked_path, index = layer
                if stacked_path not in flat:
                    flat[stacked_path] = jnp.zeros((model.config.depth, *tensor.shape), dtype)
                flat[stacked_path] = _set_row(flat[stacked_path], tensor, index)
    return model, nest(flat)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stacked, row, index):
    return jax.lax.dynamic_update_index_in_dim(stacked, row, index, 0)


def _to_device(tensor: np.ndarray, dtype, transposed: bool) -> Array:
    array = jnp.asarray(tensor).astype(dtype)
    return array.T if transposed else array


def _check(directory, model, expected, names, checkpoint: Checkpoint) -> None:
    shapes = {
        names[path]: leaf.shape[::-1] if is_transposed(path, model) else leaf.shape for path, leaf in expected.items()
    }
    ignorable = [n for n in checkpoint.shapes if is_ignorable(n, model)]
    problems = mismatches(shapes, checkpoint.shapes, ignorable)
    problems += [
        f"dtype: {n} is {checkpoint.dtypes[n]}" for n in shapes if checkpoint.dtypes.get(n, "F32") not in _FLOATS
    ]
    if problems:
        raise ValueError(
            f"The tensors in {str(directory)!r} do not fit its config.json ({model.config.model_type}):\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded. Check that config.json and the weights are of the same checkpoint."
        )


def find(name: str | os.PathLike) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded (configuration, tokenizer and safetensors only)."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    text = os.fspath(name)
    if directory.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(
            f"{text!r} is not a directory. Pass a Hugging Face model directory, or a hub id such as 'gpt2'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub client raises a dozen unrelated types for "not there" and "no network"
        raise FileNotFoundError(
            f"{text!r} is neither a directory here nor could it be downloaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Check the spelling, the network, and for gated models `hf auth login`."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of `config.json`."""
    path = directory / "config.json"
    if not path.is_file():
        adapter = (directory / "adapter_config.json").is_file()
        raise FileNotFoundError(
            f"There is no config.json in {str(directory)!r}."
            + (
                " It holds an adapter: load its base model, then `jlora.load_adapter(directory, params)`."
                if adapter
                else ""
            )
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; got {type(fields).__name__}.")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method")
        raise ValueError(
            f"{str(directory)!r} is quantized ({method!r}); jlora loads dense float checkpoints. Load its dense original."
        )
    return fields


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The checkpoint's tokenizer, as a transformers object."""
    # transformers greets environments without torch with advice that does not apply here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(find(name))
    except (OSError, ValueError, TypeError) as error:
        raise FileNotFoundError(
            f"{os.fspath(name)!r} has no tokenizer that transformers can read ({str(error).splitlines()[0]}). "
            "Copy tokenizer.json and tokenizer_config.json of its base model into the directory."
        ) from error


def save_pretrained(
    directory: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A dense transformers checkpoint: safetensors (sharded above `max_shard_bytes`), config.json, tokenizer files.

    Adapters are merged in float32 and cast to the base's dtype. Existing weights in the directory are refused, not overwritten.

    Raises:
        FileExistsError: when the directory holds weights already.
        ValueError: when a merged tensor is not finite.
    """
    directory = Path(directory)
    existing = sorted(f.name for f in directory.glob("*.safetensors*"))
    if existing:
        raise FileExistsError(
            f"{str(directory)!r} already holds {existing[0]!r}; choose another directory or remove it first."
        )
    leaves = flatten(params)
    depth = model.config.depth
    tensors = {}
    for path, leaf in leaves.items():
        dense = merge(leaf)
        paths = per_layer_paths(path, depth)
        for row_path, row in zip(paths, [dense] if paths == [path] else dense, strict=True):
            array = np.asarray(row)
            if not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(
                    f"{row_path!r} is not finite after merging; nothing was written. The adapter has diverged."
                )
            tensors[hf_name(row_path)] = array.T if is_transposed(row_path, model) else array
    directory.mkdir(parents=True, exist_ok=True)
    for _ in save_sharded(directory, tensors, max_shard_bytes=max_shard_bytes):
        pass
    dtype = str(next(iter(tensors.values())).dtype)
    fields = {**model.config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    special = {k: fields[k] for k in ("bos_token_id", "eos_token_id") if fields.get(k) is not None}
    (directory / "generation_config.json").write_text(json.dumps(special, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
