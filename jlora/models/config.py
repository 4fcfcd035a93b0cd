"""What every model's configuration says, and reading a Hugging Face `config.json` strictly: a field that would change the
numbers is used or refused, never ignored."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from jlora._typing import Json, JsonObject
from jlora.storage.fields import MAX_SIZE, Kind, either, flag, integer, list_of, positive, shown

MAX_LAYERS = 1024
"""Eight times the deepest model there is."""
MAX_HEADS = 1 << 14
"""Of heads, and of the numbers in one."""
_TOKEN_ID = integer(0, (1 << 31) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Of one model. Field names are those of Hugging Face's `config.json`."""

    model_type: str
    """The family's name."""
    vocab_size: int
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    # Of the graph.
    trunk: ClassVar[str]
    """Node of the tree that holds all but an output head."""
    embedding_path: ClassVar[str]
    depth_field: ClassVar[str]
    transposed_kernels: ClassVar[bool]
    """Whether checkpoints store kernels as [out, in], as torch's Linear does."""
    learned_positions: ClassVar[bool]
    """Whether positions are rows of an embedding, which has none beyond `max_length`."""

    @property
    def depth(self) -> int:
        return getattr(self, self.depth_field)

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Of the residual stream."""

    @property
    @abc.abstractmethod
    def max_length(self) -> int:
        """Tokens that a row may have."""

    @property
    @abc.abstractmethod
    def kv_shape(self) -> tuple[int, int]:
        """(kv_heads, head_dim)"""

    @property
    def embedding_scale(self) -> float:
        """What the rows of the embedding are multiplied by."""
        return 1.0

    @property
    def logit_cap(self) -> float | None:
        """What bounds the logits: they are cap * tanh(logits / cap)."""
        return None


@runtime_checkable
class ConfigFormat(Protocol):
    """A family's config.json, both ways."""

    def read(self, reader: "ConfigReader") -> ModelConfig: ...

    def write(self, config: Json) -> JsonObject: ...


@dataclasses.dataclass(frozen=True)
class ConfigReader:
    """Typed access to the fields of a `config.json`; absent fields have transformers' defaults.

    Every method raises a ValueError that names the field, the value got and what is accepted.
    """

    fields: Mapping[str, Json]

    def _get(self, name: str, default: Json, kind: Kind) -> Json:
        value = self.fields.get(name)
        value = default if value is None else value
        if not kind.holds(value):
            raise ValueError(f"`{name}` in config.json must be {kind.says}; got {shown(value)}.")
        return value

    def integer(self, name: str, default: int, *, least: int = 1, most: int = MAX_SIZE) -> int:
        return self._get(name, default, integer(least, most))

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """None where it is null, which is not the same as absent."""
        if self.fields.get(name, default) is None:
            return None
        return self._get(name, default, integer())

    def divisor(self, name: str, default: int, *, of: int, of_name: str) -> int:
        value = self.integer(name, default, most=of)
        if of % value:
            raise ValueError(f"`{name}` in config.json must divide `{of_name}` = {of}; got {value}.")
        return value

    def number(self, name: str, default: float, *, most: float = 1e30) -> float:
        return float(self._get(name, default, positive(most)))

    def flag(self, name: str, default: bool) -> bool:
        return self._get(name, default, flag())

    def token_id(self, name: str) -> int | None:
        ids = self.token_ids(name)
        return ids[0] if isinstance(ids, tuple) else ids

    def token_ids(self, name: str) -> int | tuple[int, ...] | None:
        """One id, or several as Llama 3 has for end-of-text."""
        if self.fields.get(name) is None:
            return None
        value = self._get(name, None, either(_TOKEN_ID, list_of(_TOKEN_ID, least=1)))
        return tuple(value) if isinstance(value, list) else value

    def require(self, name: str, default: Json, accepted: tuple[Json, ...]) -> None:
        """Refuses a value that the model graph does not compute."""
        value = self.fields.get(name, default)
        if value not in accepted:
            raise ValueError(
                f"config.json has `{name}` = {shown(value)}; jlora's {self.fields.get('model_type')} computes "
                f"{' or '.join(map(repr, accepted))} only, and other outputs would come of ignoring it."
            )

    def each(self, name: str, count: int, accepted: tuple[Json, ...]) -> tuple[Json, ...] | None:
        """A list with an item for each layer; None: absent."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not (isinstance(value, list) and len(value) >= count and all(item in accepted for item in value)):
            raise ValueError(
                f"config.json has `{name}` = {shown(value)}; jlora's {self.fields.get('model_type')} computes "
                f"{' or '.join(map(repr, accepted))} in each of its {count} layers, and other outputs would come of ignoring it."
            )
        return tuple(value[:count])
