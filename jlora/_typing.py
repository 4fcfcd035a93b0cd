"""The vocabulary of the signatures: arrays, trees, what is read from files, and what is asked of a tokenizer.

Dimension words: `batch seq d_in d_out rank vocab d_model heads kv_heads head_dim layers`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jax.typing import DTypeLike as DTypeLike
from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Int8 as Int8
from jaxtyping import Key as Key
from jaxtyping import PRNGKeyArray as PRNGKeyArray
from jaxtyping import PyTree as PyTree
from jaxtyping import UInt8 as UInt8
from jaxtyping import UInt32 as UInt32

AnyArray: TypeAlias = Array | np.ndarray
"""Of JAX (a tracer too) or of NumPy: `Float[AnyArray, "batch d_in"]`."""

Params: TypeAlias = Mapping[str, Any]
"""A Flax `params` tree: nested mappings whose leaves are arrays or `Weight` values. Functions of any tree take a `PyTree`."""

Batch: TypeAlias = Mapping[str, Any]
"""`input_ids` and `labels`, int32 [batch, seq]; optional `positions` and `segment_ids` of the same shape."""

DTypeName: TypeAlias = Literal["auto", "bfloat16", "float32", "float16"]
"""As a flag has it; float16 is for a GPU without bfloat16."""

Json: TypeAlias = Any
"""A value as JSON or YAML has it; what it holds is checked by those who read it."""

JsonObject: TypeAlias = dict[str, Json]
"""An object as JSON or YAML has it."""


@runtime_checkable
class Tokenizer(Protocol):
    """What encodes and decodes: a `transformers.PreTrainedTokenizerBase`, fast or slow.

    Here and below by what is asked of it: `import jlora` does not import transformers.
    """

    if TYPE_CHECKING:  # transformers answers for these in `__getattr__`, where `isinstance` does not look (Python 3.12)
        eos_token: str | None

        @property
        def eos_token_id(self) -> int | None: ...
        @property
        def bos_token_id(self) -> int | None: ...
        @property
        def pad_token_id(self) -> int | None: ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Any, **options: Any) -> Any: ...


@runtime_checkable
class NamedTokens(Protocol):
    """What says which tokens mean what: a tokenizer of transformers, or a `SpecialTokens`, read without transformers."""

    if TYPE_CHECKING:

        @property
        def eos_token_id(self) -> int | None: ...
        @property
        def chat_template(self) -> str | Mapping[str, str] | None: ...
        @property
        def special_tokens_map(self) -> Mapping[str, Any]: ...
        @property
        def all_special_tokens(self) -> list[str]: ...

    def convert_tokens_to_ids(self, tokens: Any, /) -> Any: ...

    def get_added_vocab(self) -> dict[str, int]: ...


@runtime_checkable
class PretrainedTokenizer(Tokenizer, NamedTokens, Protocol):
    """A whole tokenizer of transformers."""

    if TYPE_CHECKING:
        bos_token: str | None
        all_special_ids: list[int]

    def __len__(self) -> int: ...

    def add_tokens(self, new_tokens: Any) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def get_chat_template(self, chat_template: str | None = None, tools: list[Any] | None = None) -> str: ...

    def apply_chat_template(self, conversation: Sequence[Any], **options: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...
