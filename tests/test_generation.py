"""Sampling against transformers' and against the uncached model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora.generation import Past, advance, begin, decoding, for_decoding, form, truncate

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], list(range(20, 40))]
NEW = 12


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return {
        family: (*jlora.load(directory, dtype=jnp.float32), oracle)
        for family, (directory, oracle) in checkpoints.items()
    }


@pytest.mark.few(1)
def test_greedy_is_transformers_greedy(loaded, family):
    model, params, oracle = loaded[family]
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            out = oracle.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        expected.append(out[0, len(prompt) :].tolist())
    assert jlora.generate(model, params, PROMPTS, max_new_tokens=NEW, temperature=0) == expected
    assert jlora.generate(model, jlora.stack_layers(params), PROMPTS, max_new_tokens=NEW, temperature=0) == expected


@pytest.mark.slow
@pytest.mark.few(1)
def test_adapted_greedy_is_the_uncached_argmax(loaded, family):
    model, params, _ = loaded[family]
    adapted = jlora.add_lora(params, jlora.LoraConfig(rank=4), key=jax.random.key(0))
    adapter, base = jlora.split(adapted)
    adapted = jlora.combine(jax.tree.map(lambda x: x + 0.05, adapter), base)
    (out,) = jlora.generate(model, adapted, PROMPTS[:1], max_new_tokens=6, temperature=0, eos_token_id=[])
    row = list(PROMPTS[0])
    for token in out:
        logits = model.apply({"params": adapted}, jnp.asarray([row]))
        assert int(jnp.argmax(logits[0, -1])) == token
        row.append(token)
    (of_base,) = jlora.generate(model, params, PROMPTS[:1], max_new_tokens=6, temperature=0, eos_token_id=[])
    assert out != of_base


@pytest.mark.slow
def test_end_of_text_is_included_and_ends_the_row(loaded):
    model, params, _ = loaded["llama"]
    (free,) = jlora.generate(model, params, PROMPTS[:1], max_new_tokens=NEW, temperature=0, eos_token_id=[])
    assert len(free) == NEW
    stop = free[3]
    ended = jlora.generate(model, params, PROMPTS, max_new_tokens=NEW, temperature=0, eos_token_id=[stop, 96])
    assert ended[0] == free[: free.index(stop) + 1]


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(loaded):
    model, params, _ = loaded["gpt2"]
    kwargs = {"max_new_tokens": NEW, "key": jax.random.key(7)}
    together = jlora.generate(model, params, PROMPTS, **kwargs)
    assert jlora.generate(model, params, PROMPTS[:2], **kwargs) == together[:2]
    assert jlora.generate(model, params, PROMPTS, max_new_tokens=NEW, key=jax.random.key(8)) != together
    assert jlora.generate(model, params, np.array(PROMPTS[:1]), **kwargs) == together[:1]


def test_truncation_is_transformers(loaded):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    for k, p in ((5, 1.0), (0, 0.7), (20, 0.9), (1, 0.5)):
        warped = torch.tensor(logits)
        if k:
            warped = transformers.TopKLogitsWarper(k)(None, warped)
        if p < 1:
            warped = transformers.TopPLogitsWarper(p)(None, warped)
        np.testing.assert_array_equal(
            np.isfinite(truncate(jnp.asarray(logits), top_k=k or 50, top_p=p)), np.isfinite(warped)
        )


def test_each_row_is_truncated_in_its_own_way():
    """Of a vocabulary beyond those that are ranked by the few, to the bit as by itself."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 300)).astype(np.float32) * 3)
    ways = [(5, 1.0), (300, 0.7), (300, 1.0), (200, 0.9), (1, 0.5)]
    k, p = np.array([[k] for k, _ in ways], np.int32), np.array([[p] for _, p in ways], np.float32)
    together = truncate(logits, top_k=jnp.asarray(k), top_p=jnp.asarray(p))
    for i, (k, p) in enumerate(ways):
        np.testing.assert_array_equal(together[i : i + 1], truncate(logits[i : i + 1], top_k=k, top_p=p))
        assert 1 <= np.isfinite(together[i]).sum() <= k


def compiled():
    return begin._cache_size(), advance._cache_size()


@pytest.mark.slow
def test_neither_sampling_nor_lengths_compile_anew(loaded):
    model, params, _ = loaded["qwen2"]
    jlora.generate(model, params, PROMPTS, max_new_tokens=4, key=jax.random.key(0))
    before = compiled()
    other = {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "eos_token_id": [5, 6, 7], "key": jax.random.key(1)}
    jlora.generate(model, params, PROMPTS, max_new_tokens=4, **other)
    jlora.generate(model, params, [[5], [6] * 32, [7] * 9], max_new_tokens=31, temperature=0)
    list(jlora.stream(model, params, [[5], [6] * 30, [7] * 9], max_new_tokens=9, **other))
    assert compiled() == before


