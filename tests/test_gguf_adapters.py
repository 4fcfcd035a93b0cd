"""LoRA adapters of llama.cpp, read: what `save_gguf_adapter` writes and what llama.cpp's own converter does."""

import jax
import numpy as np
import pytest
from gguf_files import ADAPTERS, F32, IDS, STRING, VARIANTS, RawFile, loader, value
from trees import adapted

import jlora
from jlora.models import family_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loader(tmp_path_factory, VARIANTS)


def updates(params):
    """Module -> the update, dense."""
    found = jlora.merge(params)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, jlora.remove_lora(params))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen2", "mistral", "qwen3", "smollm3", "gemma3"])
def test_what_is_written_is_read(variant, kind, loaded, tmp_path):
    _, model, params = loaded(variant)
    config = jlora.LoraConfig(**ADAPTERS[kind])
    trained = adapted(params, config)
    path = tmp_path / "adapter.gguf"
    jlora.save_gguf_adapter(path, trained, config=config, model=model)
    for tree, given in ((params, None), (params, model), (jlora.stack_layers(params), None)):
        if kind == "patterns" and tree is not params:  # ranks differ by layer
            continue
        read = jlora.load_adapter(path, tree, model=given)
        read = jlora.unstack_layers(read) if tree is not params and given is None else read
        for ours, theirs in zip(jax.tree.leaves(updates(trained)), jax.tree.leaves(updates(read)), strict=True):
            np.testing.assert_allclose(theirs, ours, atol=2e-6)
    found = jlora.LoraConfig.load(path)
    assert found.alpha == config.alpha and found.rank == config.rank and not found.use_rslora
    # The config is the one that they were read with: another adapter format takes them.
    read = jlora.load_adapter(path, params)
    jlora.save_adapter(tmp_path / "peft", read, config=found, base_model="base")
    again = jlora.load_adapter(tmp_path / "peft", params)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    jlora.save_gguf_adapter(tmp_path / "again.gguf", read, config=found, model=model)
    tensors = [RawFile.read(tmp_path / name).tensors for name in ("adapter.gguf", "again.gguf")]
    assert tensors[0] == tensors[1]


def test_some_layers_and_the_head(loaded, tmp_path):
    _, model, params = loaded("llama")
    for number, targets in enumerate((["q_proj", "lm_head"], ["model.layers.1.mlp.up_proj"], ["v_proj"])):
        layers = [1] if targets == ["v_proj"] else None
        config = jlora.LoraConfig(rank=4, targets=targets, layers_to_transform=layers)
        trained = adapted(params, config)
        jlora.save_gguf_adapter(tmp_path / f"{number}.gguf", trained, config=config, model=model)
        read = jlora.load_adapter(tmp_path / f"{number}.gguf", params)
        assert jax.tree.structure(read) != jax.tree.structure(params)
        for ours, theirs in zip(jax.tree.leaves(updates(trained)), jax.tree.leaves(updates(read)), strict=True):
            np.testing.assert_allclose(theirs, ours, atol=2e-6)


@pytest.fixture(scope="module")
def file(loaded, tmp_path_factory):
    _, model, params = loaded("llama")
    config = jlora.LoraConfig(rank=4, targets=["q_proj", "up_proj"])
    path = tmp_path_factory.mktemp("adapter") / "adapter.gguf"
    jlora.save_gguf_adapter(path, adapted(params, config), config=config, model=model)
    return path


def test_files_of_llama_cpps_converter_need_the_model(file, loaded, tmp_path):
    """They do not say how long a head is, and may be f16."""
    _, model, params = loaded("llama")
    raw = RawFile.read(file)
    del raw.fields["llama.attention.key_length"]
    for name, (dims, _, data) in raw.tensors.items():
        raw.tensors[name] = dims, 1, np.frombuffer(data, np.float32).astype(np.float16).tobytes()
    path = raw.write(tmp_path / "theirs.gguf")
    with pytest.raises(ValueError, match=r"does not say how long a head of its base model is.* model=model\)"):
        jlora.load_adapter(path, params)
    read, ours = jlora.load_adapter(path, params, model=model), jlora.load_adapter(file, params)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert np.asarray(jax.tree.leaves(jlora.split(read)[0])[0]).dtype == np.float32


