"""Rows of single tokens: a vocabulary that grows, PEFT's `trainable_token_indices` both ways, and runs with new tokens."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from oracles import make_torch_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import jlora
from jlora.lora import TokensWeight

pytestmark = pytest.mark.usefixtures("quick_compilation")
IDS = [5, 2, 40]


def logits(model, params, ids):
    return np.asarray(jax.jit(model.apply)({"params": params}, ids))


@pytest.mark.parametrize("tie", [True, False])
def test_adapters_with_trained_tokens_are_peft_s(tie, tmp_path):
    """A tied head has the rows too, as there; what one writes the other reads."""
    torch_model = make_torch_model("llama", tie_word_embeddings=tie)
    torch_model.save_pretrained(tmp_path / "base")
    indices = IDS if tie else {"embed_tokens": IDS, "lm_head": IDS[:2]}
    theirs = peft.get_peft_model(
        torch_model, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    )
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.array([[5, 1, 2, 40, 7, 5]])
    expected = theirs.eval()(torch.tensor(ids)).logits.detach().numpy()
    model, params = jlora.load(tmp_path / "base", dtype=jnp.float32, stack=True)
    adapted = jlora.load_adapter(tmp_path / "theirs", params)
    np.testing.assert_allclose(logits(model, adapted, ids), expected, atol=1e-4)
    merged = jlora.merge(adapted)
    np.testing.assert_allclose(logits(model, merged, ids), expected, atol=1e-4)
    config = jlora.LoraConfig.load(tmp_path / "theirs")
    jlora.save_adapter(tmp_path / "ours", adapted, config=config, base_model=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(back(torch.tensor(ids)).logits.detach().numpy(), expected, atol=1e-5)


def test_gradients_are_of_these_rows_alone():
    table, draw = jax.random.normal(jax.random.key(0), (9, 4)), jax.random.normal(jax.random.key(1), (6, 4))
    ids, at = jnp.array([0, 3, 3, 8, 1, 7]), (8, 3)

    def loss(table, read):
        x = read(table)
        return jnp.sum(jnp.sin(x * draw)) + jnp.sum(jnp.cos(jlora.linear(x, table, transpose=True)))

    def ours(rows):
        return loss(dataclasses.replace(TokensWeight.of(table, at, 0), rows=rows), lambda w: jlora.embed(ids, w))

    value, gradient = jax.jit(jax.value_and_grad(ours))(table[jnp.array(at)])
    whole, expected = jax.jit(jax.value_and_grad(lambda w: loss(w, lambda w: w[ids])))(table)
    np.testing.assert_allclose((value, *gradient.ravel()), (whole, *expected[jnp.array(at)].ravel()), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_token_indices": [3, 3]}, "each once; got"),
        ({"trainable_token_indices": {"lm_head": []}}, r"`trainable_token_indices\['lm_head'\]` must hold token ids"),
        ({"trainable_token_indices": [10**6]}, r"has rows for 0\.\..*jlora.grow\(model, params, 1000001\)"),
        ({"trainable_token_indices": {"nothing": [1]}}, "'nothing' matches no embedding and no head"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "adapted as a whole too"),
    ],
)
def test_tokens_that_cannot_be_trained(changes, message, llama_dir):
    with pytest.raises(ValueError, match=message):
        jlora.add_lora(jlora.load(llama_dir)[1], jlora.LoraConfig(rank=2, **changes), key=jax.random.key(0))


def test_a_model_grows_by_the_mean_of_its_rows(llama_dir):
    model, params = jlora.load(llama_dir, dtype=jnp.float32)
    size = model.config.vocab_size
    grown, more = jlora.grow(model, params, size + 2, new=[size - 1])
    assert grown.config.vocab_size == size + 2 and jlora.grow(model, params, size)[1] is params
    for before, after in (
        (params["model"]["embed_tokens"]["embedding"], more["model"]["embed_tokens"]["embedding"]),
        (params["lm_head"]["kernel"].T, more["lm_head"]["kernel"].T),
    ):
        np.testing.assert_array_equal(after[: size - 1], before[:-1])
        np.testing.assert_allclose(after[size - 1 :], np.tile(before[:-1].mean(0), (3, 1)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_with_new_tokens(family, request, text_file, tmp_path, call, fails):
    """They are trained, generated with and merged; PEFT on the resized base gives the same logits."""
    base = request.getfixturevalue(f"{family}_dir")
    (tmp_path / "tokens.txt").write_text("<keeper>\nlamp\n")
    data = tmp_path / "data.txt"
    data.write_text(Path(text_file).read_text().replace("keeper", "<keeper>"))
    targets = ("q_proj",) if family == "llama" else ("c_attn",)
    config = tiny.options(
        model=base, data=str(data), output=str(tmp_path / "run"), new_tokens=str(tmp_path / "tokens.txt"), targets=targets,
        learning_rate=1e-2, steps=3,
    )  # fmt: skip
    adapter = jlora.finetune(config).adapter_dir
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("the <keeper> and a lamp", return_tensors="np")["input_ids"]
    token = tokenizer.convert_tokens_to_ids("<keeper>")
    assert token in ids and token >= jlora.load(base)[0].config.vocab_size
    torch_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch_base.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(torch_base, adapter).eval()(torch.tensor(ids)).logits.detach().numpy()
    model, params = jlora.load(base, dtype=jnp.float32)
    model, params = jlora.grow(model, params, len(tokenizer))
    ours = jlora.load_adapter(adapter, params)
    np.testing.assert_allclose(logits(model, ours, ids), theirs, atol=1e-4)
    name = model.config.embedding_path.split("/")[-2]
    trained, before = (tree[model.config.trunk][name]["embedding"] for tree in (ours, params))
    assert np.abs(np.asarray(trained.rows[0] - before[token])).max() > 1e-3
    place = "--adapter", str(adapter)
    call("generate", *place, "--prompts", "the <keeper>", "--max-new-tokens", "2", "--temperature", "0")
    call("merge", *place, "--output", str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(merged(torch.tensor(ids)).logits.detach().numpy(), theirs, atol=1e-3)
    file = tmp_path / "merged.gguf"
    call("export", *place, "--to", "gguf", "--gguf-dtype", "f32", "--output", file)
    again = jlora.load(file, dtype=jnp.float32)
    np.testing.assert_allclose(logits(*again, ids), theirs, atol=1e-3)
    assert jlora.load_tokenizer(file)("the <keeper> and a lamp")["input_ids"] == ids[0].tolist()
    for kind in ("gguf-adapter", "mlx"):  # which are written for the base as it is
        assert "embedding" in fails("export", *place, "--to", kind, "--output", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    two = [str(shutil.copytree(adapter, tmp_path / "both" / name)) for name in ("one", "two")]
    for command in (["generate", "--prompts", "a", "--adapter", tmp_path / "both"], ["chat", "--adapter", *two]):
        assert "side by side stand plain low-rank updates only. Load that adapter by itself" in fails(*command)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("<a>\n\n<b>\n", "Line 2 .* without spaces"), ("<a>\n<b>\n<a>\n", "Line 3 .* again")],
)
def test_files_of_tokens_that_are_refused(content, message, llama_dir, text_file, tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        jlora.finetune(tiny.options(model=llama_dir, data=text_file, output=str(tmp_path / "o"), new_tokens=str(file)))
