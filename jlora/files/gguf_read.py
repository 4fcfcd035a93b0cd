"""GGUF models read: the config.json that their metadata mean, and their tensors as a checkpoint has them.

The inverse of `jlora.files.gguf`, from the same tables: `jlora.models.gguf` and the package gguf's names. Blocks are decoded by
the package gguf, some rows at a time.

Reference: the GGUF specification (ggml, docs/gguf.md).
"""

import os
from collections.abc import Iterable, Mapping
from types import ModuleType

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora._typing import JsonObject
from jlora.files.gguf_names import import_gguf, tensor_name, unpermuted
from jlora.files.names import is_transposed
from jlora.models import FAMILIES, GGUF_ARCHITECTURES, Model, abstract_params, family_of, model_from_config
from jlora.models.gguf import FACTORS, Stored
from jlora.storage.fields import shown
from jlora.storage.gguf import GGUFFile, StoredTensor, TensorType
from jlora.storage.gguf_tokens import GGUFTokens
from jlora.tree.paths import flatten, module_path

_DENSE: Mapping[str, type] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types of which a block is one number -> NumPy's."""

_DECODED = 1 << 20
"""Elements that are decoded at once; the package's decoders make several copies."""


def config_fields(file: GGUFFile) -> JsonObject:
    """The fields of the config.json that a file's metadata mean.

    Raises:
        ValueError: for an architecture that is none of the families', and for metadata that the graphs do not compute.
    """
    where = repr(str(file.path))
    architecture, kind = file.fields.get("general.architecture"), file.fields.get("general.type", "model")
    if kind != "model":
        hint = " Load its base model, then `jlora.load_adapter(file, params)`." if kind == "adapter" else ""
        raise ValueError(f"{where} holds no model: its `general.type` is {shown(kind)}.{hint}")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"{where} has `general.architecture` {shown(architecture)}; jlora runs {', '.join(GGUF_ARCHITECTURES)}. To adapt "
            "another model, write it in JAX and wrap its parameters with `jlora.add_lora`."
        )
    family, prefix = GGUF_ARCHITECTURES[architecture], f"{architecture}."
    stored = Stored(
        where=where,
        architecture=architecture,
        said={key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)},
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        factors=_factors(file) if FACTORS in FAMILIES[family].gguf.beside else None,
    )
    ids, dtype = _token_ids(file), _dtype(file)
    fields = {"model_type": family} | FAMILIES[family].gguf.read(stored) | ids
    try:
        model = model_from_config(fields, dtype=jnp.float32)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).replace('in config.json', 'by its metadata')}") from error
    if model.config.depth > len(file.tensors):  # each layer has several
        raise ValueError(
            f"{where} says that it has {model.config.depth} layers, and holds {len(file.tensors)} tensors."
        )
    # All of a config.json, as transformers reads it.
    return family_of(model.config).write(model.config) | ids | {"dtype": dtype, "torch_dtype": dtype}


def _factors(file: GGUFFile) -> np.ndarray | None:
    found = file.tensors.get(FACTORS)
    if found is None:
        return None
    if found.type.name != "F32" or len(found.shape) != 1:
        raise ValueError(
            f"{str(file.path)!r} has a {FACTORS!r} that is {found.type.name} {list(found.shape)}; it is a vector of F32."
        )
    return file.read(FACTORS).view(np.float32)


def _token_ids(file: GGUFFile) -> JsonObject:
    """The special tokens, whose meaning the graph does not compute."""
    if "tokenizer.ggml.tokens" not in file.fields:
        return {}
    found = GGUFTokens.of(file)
    ids = {f"{name}_token_id": found.ids[name] for name in ("bos", "eos", "pad") if name in found.ids}
    return ids | ({"eos_token_id": list(found.stops)} if len(found.stops) > 1 else {})


