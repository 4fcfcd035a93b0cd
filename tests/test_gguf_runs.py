"""Every command on a GGUF file. tests/test_gguf_smollm2.py has a real one."""

import json

import numpy as np
import pytest
import tiny
import torch
import transformers

import jlora
from jlora.files.origin import Origin
from jlora.storage.checkpoint_files import base_fingerprint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def base(llama_dir, tmp_path_factory):
    """A file with a chat template."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    tokenizer = jlora.load_tokenizer(llama_dir)
    jlora.save_gguf(path, *jlora.load(llama_dir, dtype="float32"), tokenizer=tokenizer, dtype="f16")
    return path


@pytest.fixture(scope="module")
def run(base, records_file, tmp_path_factory):
    """A run on the file."""
    output = tmp_path_factory.mktemp("run") / "r"
    config = jlora.FinetuneConfig(
        model=str(base), data=records_file, output=str(output), steps=3, eval_fraction=0.25, rank=2, quiet=True,
        checkpoint_every=2, batch_size=2,
    )  # fmt: skip
    jlora.finetune(config)
    return output


def outputs(directory, ids):
    model, params = jlora.load(directory, dtype="float32")
    return np.asarray(model.apply({"params": params}, ids))


@pytest.mark.slow
def test_a_run_says_what_it_was_trained_on(run, base):
    fields = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base)
    assert json.loads((run / "adapter" / "jlora_run.json").read_text())["base"] == base_fingerprint(base)
    assert (run / "adapter" / "tokenizer.json").is_file() and (run / "adapter" / "chat_template.jinja").is_file()


IDS = np.array([[3, 50, 60, 70, 9, 8]])


@pytest.mark.slow
def test_the_commands_take_the_adapter_of_a_run(run, base, call, tmp_path):
    adapter = ["--adapter", str(run / "adapter")]
    said = call("evaluate", *adapter)
    assert "perplexity" in said.out and "as in the run that trained this" in said.err
    assert "has another config.json" not in said.err
    assert call("generate", *adapter, "--prompts", "Write gulls.", "--max-new-tokens", "4", "--temperature", "0").out
    assert call("compare", *adapter, "--prompts", "Write gulls.", "--max-new-tokens", "4").out
    call("merge", *adapter, "--output", str(tmp_path / "merged"))
    model, params = jlora.load(base, dtype="float32")
    expected = np.asarray(model.apply({"params": jlora.load_adapter(run / "adapter", params)}, IDS))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = merged(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=2e-2)  # float16, as the file has them
    tokenizer = jlora.load_tokenizer(base)
    again = jlora.load_tokenizer(tmp_path / "merged")
    assert again("The keeper")["input_ids"] == tokenizer("The keeper")["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    call("export", "--to", "gguf", "--gguf-dtype", "f32", *adapter, "--output", str(tmp_path / "m.gguf"))
    np.testing.assert_allclose(outputs(tmp_path / "m.gguf", IDS), expected, atol=1e-5)
    call("export", "--to", "gguf-adapter", *adapter, "--output", str(tmp_path / "a.gguf"))
    call("export", "--to", "ollama", *adapter, "--output", str(tmp_path / "ollama"))
    call("inspect", str(run / "adapter"))


@pytest.mark.slow
def test_the_commands_take_the_file(base, text_file, records_file, call, tmp_path):
    model = ["--model", str(base)]
    assert "self_attn.q_proj" in call("inspect", str(base)).out
    assert "self_attn.q_proj" in call("inspect", *model).out
    assert "supervised" in call("inspect", *model, "--data", records_file).out
    assert json.loads(call("memory", *model, "--json").out)["weights"] > 0
    assert "tokens" in call("prepare", *model, "--data", text_file, "--output", str(tmp_path / "shards")).out
    assert "perplexity" in call("evaluate", *model, "--data", text_file).out
    call("quantize", *model, "--output", str(tmp_path / "nf4"))
    packed = jlora.load(tmp_path / "nf4")[1]
    assert jlora.nbytes(packed) < jlora.nbytes(jlora.load(base, dtype="float32")[1]) / 2
    assert jlora.load_tokenizer(tmp_path / "nf4").chat_template == tiny.CHATML
    call("export", "--to", "transformers", *model, "--output", str(tmp_path / "hf"))
    np.testing.assert_array_equal(outputs(tmp_path / "hf", IDS), outputs(base, IDS))
    assert Origin.read(tmp_path / "hf").dtypes["model.embed_tokens.weight"] == "float16"
    call("export", "--to", "torch", *model, "--output", str(tmp_path / "model.pt"))


@pytest.mark.slow
def test_a_run_goes_on_and_refuses_another_base(run, base, records_file, fails, tmp_path):
    other = tmp_path / "base.gguf"
    data = bytearray(base.read_bytes())
    data[-40] ^= 1  # a weight
    other.write_bytes(data)
    assert base_fingerprint(other) != base_fingerprint(base)
    flags = ["--data", records_file, "--output", str(run), "--steps", "3", "--eval-fraction", "0.25", "--rank", "2"]
    flags += ["--checkpoint-every", "2", "--batch-size", "2", "--quiet", "--resume"]
    assert "model: was" in fails("finetune", "--model", str(other), *flags)


@pytest.mark.slow
def test_another_file_than_the_runs_is_said(run, base, call, tmp_path):
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(base.read_bytes())
    flags = ["--adapter", str(run / "adapter"), "--prompts", "Write", "--max-new-tokens", "2", "--temperature", "0"]
    assert "was trained on" not in call("generate", "--model", str(moved), *flags).err, "a name is no weight"
    data = bytearray(base.read_bytes())
    data[-40] ^= 1
    moved.write_bytes(data)
    assert "has another config.json or other weights" in call("generate", "--model", str(moved), *flags).err


def test_without_the_package(base, monkeypatch, fails):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install 'jlora\\[gguf\\]'"):
        jlora.load(base)
    assert "pip install 'jlora[gguf]'" in fails("generate", "--model", str(base), "--prompts", "a")
    assert jlora.load_tokenizer(base)("The keeper")["input_ids"], "which needs no package"
