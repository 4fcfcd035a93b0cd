"""Sampling: limits, frequencies, ends of rows, lengths of prompts, adapters, and every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import adapted

import jlora
from jlora.generation import advance, begin, truncate
from jlora.models.context import Context, KVCache, attend

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Around the widths to which prompts are padded.
PROMPTS = [list(np.random.default_rng(n).integers(2, 97, n)) for n in (1, 5, 31, 32, 33, 40)]
NEW = 10


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """family -> (module, float32 parameters, transformers model)."""
    return {
        family: (*jlora.load(directory, dtype=jnp.float32), oracle)
        for family, (directory, oracle) in checkpoints.items()
    }


@pytest.fixture(params=["gpt2", "llama"])
def graph(request):
    return request.param


def in_form(params, form):
    return jlora.stack_layers(params) if form == "stacked" else params


both_forms = pytest.mark.parametrize("form", ["per layer", "stacked"])


def greedy(model, params, prompts=PROMPTS, new=NEW, eos=()):
    return jlora.generate(model, params, prompts, max_new_tokens=new, temperature=0, eos_token_id=eos)


def of_transformers(oracle, prompts=PROMPTS, new=NEW, **kwargs):
    rows = []
    for prompt in prompts:
        ids = torch.tensor([list(map(int, prompt))])
        with torch.no_grad():
            out = oracle.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs
            )
        rows.append(out[0, ids.shape[1] :].tolist())
    return rows


def last_logits(model, params, prompt):
    return np.asarray(model.apply({"params": params}, jnp.asarray([prompt]))[0, -1], np.float64)


# Greedy


@pytest.mark.slow
@both_forms
def test_prompts_of_any_length_continue_as_in_transformers(loaded, graph, form):
    model, params, oracle = loaded[graph]
    expected = of_transformers(oracle, eos_token_id=-1)
    assert greedy(model, in_form(params, form)) == expected
    assert all(len(row) == NEW for row in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("gpt2", "stacked"), ("llama", "per layer")])
def test_an_adapter_generates_what_its_merged_weights_do(loaded, family, form):
    model, params, _ = loaded[family]
    params = adapted(in_form(params, form), jlora.LoraConfig(rank=3))
    out = greedy(model, params)
    assert out == greedy(model, jlora.merge(params))
    assert out != greedy(model, jlora.remove_lora(params))


@pytest.mark.slow
@pytest.mark.parametrize("length", [40, 63])
def test_the_last_position_of_the_model_is_used(loaded, length):
    """GPT-2 has 64 learned positions; the padded prompt and the new tokens together have more."""
    model, params, oracle = loaded["gpt2"]
    prompt = [int(i) for i in np.random.default_rng(length).integers(2, 97, length)]
    new = 64 - length
    out = greedy(model, params, [prompt], new)
    assert out == of_transformers(oracle, [prompt], new, eos_token_id=-1)
    assert len(out[0]) == new


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_prompts_may_be_an_array(loaded, kind):
    model, params, _ = loaded["gpt2"]
    rows = [[3, 4, 5], [6, 7, 8]]
    assert greedy(model, params, kind(rows)) == greedy(model, params, rows)


# The end of a row


@pytest.mark.few(1)
def test_a_row_ends_at_its_first_end_of_text_as_in_transformers(loaded, graph):
    model, params, oracle = loaded[graph]
    free = greedy(model, params)
    ids = [free[0][2], free[3][4], free[5][0]]
    out = greedy(model, params, eos=ids)
    assert out == of_transformers(oracle, eos_token_id=[int(i) for i in ids])
    for row, unstopped in zip(out, free, strict=True):
        ends = [i for i, token in enumerate(unstopped) if token in ids]
        assert row == (unstopped[: ends[0] + 1] if ends else unstopped)
    assert {len(row) for row in out} - {NEW}, "some row must end early"


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_the_models_own_end_of_text_is_the_default(loaded, several):
    model, params, _ = loaded["llama"]
    free = greedy(model, params)
    stop = free[0][3]
    own = model.clone(config=dataclasses.replace(model.config, eos_token_id=(96, stop) if several else stop))
    (out, *_), expected = greedy(own, params, eos=None), free[0][: free[0].index(stop) + 1]
    assert out == expected


# Randomness


@pytest.mark.few(1)
def test_the_same_key_gives_the_same_and_another_key_another(loaded, graph):
    model, params, _ = loaded[graph]
    runs = [jlora.generate(model, params, PROMPTS, max_new_tokens=NEW, key=jax.random.key(k)) for k in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_the_form_does_not_change_the_sample(loaded):
    model, params, _ = loaded["llama"]
    runs = [
        jlora.generate(model, in_form(params, form), PROMPTS, max_new_tokens=NEW, key=jax.random.key(3))
        for form in ("per layer", "stacked")
    ]
    assert runs[0] == runs[1]


def test_a_row_depends_on_its_prompt_key_and_index_alone(loaded, graph):
    model, params, _ = loaded[graph]
    kwargs = {"max_new_tokens": NEW, "key": jax.random.key(5), "temperature": 1.0, "eos_token_id": []}
    together = jlora.generate(model, params, PROMPTS, **kwargs)
    others = [[9, 9], PROMPTS[1], [8] * 20, PROMPTS[3], [7], [6] * 35]
    again = jlora.generate(model, params, others, **kwargs)
    assert again[1] == together[1] and again[3] == together[3]
    same = jlora.generate(model, params, [PROMPTS[5]] * 6, **kwargs)
    assert same[5] == together[5]
    assert len({tuple(row) for row in same}) == 6, "rows draw their own numbers"


@pytest.mark.parametrize(
    "limit",
    [{"top_k": 1, "temperature": 5.0}, {"top_p": 1e-6, "temperature": 0.5, "top_k": 0}, {"temperature": 1e-4}],
)
def test_limits_of_the_sampling_parameters_are_greedy(loaded, graph, limit):
    model, params, _ = loaded[graph]
    out = jlora.generate(model, params, PROMPTS, max_new_tokens=NEW, key=jax.random.key(0), eos_token_id=[], **limit)
    assert out == greedy(model, params)


ROWS = 1500
DRAWS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 2.0, "top_k": 6, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 0, "top_p": 0.7},
    {"temperature": 3.0, "top_k": 12, "top_p": 0.8},
]


def probabilities(logits, *, temperature, top_k, top_p):
    """Of each token, in float64, by transformers' definition."""
    order = np.argsort(-logits)
    kept = order[: top_k or len(logits)]
    weights = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    weights /= weights.sum()
    count = int(np.sum(np.cumsum(weights) - weights < top_p))
    out = np.zeros(len(logits))
    out[kept[:count]] = weights[:count] / weights[:count].sum()
    return out


