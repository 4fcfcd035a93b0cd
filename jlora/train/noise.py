"""NEFTune: noise on the input embeddings in training."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jlora._typing import Array, Bool, DTypeLike, Float, Int, Params, PRNGKeyArray
from jlora.lora import embed, linear
from jlora.models import Model
from jlora.tree.paths import map_with_path
from jlora.weight import Weight, as_dense, cast_to, is_weight
from jlora.weight.node import register_node


@dataclasses.dataclass(frozen=True)
class NoisyEmbedding(Weight):
    """An embedding of any kind whose rows come with noise, of one batch. A tied head goes on using the embedding itself."""

    base: Float[Array, "vocab d_model"] | Weight
    noise: Float[Array, "batch seq d_model"]

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def size(self):
        return self.base.size

    def matmul(self, x, *, transpose: bool, out_dtype: DTypeLike):
        return linear(x, self.base, transpose=transpose, out_dtype=out_dtype)

    def take(self, ids):
        rows = embed(ids, self.base)
        return rows + self.noise.astype(rows.dtype)

    def dense(self, dtype: DTypeLike | None = None):
        return as_dense(self.base, dtype or self.dtype)

    def cast(self, dtype):
        return dataclasses.replace(self, base=cast_to(self.base, dtype))

    def as_head(self):
        base: Any = self.base
        return base.as_head() if is_weight(base) else base


register_node(NoisyEmbedding, ("base", "noise"), ())


def with_noise(
    params: Params, model: Model, lengths: Int[Array, "batch seq"], alpha: float, key: PRNGKeyArray
) -> Params:
    """The parameters with this step's noise on the input embeddings: uniform in +-alpha / sqrt(length * d_model).

    Args:
        lengths: of the sequence that each token is in. transformers takes the width of the padded row for it, the paper and its
            authors' code the sequence's own tokens, as here.

    Reference: Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, 2023, arXiv:2310.05914, algorithm 1.
    """
    config = model.config
    key = jax.random.fold_in(key, zlib.crc32(b"neftune"))  # apart from the keys of dropout, which have names of leaves
    noise = jax.random.uniform(key, (*lengths.shape, config.width), minval=-1.0, maxval=1.0)
    # transformers adds it to what its embedding gives, which for Gemma is scaled.
    size = alpha / jnp.sqrt(jnp.maximum(lengths, 1) * config.width) / config.embedding_scale
    noise = noise * size[..., None]
    return map_with_path(lambda path, w: NoisyEmbedding(w, noise) if path == config.embedding_path else w, params)


def sequence_lengths(
    ids: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    attention_mask: Bool[Array, "batch seq"] | None = None,
) -> Int[Array, "batch seq"]:
    """Tokens of the sequence that each token is in: of its segment, or of its row without the padding."""
    if segment_ids is not None:
        return jnp.sum(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1, dtype=jnp.int32)
    if attention_mask is None:
        return jnp.full(ids.shape, ids.shape[1], jnp.int32)
    return jnp.broadcast_to(jnp.sum(attention_mask, axis=1, keepdims=True, dtype=jnp.int32), ids.shape)
