"""`generate` and `stream`."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from jlora._numbers import NotFinite
from jlora._typing import AnyArray, Int, Params, PRNGKeyArray, PyTree
from jlora.generation import decoding
from jlora.generation.decoding import Past, State
from jlora.generation.form import for_decoding
from jlora.generation.sampling import SAMPLING, Draw
from jlora.lora import is_stacked
from jlora.models import Model
from jlora.storage.stops import stop_ids, token_ids

_LEAST_TEMPERATURE = 1e-6
"""Below it logits would overflow float32."""


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
    job = prepared(model, params, prompt_ids, max_new_tokens, temperature, top_k, top_p, key, eos_token_id)
    state = job.advance(job.begin(None), max_new_tokens)
    if not state.sound:
        raise NotFinite("The logits are", math.nan, params)
    return [row[:n].tolist() for row, n in zip(np.asarray(state.out), np.asarray(state.counts), strict=True)]


def stream(
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
    past: Past | None = None,
) -> Iterator[list[int | None]]:
    """`generate`, token by token: the same tokens, by the same compiled programs.

    Args:
        past: of the same model and parameters; what the one prompt begins with and is there is not computed again, and what
            is computed is left there for the next call. (Arithmetic in other shapes rounds otherwise, by float32's last bits.)

    Yields:
        The next token of each row; None for one that has ended. The last tokens are those that end the last rows, or the
        `max_new_tokens`-th.

    Raises:
        ValueError: as `generate`, and for a `past` with several prompts. Wrong arguments are refused at once, logits that
            are not finite when they come.
    """
    job = prepared(model, params, prompt_ids, max_new_tokens, temperature, top_k, top_p, key, eos_token_id)
    if past is not None and len(job.prompts) > 1:
        raise ValueError(f"`past` is of one row; got {len(job.prompts)} prompts. Stream them one by one.")
    return _tokens(job, max_new_tokens, past)


class _Job(NamedTuple):
    """A generation, ready to run."""

    model: Model
    params: PyTree
    prompts: list[list[int]]
    draw: Draw
    capacity: int

    def begin(self, past: Past | None) -> State:
        """With the first token drawn. Takes the cache of `past` away."""
        start, cache, capacity = 0, None, self.capacity
        if past is not None and past.cache is not None:
            start, cache, past.cache = past.shared(self.prompts[0]), past.cache, None
            capacity = max(capacity, decoding.capacity_in(cache))
            if capacity > decoding.capacity_in(cache):
                cache = decoding.grown(cache, capacity)
        if cache is None:
            cache = decoding.new_cache(self.model, len(self.prompts), capacity, is_stacked(self.params))
        lengths = np.array([len(p) for p in self.prompts], np.int32)
        padded = np.zeros((len(self.prompts), decoding.width_of(int(lengths.max()) - start, capacity)), np.int32)
        for row, prompt in zip(padded, self.prompts, strict=True):
            row[: len(prompt) - start] = prompt[start:]
        return decoding.begin(self.model, self.params, padded, np.int32(start), lengths, cache, self.draw)

    def advance(self, state: State, limit: int) -> State:
        return decoding.advance(self.model, self.params, state, self.draw, np.int32(limit))


def _tokens(job: _Job, max_new_tokens: int, past: Past | None) -> Iterator[list[int | None]]:
    state, written = None, []
    try:
        state, running = job.begin(past), [True] * len(job.prompts)
        for step in range(1, max_new_tokens + 1):
            tokens, ended = np.asarray(state.token).tolist(), np.asarray(state.ended).tolist()
            if not state.sound:
                raise NotFinite("The logits are", math.nan, job.params)
            yield [token if runs else None for token, runs in zip(tokens, running, strict=True)]
            running = [not over for over in ended]
            if not any(running) or step == max_new_tokens:
                return
            state = job.advance(state, step + 1)
            written.append(tokens[0])
    finally:
        if past is not None and state is not None:
            past.ids, past.cache = [*job.prompts[0], *written], state.cache


def prepared(model, params, prompt_ids, max_new_tokens, temperature, top_k, top_p, key, eos_token_id) -> _Job:
    """The job of arguments that are as they must be, the parameters in the form for decoding."""
    rows = np.asarray(prompt_ids) if hasattr(prompt_ids, "shape") else list(prompt_ids)
    if any(np.ndim(row) != 1 for row in rows):
        raise ValueError(
            "`prompt_ids` must be a list of prompts, each a list of token ids; put one prompt into a list."
        )
    prompts = [list(map(int, row)) for row in rows]
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key)
    draw = Draw.of(
        key=key, temperature=temperature, top_k=top_k, top_p=top_p,
        stops=_stops(model, eos_token_id), vocab_size=model.config.vocab_size,
    )  # fmt: skip
    capacity = decoding.capacity_of(model, max(map(len, prompts)) + max_new_tokens)
    return _Job(*for_decoding(model, params, batch=len(prompts)), prompts, draw, capacity)


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


def check_sampling(*, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """
    Raises:
        ValueError: for an argument out of its range.
    """
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


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key) -> None:
    config = model.config
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
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
