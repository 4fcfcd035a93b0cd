"""GGUF: models and LoRA adapters written for llama.cpp and what is built on it; `jlora.files.gguf_read` and `gguf_adapter` read
them.

Kernels [in, out] are stored as numpy [out, in] (GGUF counts the axes the other way round). In which families rows are permuted,
and what else differs between them, is in their layouts: `jlora.models.gguf`.

Reference: the GGUF specification (ggml, docs/gguf.md); llama.cpp's `conversion/` (`convert_hf_to_gguf.py`) and
`src/llama-adapter.cpp`.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from jlora._typing import Params, PretrainedTokenizer, PyTree
from jlora.files.finite import refuse_not_finite
from jlora.files.gguf_adapter import HEAD_DIM
from jlora.files.gguf_names import import_gguf, permuted, tensor_name
from jlora.files.hf_save import layer_rows
from jlora.files.names import check_shapes, mismatches
from jlora.files.updates import PlainUpdates, kernel_shapes, plain_updates
from jlora.files.vocabulary import Vocabulary
from jlora.lora import LoraConfig
from jlora.models import Model, abstract_params, family_of, refuse_adapted_tie
from jlora.storage.whole import check_size, refuse_existing, whole_file
from jlora.tree.paths import flatten, is_weight, module_path, per_layer_paths
from jlora.weight import materialize

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GGUFDtype: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
DEFAULT_DTYPE: GGUFDtype = "q8_0"

FILE_TYPES: Mapping[str, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
"""dtype -> name in `gguf.LlamaFileType`. The tensors' own type has the dtype's name in capitals."""

_ALWAYS_F32 = ("position_embd.weight",)  # llama.cpp adds it to the embeddings in float32; its converter keeps it, too

_LARGEST: Mapping[str, float] = {"F32": math.inf, "F16": 65504.0, "BF16": 3.3895e38, "Q8_0": 127 * 65504.0}
"""Tensor type -> the magnitude up to which it rounds to a finite number. The scale of a q8_0 block is f16."""


def save_gguf(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: PretrainedTokenizer,
    dtype: GGUFDtype = DEFAULT_DTYPE,
) -> None:
    """A model for llama.cpp: one GGUF file with weights, hyperparameters and vocabulary.

    Adapters are merged in float32 and quantized bases are dequantized to float32 before the result is cast to `dtype`.
    Vectors (norms, biases) and GPT-2's position embedding are float32 whatever the `dtype`. q8_0 packs 32 neighbours of
    a row into 34 bytes, 8.5 bits a weight; tensors whose rows do not divide into 32 are stored as f16, as llama.cpp's
    converter does. Quantize further with `llama-quantize` from an f16 or bf16 file. A tied head is left out, as llama.cpp
    takes the embedding for it. At any time there is one dense tensor beside the parameters.

    Args:
        path: the file to write, such as "model.gguf"; it appears when it is complete.
        params: per-layer or stacked, adapted or not, quantized or not.
        tokenizer: of the model; byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM3) or SentencePiece's (Gemma 3, Mistral), see
            `Vocabulary`.
        dtype: "f32", "f16", "bf16" or "q8_0".

    Raises:
        ImportError: without the package gguf.
        FileExistsError: when `path` exists.
        ValueError: for another `dtype`, parameters that are not the model's, values that are not finite or too large for
            f16, an adapted embedding that is also the output head (`jlora.untie` the model first), and tokenizers that
            GGUF does not represent. Nothing is left behind.
    """
    gguf = import_gguf()
    if dtype not in FILE_TYPES:
        raise ValueError(
            f"`dtype` must be one of {', '.join(FILE_TYPES)}; got {dtype!r}. For 4 to 6 bits a weight, write f16 and run "
            "llama.cpp's llama-quantize on it."
        )
    path = refuse_existing(path)
    refuse_unknown_to_llama_cpp(model)
    _check_params(model, params)
    refuse_adapted_tie(model, params)
    said = family_of(model.config).gguf.fields(model.config)["context_length"]
    if said < model.config.max_length:
        warnings.warn(
            f"llama.cpp runs this model ({model.config.model_type}) without its sliding window: it computes the same for "
            f"{said} tokens, which the file gives as its context (the model has {model.config.max_length}).",
            stacklevel=2,
        )
    vocabulary = Vocabulary.of(tokenizer, model.config)
    wanted = gguf.GGMLQuantizationType[dtype.upper()]
    stored = {}
    for name, origin, leaf in _tensors(model, params):
        shape = leaf.shape[::-1] if origin.endswith("/kernel") else leaf.shape
        stored[name] = shape, _tensor_type(gguf, name, shape, wanted)

    def describe(writer):
        _write_metadata(writer, model, path.stem, int(gguf.LlamaFileType[FILE_TYPES[dtype]]), gguf)
        _write_vocabulary(writer, vocabulary)

    arrays = (
        _stored(gguf, name, _float32(model, origin, leaf), stored[name][1])
        for name, origin, leaf in _tensors(model, params)
    )
    _write(gguf, path, model, describe, stored, arrays)


def save_gguf_adapter(path: str | os.PathLike, params: Params, *, config: LoraConfig, model: Model) -> None:
    """A LoRA adapter for llama.cpp (`--lora adapter.gguf` beside the base model's GGUF), float32.

    lora_A [in, rank] is stored as numpy (rank, in), lora_B [rank, out] as (out, rank), its rows permuted where the base's
    are. llama.cpp scales every module by `adapter.lora.alpha / rank`, with one alpha for all; rsLoRA's and per-module
    scalings are folded into lora_B, which is multiplied by `scaling * rank / alpha`.

    Args:
        path: the file to write, such as "adapter.gguf"; it appears when it is complete.
        params: adapted parameters, per-layer or stacked, or the adapter half that `split` gave.
        config: the config they were adapted with.
        model: the base model.

    Raises:
        ImportError: without the package gguf.
        FileExistsError: when `path` exists.
        ValueError: when nothing is adapted, `config` is not the one the parameters were adapted with, a factor is not
            finite, or the adapter holds more than low-rank updates of linear kernels. Nothing is left behind.
    """
    gguf = import_gguf()
    path = refuse_existing(path)
    refuse_unknown_to_llama_cpp(model)
    updates = plain_updates(params, config, format="GGUF", writer="save_gguf_adapter")
    alpha = updates.config.alpha
    _check_adapter(model, updates)
    tensors = {}
    for module, weight in updates.modules.items():
        b = np.asarray(weight.lora_B, np.float32).T * (weight.scaling * weight.rank / alpha)
        name = f"{tensor_name(module, model)}.weight"
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(np.asarray(weight.lora_A, np.float32).T)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(permuted(model, module, b))
    for name, array in tensors.items():
        refuse_not_finite(name, array)

    def describe(writer):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(path.stem)
        writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        if family_of(model.config).gguf.rotates_pairs:
            writer.add_uint32(f"{writer.arch}.{HEAD_DIM}", model.config.kv_shape[1])

    stored = {name: (array.shape, gguf.GGMLQuantizationType.F32) for name, array in tensors.items()}
    _write(gguf, path, model, describe, stored, tensors.values())


def refuse_unknown_to_llama_cpp(model: Model) -> None:
    """
    Raises:
        ValueError: for what llama.cpp's graph of the model's family does not compute.
    """
    layout = family_of(model.config).gguf
    lacking = list(layout.lacks(model.config))
    if lacking:
        raise ValueError(
            f"llama.cpp's graph {layout.architecture!r} does not compute what this model ({model.config.model_type}) has: "
            f"{'; '.join(lacking)}. It would give other outputs; export with `save_pretrained`."
        )


def _write(
    gguf: ModuleType,
    path: Path,
    model: Model,
    describe: Callable[["GGUFWriter"], None],
    stored: Mapping[str, tuple[tuple[int, ...], "GGMLQuantizationType"]],
    arrays: Iterable[np.ndarray],
) -> None:
    """One file, whole or not at all.

    The tensors are written here and not by gguf, which uses `ndarray.tofile`: that loses the error of its last bytes, and on
    a full disk leaves a hole or a shorter file without a word.

    Args:
        describe: adds the fields.
        stored: name -> (shape, type in the file) of every tensor.
        arrays: their bytes, in the same order.
    """
    sizes = [math.prod(gguf.quants.quant_shape_to_byte_shape(shape, kind)) for shape, kind in stored.values()]
    with whole_file(path, new=True, needed=sum(sizes)) as partial:
        writer = gguf.GGUFWriter(partial, family_of(model.config).gguf.architecture)
        try:
            describe(writer)
            for (name, (shape, kind)), size in zip(stored.items(), sizes, strict=True):
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for array, size in zip(arrays, sizes, strict=True):
                written = file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                assert written == size, f"a tensor of {written} bytes, announced with {size}"
                writer.write_padding(file, size)
            expected = file.tell()
        finally:
            writer.close()
        check_size(partial, expected)


def _check_params(model: Model, params: Params) -> None:
    """Every parameter of the model once, in its shape; a file without one would be refused only when it is loaded."""
    depth, found = model.config.depth, {}
    for path, leaf in flatten(params).items():
        if is_weight(leaf) and leaf.absent:
            raise ValueError(
                f"`save_gguf` writes whole parameters, and {path!r} is half of a `split`. Pass `combine(adapter, base)`."
            )
        rows, shape = per_layer_paths(path, depth), tuple(leaf.shape)
        found |= dict.fromkeys(rows, shape[1:] if rows != [path] and shape[0] == depth else shape)
    expected = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    problems = mismatches(expected, found)
    if problems:
        raise ValueError(
            f"These are not the parameters of this model ({model.config.model_type}):\n  " + "\n  ".join(problems)
        )


def _check_adapter(model: Model, updates: PlainUpdates) -> None:
    """Refuses what llama.cpp's adapters do not hold."""
    kernels = kernel_shapes(model)
    other = [*updates.whole, *updates.nested]
    other += [m for m, w in updates.modules.items() if w.magnitude is not None or m not in kernels]
    if other:
        raise ValueError(
            "A GGUF adapter holds low-rank updates of the checkpoint's linear kernels and nothing else; this one has more: "
            f"{', '.join(dict.fromkeys(other[:5]))}. Write the merged model with `save_gguf`."
        )
    check_shapes(updates.shapes, kernels)


def _tensors(model: Model, params: Params) -> Iterator[tuple[str, str, PyTree]]:
    """(name in the file, path in the tree, leaf) of every tensor, layer by layer, in the same order every time."""
    for path, leaf in layer_rows(model, params):
        name = tensor_name(module_path(path), model)
        yield f"{name}.{'bias' if path.endswith('/bias') else 'weight'}", path, leaf
    for name, array in family_of(model.config).gguf.tensors(model.config).items():
        yield name, "", array


def _tensor_type(
    gguf: ModuleType, name: str, shape: tuple[int, ...], wanted: "GGMLQuantizationType"
) -> "GGMLQuantizationType":
    if len(shape) < 2 or name in _ALWAYS_F32:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _float32(model: Model, path: str, leaf: PyTree) -> np.ndarray:
    """The dense tensor as the file orders it: kernels as [out, in]."""
    array = np.asarray(materialize(leaf, jnp.dtype(jnp.float32)) if is_weight(leaf) else leaf).astype(np.float32)
    if path.endswith("/scale"):
        array = array + np.float32(family_of(model.config).gguf.scale_offset)
    return permuted(model, module_path(path), array.T if path.endswith("/kernel") else array)


def _stored(gguf: ModuleType, name: str, array: np.ndarray, kind: "GGMLQuantizationType") -> np.ndarray:
    refuse_not_finite(name, array)
    largest = float(np.abs(array).max())
    if largest > _LARGEST[kind.name]:
        raise ValueError(
            f"{name!r} has values of up to {largest:g}, and {kind.name.lower()} ends at {_LARGEST[kind.name]:g}. Write bf16 "
            "or f32 instead."
        )
    return gguf.quants.quantize(np.ascontiguousarray(array), kind)


_ADD: Mapping[type, Callable[[Any, str, Any], None]] = {
    int: lambda writer, key, value: writer.add_uint32(key, value),
    float: lambda writer, key, value: writer.add_float32(key, value),
    str: lambda writer, key, value: writer.add_string(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}
"""How a hyperparameter is written, by its type."""


def _write_metadata(writer: "GGUFWriter", model: Model, name: str, file_type: int, gguf: ModuleType) -> None:
    count = sum(math.prod(leaf.shape) for leaf in flatten(abstract_params(model)).values())
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(count, count, 0, 0))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in family_of(model.config).gguf.fields(model.config).items():
        _ADD[type(value)](writer, f"{writer.arch}.{key}", value)


def _write_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_before)
    else:
        writer.add_token_merges(vocabulary.merges)
    for kind, number in vocabulary.ids.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    # Said also when false: llama.cpp adds a bos token to "llama-bpe" of its own accord.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
