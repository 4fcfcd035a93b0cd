"""What a checkpoint that is written takes over from the one that it came from."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from jlora._typing import Json
from jlora.files.gguf_read import GGUFCheckpoint
from jlora.files.hf import find, read_config
from jlora.files.names import FLOATS, hf_name
from jlora.files.opened import open_checkpoint
from jlora.models import Model, family_of, model_from_config
from jlora.storage.checkpoint_files import CONFIG
from jlora.storage.stops import GENERATION_CONFIG, generation_config, with_stops

_JAX_NAMES: Mapping[str, str] = dict(zip(FLOATS, ("float64", "float32", "float16", "bfloat16"), strict=True))
_MAY_DIFFER = ("tie_word_embeddings", "vocab_size", "eos_token_id")
"""Fields that a model does not share with its base: `untie` and `grow` change two, `load` puts all stops into the third."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """A base checkpoint: its files, and the dtypes of its tensors."""

    directory: Path
    """Or its GGUF file."""
    fields: Mapping[str, Json]
    """Of config.json."""
    dtypes: Mapping[str, str]
    """Tensor -> dtype, such as "bfloat16", of those that are stored dense; blocks of GGUF decode to float32."""

    @classmethod
    def read(cls, name: str | os.PathLike) -> "Origin":
        """
        Raises:
            FileNotFoundError: when there is no such checkpoint.
            ValueError: when its files are damaged.
        """
        directory = find(name)
        checkpoint, fields = open_checkpoint(directory), read_config(directory)
        stored = checkpoint.dtypes
        if isinstance(checkpoint, GGUFCheckpoint):
            stored = {hf_name(path): stored[name] for path, name in checkpoint.paths.items() if name in stored}
        dense = {tensor: _JAX_NAMES[dtype] for tensor, dtype in stored.items() if dtype in _JAX_NAMES}
        return cls(directory, fields, dense)

    @property
    def dtype(self) -> jnp.dtype:
        """Of its weights as a whole: what config.json says, or what most of the tensors have."""
        said = self.fields.get("dtype") or self.fields.get("torch_dtype")
        if isinstance(said, str) and said.removeprefix("torch.") in _JAX_NAMES.values():
            return jnp.dtype(said.removeprefix("torch."))
        names = list(self.dtypes.values())
        return jnp.dtype(max(names, key=names.count, default="float32"))

    def dtype_of(self, name: str) -> jnp.dtype:
        """Of one tensor; that of the whole where it is packed there, or not there: a head that was tied."""
        # The hub's GPT-2 files lack the prefix.
        stored = self.dtypes.get(name) or self.dtypes.get(name.removeprefix("transformer."))
        return jnp.dtype(stored or self.dtype)

    def config_of(self, model: Model, dtype: str, quantization: Mapping[str, Json] | None) -> bytes:
        """config.json of the model: the bytes that are there, or with the fields changed that are no longer true.

        Raises:
            ValueError: when this is not the checkpoint of the model.
        """
        own = model_from_config({**self.fields}, dtype=model.dtype).config
        before, now = (family_of(config).write(config) for config in (own, model.config))
        changed = {key: value for key, value in now.items() if before.get(key, value) != value}
        foreign = [key for key in changed if key not in _MAY_DIFFER]
        if type(own) is not type(model.config) or foreign:
            raise ValueError(
                f"`base` must be the checkpoint that the model was loaded from; {str(self.directory)!r} has other values of "
                f"{', '.join(foreign) or 'model_type'}. Pass that directory, or leave `base` out."
            )
        fields = dict(self.fields)
        fields |= {key: changed[key] for key in ("tie_word_embeddings", "vocab_size") if key in changed}
        if dtype != str(self.dtype):
            spelled = [key for key in ("dtype", "torch_dtype") if key in fields]
            fields |= dict.fromkeys(spelled or ["dtype", "torch_dtype"], dtype)
        fields.pop("quantization_config", None)
        if quantization is not None:
            fields["quantization_config"] = quantization
        fields.pop("auto_map", None)  # names files of code, which are not copied
        return self._file(CONFIG, self.fields, fields)

    def generation_config_of(self, stops: tuple[int, ...]) -> bytes:
        """generation_config.json with these tokens as the ones that end a generation, its other fields as they are."""
        fields = generation_config(self.directory)
        if fields:
            return self._file(GENERATION_CONFIG, fields, with_stops(fields, stops))
        special = {name: self.fields.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        fields = {f"{name}_token_id": value for name, value in special.items() if value is not None}
        return self._file(GENERATION_CONFIG, {}, with_stops(fields, stops))

    def _file(self, name: str, before: Mapping[str, Json], now: Mapping[str, Json]) -> bytes:
        if before == now and (self.directory / name).is_file():
            return (self.directory / name).read_bytes()
        return (json.dumps(now, indent=2, ensure_ascii=False) + "\n").encode()
