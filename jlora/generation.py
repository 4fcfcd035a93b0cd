"""Sampling with a KV cache, in one compiled loop."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from jlora._numbers import NotFinite
from jlora._typing import AnyArray, Array, Float, Int, Params, PRNGKeyArray
from jlora.lora import is_stacked
from jlora.models import Model, empty_cache
from jlora.storage.stops import stop_ids, token_ids


class Sampling(NamedTuple):
    """How to sample where nothing is said."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95


SAMPLING = Sampling()

_LEAST_TEMPERATURE = 1e-6
"""Below it logits would overflow float32."""
_BUCKET = 32
"""Prompts are padded to a multiple of this, so that prompts of similar length share a compilation."""


def generate(
    model: Model,
    params: Params,
    prompt_ids: Sequence[Sequence[SupportsIndex]] | Int[AnyArray, "batch seq"],
    *,
    max_new_tokens: int = SAMPLING.max_new_tokens,
    temperature: float = SAMPLING.temperature,
    top_k: int = SAMPLING.top_k,
    top_p: float = SAMPLING.top_p,
    key: PRNGKeyArray | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues prompts of any lengths.

    A row's continuation depends on its prompt, the key and its index alone, not on what else is in the batch.

    Args:
        model: a module of `jlora.models`.
        params: per-layer or stacked, adapted or not.
        prompt_ids: lists of token ids, or int32 [batch, seq] without padding.
        max_new_tokens: at most this many new tokens a row.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: sample among the k most likely tokens; 0: all.
        top_p: then among the most likely ones that together reach this probability, in (0, 1].
        key: required unless `temperature` is 0.
        eos_token_id: one id or several that end a row; [] for none; None: the model's own, all that its checkpoint names.

    Returns:
        The new tokens of each row, up to and including end-of-text.

    Raises:
        ValueError: for an argument out of its range, an empty prompt, an id outside the vocabulary, or more positions
            than the model has; when logits are not finite, with the weight that is not.
    """
    rows = np.asarray(prompt_ids) if hasattr(prompt_ids, "shape") else list(prompt_ids)
    if any(np.ndim(row) != 1 for row in rows):
        raise ValueError(
            "`prompt_ids` must be a list of prompts, each a list of token ids; put one prompt into a list."
        )
    prompts = [list(map(int, row)) for row in rows]
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key)
    eos = _stops(model, eos_token_id)

    lengths = np.array([len(p) for p in prompts])
    width = -(-int(lengths.max()) // _BUCKET) * _BUCKET
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens, counts, sound = _generate(
        model,
        params,
        padded,
        lengths.astype(np.int32),
        jax.random.key(0) if key is None else key,
        np.float32(temperature),
        np.int32(min(top_k or model.config.vocab_size, model.config.vocab_size)),
        np.maximum(np.float32(top_p), np.finfo(np.float32).tiny),
        np.array(eos or [-1], np.int32),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
    )
    if not sound:
        raise NotFinite("The logits are", math.nan, params)
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(counts), strict=True)]


def _stops(model: Model, eos_token_id: int | Sequence[int] | None) -> Sequence[int]:
    """The ids that end a row; of the model's own, those of its vocabulary."""
    vocab_size = model.config.vocab_size
    if eos_token_id is None:
        return stop_ids(token_ids(model.config.eos_token_id, where="the model's config"), vocab_size=vocab_size)
    ids: Sequence[int] = [eos_token_id] if np.ndim(eos_token_id) == 0 else list(eos_token_id)  # pyright: ignore
    for i in ids:
        if not isinstance(i, int | np.integer) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise ValueError(
                f"`eos_token_id` must be token ids in 0..{vocab_size - 1}; got {i!r}. Pass [] to go on to `max_new_tokens`."
            )
    return [int(i) for i in ids]


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key) -> None:
    config = model.config
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"`{name}` must be an integer; got {value!r}.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1; got {max_new_tokens}.")
    if not (temperature == 0 or _LEAST_TEMPERATURE <= temperature < math.inf):
        raise ValueError(
            f"`temperature` must be 0 (greedy) or positive, at least {_LEAST_TEMPERATURE}; got {temperature}."
        )
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"`top_k` must be 0 (all) or more and `top_p` in (0, 1]; got top_k={top_k}, top_p={top_p}.")
    if key is None and temperature > 0:
        raise ValueError(
            "`generate` samples at temperature > 0 and needs a key: pass `key=jax.random.key(0)` or `temperature=0`."
        )
    if not prompts or not all(prompts):
        raise ValueError(
            "Every prompt needs at least one token; start an empty one with the end-of-text or begin-of-text id."
        )
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"The model has {config.max_length} positions; got a prompt of {longest} tokens and max_new_tokens={max_new_tokens}. "
            f"Shorten the prompt or ask for at most {max(config.max_length - longest, 0)}."
        )
    for prompt in prompts:
        bad = [i for i in prompt if not 0 <= i < config.vocab_size]
        if bad:
            raise ValueError(
                f"Token ids must be in 0..{config.vocab_size - 1}; got {bad[0]}. Is this the model's own tokenizer?"
            )


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "greedy"))
def _generate(
    model: Model, params: Params, prompts, lengths, key, temperature, top_k, top_p, eos, *, max_new_tokens, greedy
):
    """(tokens [batch, max_new_tokens], how many of each row count, whether all logits were finite)."""
    batch, width = prompts.shape
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def pick(hidden, step):
        logits = model.logits(params, hidden)
        finite = jnp.all(jnp.isfinite(logits))
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), finite
        logits = truncate(logits / temperature, top_k=top_k, top_p=top_p)
        at_step = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        return jax.vmap(jax.random.categorical)(at_step, logits).astype(jnp.int32), finite

    # A token's cache slot is its position, and a query sees slots up to its own: what prompt padding wrote behind a
    # short row is overwritten before it can be seen.
    cache = empty_cache(model, batch, width + max_new_tokens, stacked=is_stacked(params))
    hidden, cache = model.apply({"params": params}, prompts, cache=cache, head=False)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token, sound = pick(last, 0)
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    ended = jnp.isin(token, eos)

    def more(carry):
        step, _, ended, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def extend(carry):
        step, token, ended, counts, sound, out, cache = carry
        positions = (lengths + step - 1)[:, None]
        hidden, cache = model.apply({"params": params}, token[:, None], positions=positions, cache=cache, head=False)
        token, finite = pick(hidden[:, 0], step)
        out = out.at[:, step].set(token)
        return step + 1, token, ended | jnp.isin(token, eos), counts + ~ended, sound & finite, out, cache

    carry = (jnp.int32(1), token, ended, jnp.ones(batch, jnp.int32), sound, out, cache)
    _, _, _, counts, sound, out, _ = jax.lax.while_loop(more, extend, carry)
    return out, counts, sound


def truncate(
    logits: Float[Array, "batch vocab"], *, top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "batch vocab"]:
    """Logits with all but the `top_k` likeliest tokens, and of those all beyond probability `top_p`, at -inf.

    Reference: nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751; the order of the two is transformers'.
    """
    ranked = -jnp.sort(-logits, axis=-1)
    among_k = jnp.arange(logits.shape[-1]) < top_k
    probabilities = jax.nn.softmax(jnp.where(among_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding carries `before` to 1 in the tail, which top_p = 1 is to keep.
    kept = among_k & ((before < top_p) | (top_p >= 1.0))
    floor = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, -jnp.inf)
