"""Sampling against transformers' and against the uncached model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora.generation import _generate, truncate

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


def test_sampling_parameters_do_not_recompile(loaded):
    model, params, _ = loaded["qwen2"]
    jlora.generate(model, params, PROMPTS, max_new_tokens=4, key=jax.random.key(0))
    before = _generate._cache_size()
    jlora.generate(model, params, PROMPTS, max_new_tokens=4, temperature=0.3, top_k=3, top_p=0.5, key=jax.random.key(1))
    assert _generate._cache_size() == before


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