def _dtype(file: GGUFFile) -> str:
    """Of the checkpoint that this would be: what most of the weights have, float32 where they decode to it."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        name = np.dtype(_DENSE.get(tensor.type.name, np.float32)).name
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__, default="float32")


class GGUFCheckpoint:
    """The tensors of a GGUF model, by their names there and as a checkpoint of its family stores them: rows in transformers'
    order, norms without their offset, GPT-2's kernels as [in, out].

    Raises:
        FileNotFoundError, ValueError: as `GGUFFile` and `config_fields`.
        ImportError: without the package gguf.
    """

    def __init__(self, path: str | os.PathLike):
        self._gguf = import_gguf()
        self.file = GGUFFile(path)
        self.model = model_from_config(config_fields(self.file), dtype=jnp.float32)
        self.paths = self.names(flatten(abstract_params(self.model)))
        """Tree path of the model -> name in the file."""
        self._path_of = {name: path for path, name in self.paths.items()}
        beside = family_of(self.model.config).gguf.beside
        tensors = {name: tensor for name, tensor in self.file.tensors.items() if name not in beside}
        self.shapes = {name: tensor.shape[:: self._step(name)] for name, tensor in tensors.items()}
        """Tensor name -> shape that `read` gives it."""
        self.dtypes = {name: read_as(self._gguf, tensor.type) for name, tensor in tensors.items()}
        """Tensor name -> dtype that `read` gives it, by safetensors' names; the type's own name where it is not read."""

    def names(self, paths: Iterable[str]) -> dict[str, str]:
        """Tree path -> name in the file."""
        return {path: _stored_name(path, self.model) for path in paths}

    @property
    def packed(self) -> list[str]:
        """The types of the tensors that are quantized."""
        return sorted({tensor.type.name for tensor in self.file.tensors.values() if tensor.type.block > 1})

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded, in memory of its own."""
        array = decoded(self._gguf, self.file, name)
        path = self._path_of.get(name, "")
        if path.endswith("/scale"):
            array = array - np.float32(family_of(self.model.config).gguf.scale_offset)
        array = unpermuted(self.model, module_path(path), array)
        return array.T if self._step(name) < 0 else array

    def blocks(self, name: str) -> np.ndarray:
        """One tensor as it is packed, uint8 [out, bytes of a row]: its rows in transformers' order, GPT-2's as they are."""
        return unpermuted(self.model, module_path(self._path_of[name]), self.file.read(name))

    def _step(self, name: str) -> int:
        """-1 where a checkpoint has the axes in the other order: GPT-2's kernels, which llama.cpp has as [out, in]."""
        path = self._path_of.get(name, "")
        return -1 if path.endswith("/kernel") and not is_transposed(path, self.model) else 1


def _stored_name(path: str, model: Model) -> str:
    return f"{tensor_name(module_path(path), model)}.{'bias' if path.endswith('/bias') else 'weight'}"


def read_as(gguf: ModuleType, kind: TensorType) -> str:
    """The dtype that `decoded` gives a tensor of a type, by safetensors' names; the type's own where it is not decoded."""
    if kind.name in _DENSE:
        return kind.name
    try:
        gguf.quants.dequantize(np.zeros((1, kind.size), np.uint8), gguf.GGMLQuantizationType[kind.name])
    except (NotImplementedError, KeyError):
        return kind.name
    return "F32"


def decoded(gguf: ModuleType, file: GGUFFile, name: str) -> np.ndarray:
    """A tensor as floats, in memory of its own: those it is stored as, or float32 of its blocks."""
    tensor, stored = file.tensors[name], file.read(name)
    if tensor.type.name in _DENSE:
        return np.array(stored).view(_DENSE[tensor.type.name]).reshape(tensor.shape)
    return _dequantized(gguf, tensor, stored.reshape(-1, stored.shape[-1]))


def _dequantized(gguf: ModuleType, tensor: StoredTensor, rows: np.ndarray) -> np.ndarray:
    kind, out = gguf.GGMLQuantizationType[tensor.type.name], np.empty((len(rows), tensor.shape[-1]), np.float32)
    step = max(1, _DECODED // tensor.shape[-1])
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore", invalid="ignore"):  # weights that are not finite are found by who reads them
            out[start : start + step] = gguf.quants.dequantize(rows[start : start + step], kind)
    return out.reshape(tensor.shape)