def renamed(name, to):
    return lambda raw: raw.tensors.__setitem__(to, raw.tensors.pop(name))


FACTOR = "blk.0.attn_q.weight.lora_b"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.fields.pop("adapter.lora.alpha"), "`adapter.lora.alpha` is missing"),
        (lambda raw: raw.fields.update({"adapter.lora.alpha": value(F32, 0.0)}), "`adapter.lora.alpha` must be a positive number"),
        (lambda raw: raw.fields.update({"adapter.type": value(STRING, "control_vector")}), "`adapter.type` must be 'lora'"),
        (lambda raw: raw.fields.update({"general.type": value(STRING, "model")}), "its `general.type` is 'model'"),
        (lambda raw: raw.fields.update({"general.architecture": value(STRING, "phi3")}), "architecture 'phi3'; jlora runs"),
        (renamed(FACTOR, "blk.0.attn_q.weight.lora_c"), "unexpected: blk.0.attn_q.weight.lora_c"),
        (renamed(FACTOR, "blk.7.attn_q.weight.lora_b"), "unexpected: model.layers.7.self_attn.q_proj.lora_b"),
        (renamed(FACTOR, "blk.99999.attn_q.weight.lora_b"), "has factors of layer 99999; a model has at most 1024"),
        (lambda raw: raw.tensors.pop(FACTOR), "missing: model.layers.0.self_attn.q_proj.lora_b"),
        (lambda raw: raw.tensors.update({"token_embd.weight.lora_a": ([4, 420], 0, bytes(4 * 4 * 420))}), "unexpected: token_embd"),
        (lambda raw: raw.tensors.update({FACTOR: ([4, 32], 0, bytes(512))}), r"q_proj.lora_b is \(32, 4\), should be \(64, 4\)"),
        (lambda raw: raw.tensors.update({FACTOR: ([4, 64], 26, bytes(1024))}), "q_proj.lora_b is I32, should be"),
        (lambda raw: raw.tensors.update({FACTOR: ([4, 64], 0, b"\xff" * 1024)}), "is NaN or infinite"),
        (lambda raw: raw.tensors.clear(), "holds no `lora_a` of a linear kernel"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(change, says, file, loaded, tmp_path):
    raw = RawFile.read(file)
    change(raw)
    with pytest.raises(ValueError, match=says):
        jlora.load_adapter(raw.write(tmp_path / "a.gguf"), loaded("llama")[2])


def test_one_of_another_architecture_is_refused(file, loaded):
    _, model, params = loaded("qwen2")
    with pytest.raises(ValueError, match="architecture: 'llama', should be 'qwen2'"):
        jlora.load_adapter(file, params, model=model)
    assert family_of(model.config).gguf.architecture == "qwen2"
    with pytest.raises(ValueError, match="unexpected: model.layers.0.self_attn.q_proj.lora_a"):
        jlora.load_adapter(file, loaded("gpt2")[2])


@pytest.mark.slow
def test_the_commands_take_it(llama_dir, call, tmp_path):
    model, params = jlora.load(llama_dir, dtype="float32")
    config = jlora.LoraConfig(rank=4)
    trained = adapted(params, config)
    path = tmp_path / "adapter.gguf"
    jlora.save_gguf_adapter(path, trained, config=config, model=model)
    assert "self_attn.q_proj" in call("inspect", str(path)).out
    flags = ["--model", llama_dir, "--adapter", str(path)]
    assert call("generate", *flags, "--prompts", "The keeper", "--max-new-tokens", "3", "--temperature", "0").out
    call("export", "--to", "peft", *flags, "--output", str(tmp_path / "peft"))
    read = jlora.load_adapter(tmp_path / "peft", params)
    ids = IDS % 90
    np.testing.assert_allclose(
        model.apply({"params": read}, ids), model.apply({"params": trained}, ids), atol=1e-4, rtol=1e-4
    )
