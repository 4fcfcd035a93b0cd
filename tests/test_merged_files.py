"""A merged checkpoint is its base's own files with other weights."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from command import run
from safetensors.torch import load_file, save_file

import jlora

pytestmark = pytest.mark.usefixtures("quick_compilation")

FIELDS = {
    "pad_token_id": 2,
    "use_cache": False,
    "initializer_range": 0.014,
    "attention_dropout": 0.1,
    "my_note": "kept",
}
GENERATION = {
    "eos_token_id": [0, 2],
    "pad_token_id": 2,
    "temperature": 0.6,
    "do_sample": True,
    "repetition_penalty": 1.05,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def base(directory, dtype=torch.float16, *, fields=tiny.LLAMA, seed=0, **more):
    """A checkpoint in 16 bits, with fields that jlora does not compute with."""
    directory = Path(tiny.write_checkpoint(directory, fields, chat=tiny.CHATML, seed=seed))
    tensors = load_file(directory / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    read = json.loads((directory / "config.json").read_text()) | FIELDS | more
    read["dtype"] = read["torch_dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(read, indent=1))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    (directory / "LICENSE.txt").write_text("Ask first.")
    (directory / "README.md").write_text("# The base")
    # Spelled otherwise than transformers would.
    (directory / "tokenizer.json").write_text(json.dumps(json.loads((directory / "tokenizer.json").read_text())))
    return directory


def adapter(directory, model_dir, targets=("q_proj", "up_proj"), **changes):
    """An adapter that changes something."""
    config = jlora.LoraConfig(rank=2, targets=list(targets), **changes)
    _, params = jlora.load(model_dir, dtype=jnp.float32)
    params = jlora.add_lora(params, config, key=jax.random.key(1))
    noise = iter(range(1000))
    params = jax.tree.map(
        lambda w: w if not hasattr(w, "lora_B") else w.__class__(**{
            **{f: getattr(w, f) for f in w.__dataclass_fields__},
            "lora_B": jax.random.normal(jax.random.key(next(noise)), w.lora_B.shape) * 0.1,
        }),
        params,
        is_leaf=lambda w: hasattr(w, "lora_B"),
    )  # fmt: skip
    jlora.save_adapter(directory, params, config=config, base_model=str(model_dir))
    return directory


def bytes_of(directory, *names):
    return {name: (Path(directory) / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("command", [("merge",), ("export", "--to", "transformers")], ids=lambda c: c[0])
def test_the_files_are_the_bases(dtype, command, tmp_path):
    """Beside PEFT's merge_and_unload, which adds in the base's dtype."""
    directory = base(tmp_path / "m", dtype)
    adapter(tmp_path / "a", directory)
    assert run(*command, "--adapter", tmp_path / "a", "--output", tmp_path / "out") == 0
    kept = ("config.json", "generation_config.json", "LICENSE.txt", *TOKENIZER)
    assert bytes_of(tmp_path / "out", *kept) == bytes_of(directory, *kept)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {*kept, "model.safetensors"}
    ours = load_file(tmp_path / "out/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    theirs = load_file(tmp_path / "peft/model.safetensors")
    assert ours.keys() == theirs.keys()
    step = torch.finfo(dtype).eps
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == dtype
        torch.testing.assert_close(tensor, theirs[name], atol=2 * step, rtol=2 * step)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(again, name) for name in FIELDS} == FIELDS


@pytest.mark.slow
def test_merging_is_in_float32(tmp_path):
    """A small update of a 16-bit kernel is rounded once."""
    directory = base(tmp_path / "m")
    adapter(tmp_path / "a", directory, targets=("q_proj",))
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "out") == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(directory / "model.safetensors")[name]
    factors = load_file(tmp_path / "a/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.replace('.weight', f'.lora_{x}.weight')}"] for x in "AB")
    exact = (stored.double() + 8.0 * b.double() @ a.double()).to(torch.float16)
    ours = load_file(tmp_path / "out/model.safetensors")[name]
    assert (ours != exact).float().mean() < 0.01 and not torch.equal(ours, stored)


@pytest.mark.slow
def test_a_dtype_that_is_asked_for(tmp_path):
    directory = base(tmp_path / "m")
    adapter(tmp_path / "a", directory)
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "out", "--dtype", "float32") == 0
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float32}
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "out"))
    assert after == before | {"dtype": "float32", "torch_dtype": "float32"}


def test_tensors_of_several_dtypes(tmp_path):
    directory = base(tmp_path / "m", torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    norm = "model.norm.weight"
    save_file({**tensors, norm: tensors[norm].float()}, directory / "model.safetensors", metadata={"format": "pt"})
    adapter(tmp_path / "a", directory)
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "out") == 0
    written = load_file(tmp_path / "out/model.safetensors")
    assert {n for n, t in written.items() if t.dtype == torch.float32} == {norm}


def test_a_head_of_its_own(tmp_path):
    """The only field that changes is the one that is no longer true."""
    directory = base(tmp_path / "m", fields=tiny.LLAMA | {"tie_word_embeddings": True})
    adapter(tmp_path / "a", directory, targets=("embed_tokens",))
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "out") == 0
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "out"))
    assert after == before | {"tie_word_embeddings": False} and list(after) == list(before)
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.float16


@pytest.mark.slow
def test_a_packed_base(tmp_path):
    """A 4-bit checkpoint is written dense in its own 16 bits, and says no longer that it is packed."""
    directory = base(tmp_path / "m")
    assert run("quantize", "--model", directory, "--output", tmp_path / "q") == 0
    before, packed = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "q"))
    said = packed.pop("quantization_config")
    assert packed == before and said["bnb_4bit_compute_dtype"] == "float16"
    kept = ("generation_config.json", *TOKENIZER)
    assert bytes_of(tmp_path / "q", *kept) == bytes_of(directory, *kept)
    floats = {t.dtype for t in load_file(tmp_path / "q/model.safetensors").values() if t.is_floating_point()}
    assert floats == {torch.float16, torch.float32}, "float32: the scales of the blocks"
    adapter(tmp_path / "a", tmp_path / "q")
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == before
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float16}


def test_a_state_dict_has_the_bases_dtype(tmp_path):
    directory = base(tmp_path / "m")
    assert run("export", "--model", directory, "--to", "torch", "--output", tmp_path / "m.pt") == 0
    assert {t.dtype for t in torch.load(tmp_path / "m.pt").values()} == {torch.float16}


def test_a_value_that_the_dtype_does_not_hold(tmp_path, capsys):
    directory = base(tmp_path / "m")
    adapter(tmp_path / "a", directory, targets=("q_proj",), alpha=1e8)
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "out") == 1
    assert "beyond float16, in which the base stores it" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out/config.json").exists()
    assert run("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "wide", "--dtype", "float32") == 0


HELD = [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "model-q8_0.gguf", "tf_model.h5", "flax_model.msgpack", "consolidated.00.pth",
    "adapter_config.json", "config.json", "tokenizer.json",
]  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_a_directory_that_holds_a_model_is_refused(name, tmp_path):
    model, params = jlora.load(base(tmp_path / "m"), dtype=jnp.float32)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / name).write_text("{}")
    with pytest.raises(FileExistsError):
        jlora.save_pretrained(tmp_path / "old", model, params)
    assert [(f.name, f.read_text()) for f in (tmp_path / "old").iterdir()] == [(name, "{}")]


def test_without_a_base(tmp_path):
    model, params = jlora.load(base(tmp_path / "m"), dtype=jnp.float32)
    jlora.save_pretrained(tmp_path / "out", model, params, tokenizer=tiny.tokenizer())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the")["input_ids"]
    jlora.save_pretrained(tmp_path / "copied", model, params, tokenizer=tmp_path / "m")
    assert bytes_of(tmp_path / "copied", *TOKENIZER) == bytes_of(tmp_path / "m", *TOKENIZER)


def test_the_base_of_another_model(tmp_path):
    model, params = jlora.load(base(tmp_path / "m"), dtype=jnp.float32)
    for other in (
        base(tmp_path / "g", fields=tiny.GPT2),
        base(tmp_path / "n", fields=tiny.LLAMA | {"rms_norm_eps": 0.1}),
    ):
        with pytest.raises(ValueError, match="`base` must be the checkpoint that the model was loaded from"):
            jlora.save_pretrained(tmp_path / "out", model, params, base=other)
    assert not (tmp_path / "out").exists()


def test_config_fields_that_are_not_there_stay_so(tmp_path):
    """A checkpoint of transformers 4 without a dtype, GPT-2's tensors without their prefix, code that is not copied."""
    directory = base(tmp_path / "m", fields=tiny.GPT2, auto_map={"AutoModel": "code.Model"})
    fields = json.loads((directory / "config.json").read_text())
    for name in ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id"):
        fields.pop(name, None)
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "generation_config.json").unlink()
    bare = {n.removeprefix("transformer."): t for n, t in load_file(directory / "model.safetensors").items()}
    save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
    model, params = jlora.load(directory, dtype=jnp.float32)
    jlora.save_pretrained(tmp_path / "out", model, params, base=directory)
    fields.pop("auto_map")
    assert json.loads((tmp_path / "out/config.json").read_text()) == fields
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 2,
    }  # fmt: skip
    written = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float16}
    np.testing.assert_array_equal(written["transformer.wte.weight"], bare["wte.weight"])


def test_links_become_files(tmp_path):
    """The hub's cache holds links."""
    directory = base(tmp_path / "m")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in directory.iterdir():
        (linked / file.name).symlink_to(file)
    model, params = jlora.load(linked, dtype=jnp.float32)
    jlora.save_pretrained(tmp_path / "out", model, params, base=linked)
    shutil.rmtree(directory)
    assert (tmp_path / "out/tokenizer.json").stat().st_size > 1000
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
