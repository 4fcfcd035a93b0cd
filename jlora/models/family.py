"""What the house knows of a family of checkpoints: one row, in `jlora.models.families`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jlora._typing import Json, JsonObject
from jlora.models.causal import CausalLM
from jlora.models.config import ConfigFormat, ConfigReader, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFLayout:
    """How llama.cpp has a family. The names of its tensors are those of the package gguf, by architecture."""

    architecture: str
    """`general.architecture`."""
    fields: Callable[[Any], JsonObject]
    """The model's config -> its hyperparameters, without the architecture before their names."""
    rotates_pairs: bool = False
    """Whether llama.cpp rotates neighbours where the checkpoints rotate halves, so that rows of queries and keys are permuted."""
    scale_offset: float = 0.0
    """Is added to the scales of norms."""
    tensors: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    """The model's config -> tensors that are no parameters."""
    lacks: Callable[[Any], Iterable[str]] = lambda config: ()
    """The model's config -> what of it llama.cpp does not compute, each as "`field` = value"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row: everything in which a family differs from the others."""

    architecture: str
    """transformers' class."""
    tokenizer: str | None
    """transformers' class of tokenizers, where a checkpoint names none; None: it always does."""
    module: type[CausalLM]
    fields: ConfigFormat
    gguf: GGUFLayout

    def read(self, fields: Mapping[str, Json]) -> ModelConfig:
        """The config of the fields of a config.json.

        Raises:
            ValueError: for a field that the graph does not compute.
        """
        return self.fields.read(ConfigReader(fields))

    def write(self, config: ModelConfig) -> JsonObject:
        """The fields of a config.json."""
        # Said because transformers has an id of the family's own vocabulary where it is absent, and refuses one that is too large.
        return {**self.fields.write(config), "architectures": [self.architecture], "pad_token_id": None}