def p_value(counts, expected):
    """Of a chi-square test; rare tokens are taken together."""
    common = expected * counts.sum() >= 5
    pooled = [np.append(x[common], x[~common].sum()) for x in (counts, expected * counts.sum())]
    pooled = [x[:-1] if pooled[1][-1] < 1e-9 else x for x in pooled]
    return scipy.stats.chisquare(*pooled).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWS)
def test_tokens_come_as_often_as_they_should(loaded, draw):
    model, params, _ = loaded["gpt2"]
    prompt = [11, 12, 13]
    out = jlora.generate(model, params, [prompt] * ROWS, max_new_tokens=1, key=jax.random.key(2), **draw)
    counts = np.bincount([row[0] for row in out], minlength=97)
    logits = last_logits(model, params, prompt)
    expected = probabilities(logits, **draw)
    assert not counts[expected == 0].any()
    assert p_value(counts, expected) > 0.01
    # The test has the power to see another temperature.
    other = probabilities(logits, **(draw | {"temperature": draw["temperature"] * 2}))
    assert p_value(counts, np.where(expected > 0, other, 0) / other[expected > 0].sum()) < 1e-3


# Truncation


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.floats(0.01, 1.0), st.sampled_from([0.5, 1.0, 4.0]))
def test_truncation_is_transformers(seed, top_k, top_p, scale):
    logits = np.random.default_rng(seed).normal(size=(3, 50)).astype(np.float32) * scale
    warped = torch.tensor(logits)
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        # A token whose predecessors reach top_p but for rounding may fall on either side.
        edges = np.cumsum(torch.sort(warped.double().softmax(-1), descending=True).values.numpy(), axis=-1)
        if np.abs(edges - top_p).min() < 1e-6:
            return
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    np.testing.assert_array_equal(truncate(jnp.asarray(logits), top_k=top_k or 50, top_p=top_p), warped.numpy())


@pytest.mark.parametrize("vocab", [97, 5000, 50257])
def test_top_p_of_one_keeps_every_token(vocab):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, vocab)).astype(np.float32) * 10)
    np.testing.assert_array_equal(truncate(logits, top_k=vocab, top_p=1.0), logits)
    np.testing.assert_array_equal(truncate(logits, top_k=vocab + 5, top_p=1.0), logits)