@pytest.mark.few(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_has_the_tokens_of_generate(loaded, family, temperature):
    model, params, _ = loaded[family]
    options = {"max_new_tokens": NEW, "temperature": temperature, "key": jax.random.key(3)}
    free = jlora.generate(model, params, PROMPTS, eos_token_id=[], **options)
    stops = [free[0][4], free[1][7]]
    expected = jlora.generate(model, params, PROMPTS, eos_token_id=stops, **options)
    steps = list(jlora.stream(model, params, PROMPTS, eos_token_id=stops, **options))
    assert [[token for token in row if token is not None] for row in zip(*steps, strict=True)] == expected
    assert len(steps) == max(map(len, expected)) and None in steps[-1]
    assert expected == [row[: next((i + 1 for i, t in enumerate(row) if t in stops), NEW)] for row in free]


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["per layer", "stacked"])
def test_a_prompt_goes_on_from_the_past(loaded, form):
    model, params, _ = loaded["llama"]
    params = jlora.stack_layers(params) if form == "stacked" else params
    past, options = Past(), {"max_new_tokens": 6, "temperature": 0, "eos_token_id": []}
    prompt = PROMPTS[0]
    for said, stop in ((PROMPTS[1], 6), ([8, 9], 2), (list(range(20)), 6), ([], 6)):
        expected = jlora.generate(model, params, [prompt], **options)[0][:stop]
        got = [t for (t,) in itertools.islice(jlora.stream(model, params, [prompt], past=past, **options), stop)]
        assert got == expected
        assert past.ids == [*prompt, *got[:-1]]
        prompt = [*prompt, *got, *said]
    before = past.ids
    other = [*PROMPTS[0], 1, 2]  # begins like it, and goes on otherwise
    assert past.shared(other) == len(PROMPTS[0]) and past.shared(before) == len(before) - 1
    got = [t for (t,) in jlora.stream(model, params, [other], past=past, **options)]
    assert got == jlora.generate(model, params, [other], **options)[0]


@pytest.mark.slow
def test_a_past_grows(loaded, monkeypatch):
    """As when a conversation outgrows the cache."""
    monkeypatch.setattr(decoding, "_LEAST_CAPACITY", 16)
    model, params, _ = loaded["gpt2"]
    past, options = Past(), {"max_new_tokens": 5, "temperature": 0, "eos_token_id": []}
    prompt, sizes = PROMPTS[0], []
    for _ in range(4):
        got = [t for (t,) in jlora.stream(model, params, [prompt], past=past, **options)]
        assert got == jlora.generate(model, params, [prompt], **options)[0]
        sizes.append(decoding.capacity_in(past.cache))
        prompt = [*prompt, *got, 4, 5, 6]
    assert sizes == [16, 16, 32, 32]


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("spec", [None, jlora.NF4(), jlora.Int8()], ids=repr)
@pytest.mark.parametrize("stack", [False, True], ids=["per layer", "stack"])
def test_the_form_for_decoding_computes_the_same(checkpoints, monkeypatch, stack, spec, native, dtype):
    """Layers are apart; on CPU packed kernels are decoded once, and bfloat16 stays for several rows where the CPU has it."""
    monkeypatch.setattr(form, "multiplies_bfloat16", lambda: native)
    model, params = jlora.load(checkpoints["llama"][0], dtype=dtype, quantize=spec)
    params = jlora.add_lora(params, jlora.LoraConfig(rank=2), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    params = jlora.combine(jax.tree.map(lambda x: x + 0.05, adapter), base)
    params = jlora.stack_layers(params) if stack else params
    ids = jnp.asarray([PROMPTS[2]])
    exact = jlora.models.replace(model, dtype=jnp.float32)
    expected = exact.apply({"params": params}, ids)
    for batch in (1, 2):
        fast, formed = for_decoding(model, params, batch=batch)
        stays = dtype == jnp.bfloat16 and native and batch > 1
        assert fast.dtype == (jnp.bfloat16 if stays else jnp.float32)
        again = jax.tree.leaves(for_decoding(fast, formed, batch=batch)[1])
        assert all(a is b for a, b in zip(jax.tree.leaves(formed), again, strict=True)), "nothing is copied twice"
        assert not any(leaf.dtype == jnp.uint8 for leaf in again), "nothing is packed"
        assert not jlora.lora.is_stacked(formed)
        got = fast.apply({"params": formed}, ids)
        if stays:  # its rounding errors are others, and no greater
            plain = model.apply({"params": params}, ids)
            assert np.abs(got - expected).mean() < 1.5 * np.abs(plain - expected).mean() + 1e-3
        else:
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_does_not_fit_is_decoded_as_it_is(loaded, monkeypatch):
    model, params, _ = loaded["llama"]
    packed = jlora.quantize_params(params, jlora.NF4())
    monkeypatch.setattr(form, "_free_bytes", lambda: 0.0)
    with pytest.warns(UserWarning, match="Decoding without a copy of the kernels in float32"):
        assert for_decoding(model, packed)[1] is packed


def test_arguments_of_a_stream_are_looked_at_before_it_starts(loaded):
    model, params, _ = loaded["llama"]
    with pytest.raises(ValueError, match="needs a key"):
        jlora.stream(model, params, PROMPTS)
    with pytest.raises(ValueError, match="one row; got 3"):
        jlora.stream(model, params, PROMPTS, temperature=0, past=Past())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs a key"),
        ({"temperature": -1}, "`temperature`"),
        ({"temperature": 0, "top_p": 0}, "`top_p`"),
        ({"temperature": 0, "max_new_tokens": 0}, "`max_new_tokens`"),
        ({"temperature": 0, "max_new_tokens": 60}, "64 positions"),
        ({"temperature": 0, "prompt_ids": [[]]}, "at least one token"),
        ({"temperature": 0, "prompt_ids": [[97]]}, "0..96; got 97"),
    ],
)
def test_errors(loaded, kwargs, message):
    model, params, _ = loaded["gpt2"]
    prompts = kwargs.pop("prompt_ids", PROMPTS)
    with pytest.raises(ValueError) as error:
        jlora.generate(model, params, prompts, **({"max_new_tokens": 4} | kwargs))
    assert message in str(error.value)
