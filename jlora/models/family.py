"""What the house knows of a family of checkpoints: one row, in `jlora.models.families`."""

import dataclasses
from collections.abc import Mapping

from jlora._typing import Json, JsonObject
from jlora.models.causal import CausalLM
from jlora.models.config import ConfigFormat, ConfigReader, ModelConfig
from jlora.models.gguf import GGUFLayout


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
