"""The array vocabulary of the signatures.

Dimension words: `batch seq d_in d_out rank vocab d_model heads kv_heads head_dim layers`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Key as Key
from jaxtyping import UInt8 as UInt8

Params: TypeAlias = Mapping[str, Any]
"""A Flax `params` tree: nested mappings whose leaves are arrays or `Weight` values."""

Batch: TypeAlias = Mapping[str, Any]
"""`input_ids` and `labels`, int32 [batch, seq]; optional `positions` and `segment_ids` of the same shape."""