def test_equal_logits_are_kept_together():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0]])
    np.testing.assert_array_equal(truncate(logits, top_k=1, top_p=1.0), [[-np.inf, 3.0, 3.0, -np.inf]])


# Compilation


@pytest.mark.slow
def test_calls_of_like_shape_share_a_compilation(loaded, checkpoints):
    model, params, _ = loaded["gpt2"]
    kwargs = {"max_new_tokens": 3}
    jlora.generate(model, params, [[1, 2], [3]], key=jax.random.key(0), **kwargs)
    before = begin._cache_size(), advance._cache_size()
    for i, sampling in enumerate(({"temperature": 0.1}, {"top_k": 0}, {"top_p": 1.0}, {"top_k": 3, "top_p": 0.2})):
        jlora.generate(
            model, params, [[4] * (3 + i), [5] * 9], key=jax.random.key(i), eos_token_id=i, **sampling, **kwargs
        )
    again, params_again = jlora.load(checkpoints["gpt2"][0], dtype=jnp.float32)
    jlora.generate(again, params_again, [[4], [5]], key=jax.random.key(9), **kwargs)
    assert (begin._cache_size(), advance._cache_size()) == before
    jlora.generate(model, params, [[4] * 33, [5]], key=jax.random.key(0), **kwargs)
    assert (begin._cache_size(), advance._cache_size()) == (before[0] + 1, before[1])


# Refusals

REFUSED = [
    ({"temperature": -0.5}, ["`temperature` must be 0 (greedy) or positive", "got -0.5"]),
    ({"temperature": float("nan")}, ["`temperature`", "got nan"]),
    ({"temperature": float("inf")}, ["`temperature`", "got inf"]),
    ({"temperature": 0.8, "key": None}, ["needs a key", "key=jax.random.key(0)", "temperature=0"]),
    ({"top_k": -1}, ["`top_k` must be 0 (all) or more", "top_k=-1"]),
    ({"top_p": 0.0}, ["`top_p` in (0, 1]", "top_p=0.0"]),
    ({"top_p": 1.5}, ["`top_p` in (0, 1]", "top_p=1.5"]),
    ({"top_p": float("nan")}, ["`top_p`", "top_p=nan"]),
    ({"max_new_tokens": 0}, ["`max_new_tokens` must be at least 1", "got 0"]),
    ({"max_new_tokens": 62}, ["64 positions", "a prompt of 3 tokens", "max_new_tokens=62", "at most 61"]),
    ({"prompt_ids": [[5] * 70]}, ["64 positions", "a prompt of 70 tokens", "at most 0"]),
    ({"prompt_ids": []}, ["Every prompt needs at least one token", "begin-of-text"]),
    ({"prompt_ids": [[1], []]}, ["Every prompt needs at least one token"]),
    ({"prompt_ids": [[1, 97]]}, ["0..96", "got 97", "tokenizer"]),
    ({"prompt_ids": [[1], [-1]]}, ["0..96", "got -1"]),
    ({"prompt_ids": [1, 2, 3]}, ["`prompt_ids` must be a list of prompts", "put one prompt into a list"]),
    ({"prompt_ids": np.array([1, 2, 3])}, ["`prompt_ids` must be a list of prompts"]),
]


@pytest.mark.parametrize(("change", "parts"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_a_refusal_says_what_and_why(loaded, change, parts):
    model, params, _ = loaded["gpt2"]
    kwargs = {"prompt_ids": [[1, 2, 3]], "max_new_tokens": 4, "key": jax.random.key(0)} | change
    with pytest.raises(ValueError) as error:
        jlora.generate(model, params, **kwargs)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_is_written_into_its_cache_in_place(rows):
    """No step copies what is kept."""
    length = 4096
    cache = KVCache(*(jnp.zeros((rows, 2, length, 16)) for _ in range(2)))
    new, positions = jnp.ones((rows, 1, 2, 16)), jnp.full((rows, 1), 7)

    def step(q, k, v, positions, cache):
        return attend(q, k, v, Context(positions, positions, jnp.arange(length) <= positions[..., None]), cache)

    program = jax.jit(step, donate_argnums=4).lower(new, new, 2 * new, positions, cache).compile()
    assert program.memory_analysis().temp_size_in_bytes < cache.k.nbytes / 2
    _, (k, v) = program(new, new, 2 * new, positions, cache)
    assert k[:, :, 7].min() == 1 and v[:, :, 7].min() == 2 and k.sum() == rows * 2 * 16
