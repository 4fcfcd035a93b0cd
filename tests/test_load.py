"""Checkpoints in and out: what real directories look like, and what is wrong with broken ones."""

import json
import shutil
import weakref

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from oracles import LLAMA3_ROPE, VOCAB, make_torch_model, torch_logits
from safetensors.numpy import load_file, save_file

import jlora
from jlora.storage import Checkpoint
from jlora.tree.paths import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def token_ids(seq=20):
    return np.random.default_rng(0).integers(0, VOCAB, (2, seq)).astype(np.int32)


def logits(model, params):
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, token_ids()))(params))


def assert_equal(a, b):
    """Same paths, dtypes and bits."""
    a, b = flatten(a), flatten(b)
    assert list(map(str, sorted(a))) == list(map(str, sorted(b)))
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def copy_of(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def edit_json(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def load_error(directory, kind=ValueError):
    with pytest.raises(kind) as error:
        jlora.load(directory, dtype=jnp.float32)
    assert type(error.value) is kind
    return str(error.value)


# The files that checkpoints come in


def test_every_tensor_is_the_checkpoints(checkpoint):
    directory, oracle = checkpoint
    model, params = jlora.load(directory, dtype=jnp.float32)
    state = {n: t.numpy() for n, t in oracle.state_dict().items() if n != "lm_head.weight" or "lm_head" in params}
    leaves = flatten(params)
    assert len(leaves) == len(state)
    for path, leaf in leaves.items():
        stem, _, kind = path.replace("/", ".").rpartition(".")
        theirs = state[f"{stem}.{'bias' if kind == 'bias' else 'weight'}"]
        transposed = kind == "kernel" and model.config.model_type != "gpt2"
        np.testing.assert_array_equal(leaf, theirs.T if transposed else theirs, err_msg=path)


def test_shards_equal_the_single_file(checkpoint, tmp_path):
    directory, oracle = checkpoint
    oracle.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / WEIGHTS).exists()
    for stack in (False, True):
        pair = [jlora.load(d, dtype=jnp.float32, stack=stack) for d in (directory, tmp_path)]
        assert pair[0][0] == pair[1][0]
        assert_equal(pair[0][1], pair[1][1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stack_equals_stacking_the_per_layer_form(checkpoint, dtype):
    directory, _ = checkpoint
    _, params = jlora.load(directory, dtype=dtype)
    _, stacked = jlora.load(directory, dtype=dtype, stack=True)
    assert_equal(stacked, jlora.stack_layers(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_gpt2_as_on_the_hub(checkpoints, tmp_path):
    """No "transformer." prefix, and the causal mask among the tensors."""
    directory, _ = checkpoints["gpt2"]
    old = copy_of(directory, tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
        assert "h.0.attn.c_attn.bias" in tensors and "wte.weight" in tensors

    edit_tensors(old, rename)
    assert_equal(jlora.load(old, dtype=jnp.float32)[1], jlora.load(directory, dtype=jnp.float32)[1])


def test_buffers_under_the_prefix_are_ignored(checkpoints, tmp_path):
    buffers = {
        "gpt2": {"transformer.h.1.attn.bias": np.ones((1, 1, 4, 4), np.uint8)},
        "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
    }
    for family, extra in buffers.items():
        directory, _ = checkpoints[family]
        copy = copy_of(directory, tmp_path / family)
        edit_tensors(copy, lambda tensors, extra=extra: tensors.update(extra))
        assert_equal(jlora.load(copy)[1], jlora.load(directory)[1])


TABLES = {"gpt2": "transformer.wte.weight", "qwen2": "model.embed_tokens.weight"}


@pytest.mark.parametrize("tied", ["gpt2", "qwen2"])
def test_the_copy_of_a_tied_head_is_ignored(checkpoints, tmp_path, tied):
    directory, _ = checkpoints[tied]
    copy = copy_of(directory, tmp_path)
    table = load_file(copy / WEIGHTS)[TABLES[tied]]
    edit_tensors(copy, lambda tensors: tensors.update({"lm_head.weight": table}))
    assert_equal(jlora.load(copy)[1], jlora.load(directory)[1])


@pytest.mark.parametrize("tied", ["gpt2", "qwen2"])
def test_another_head_beside_a_tied_embedding_is_not_ignored(checkpoints, tmp_path, tied):
    copy = copy_of(checkpoints[tied][0], tmp_path)
    other = load_file(copy / WEIGHTS)[TABLES[tied]] + np.eye(VOCAB, 48, dtype=np.float32)
    edit_tensors(copy, lambda tensors: tensors.update({"lm_head.weight": other}))
    said = load_error(copy)
    assert f"'lm_head.weight' of other values than '{TABLES[tied]}'" in said and '"tie_word_embeddings": false' in said
    edit_json(copy / "config.json", lambda fields: fields.update({"tie_word_embeddings": False}))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(copy).eval()
    assert np.abs(torch_logits(oracle, token_ids()) - logits(*jlora.load(copy, dtype=jnp.float32))).max() <= 1e-4


def test_an_untied_head_is_needed(checkpoints, tmp_path):
    copy = copy_of(checkpoints["llama"][0], tmp_path)
    edit_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing: lm_head.weight (97, 48)" in load_error(copy)


def as_transformers_4(fields):
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    fields["torch_dtype"] = fields.pop("dtype")


@pytest.mark.parametrize("family_", ["llama", "qwen2"])
def test_transformers_4_spells_rope_and_dtype_otherwise(checkpoints, tmp_path, family_):
    directory, oracle = checkpoints[family_]
    copy = copy_of(directory, tmp_path)
    edit_json(copy / "config.json", as_transformers_4)
    new, old = jlora.load(directory, dtype=jnp.float32), jlora.load(copy, dtype=jnp.float32)
    assert new[0] == old[0]
    theta, scaling = old[0].config.rope_theta, old[0].config.rope_scaling
    if family_ == "llama":
        assert theta == 500000.0 and scaling._asdict().items() <= LLAMA3_ROPE.items()
    else:
        assert theta == 10000.0 and scaling is None
    assert np.abs(logits(*old) - torch_logits(oracle, token_ids())).max() <= 1e-4


@pytest.mark.parametrize("file_dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_files_of_every_float_dtype(checkpoints, tmp_path, file_dtype, dtype):
    copy = copy_of(checkpoints["llama"][0], tmp_path)
    edit_tensors(copy, lambda tensors: tensors.update({n: t.astype(file_dtype) for n, t in tensors.items()}))
    _, params = jlora.load(copy, dtype=dtype)
    tensors = load_file(copy / WEIGHTS)
    kernel = params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    expected = tensors["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32).astype(dtype)
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(np.asarray(kernel), expected)


# One tensor at a time


@pytest.mark.parametrize("stack", [False, True])
def test_host_tensors_are_released_as_they_are_placed(checkpoints, monkeypatch, stack):
    alive, peaks = weakref.WeakSet(), []
    read = Checkpoint.read

    class Tensor(np.ndarray):
        __hash__ = object.__hash__

    def tracked(self, name):
        peaks.append(len(alive))
        tensor = read(self, name).view(Tensor)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", tracked)
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.bfloat16, stack=stack)
    assert len(peaks) == 2 * 9 + 3  # every tensor once
    assert max(peaks) <= 1
    jax.block_until_ready(params)
    assert len(alive) <= 1


def test_opening_reads_no_tensor(checkpoints, monkeypatch):
    directory, oracle = checkpoints["gpt2"]
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    checkpoint = Checkpoint(directory)
    assert checkpoint.shapes["transformer.wte.weight"] == (VOCAB, 48)
    assert set(checkpoint.dtypes.values()) == {"F32"}


# What does not fit


def test_all_that_does_not_fit_is_in_one_error(checkpoints, tmp_path):
    copy = copy_of(checkpoints["llama"][0], tmp_path)

    def spoil(tensors):
        tensors["model.layers.0.mlp.up_projection.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.norm.weight"] = np.ones(47, np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].T.copy()
        tensors["score.weight"] = np.ones((2, 48), np.float32)
        tensors["model.layers.1.mlp.gate_proj.weight"] = np.ones((64, 48), np.int8)

    edit_tensors(copy, spoil)
    message = load_error(copy)
    for line in (
        "missing: model.layers.0.mlp.up_proj.weight (64, 48) (there is model.layers.0.mlp.up_projection.weight)",
        "shape: model.norm.weight is (47,), should be (48,)",
        "shape: model.layers.0.self_attn.q_proj.weight is (48, 64), should be (64, 48)",
        "unexpected: score.weight (2, 48)",
        "unexpected: model.layers.0.mlp.up_projection.weight (64, 48)",
        "dtype: model.layers.1.mlp.gate_proj.weight is I8",
        "Nothing was loaded",
        str(copy),
        "(llama)",
    ):
        assert line in message
    assert message.count("\n  ") == 6


def test_a_long_list_of_problems_is_cut_and_counted(checkpoints, tmp_path):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    edit_json(copy / "config.json", lambda fields: fields.update(n_layer=5))
    message = load_error(copy)
    assert message.count("missing: transformer.h.") == 20
    assert f"and {3 * 12 - 20} more" in message


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_integer_tensors_are_refused(checkpoints, tmp_path, dtype):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    edit_tensors(copy, lambda tensors: tensors.update({"transformer.wte.weight": np.zeros((VOCAB, 48), dtype)}))
    assert "dtype: transformer.wte.weight is " in load_error(copy)


def test_quantized_checkpoints_are_refused(checkpoints, tmp_path):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    edit_json(copy / "config.json", lambda fields: fields.update(quantization_config={"quant_method": "gptq"}))
    assert "is quantized ('gptq')" in load_error(copy)


@pytest.mark.parametrize("dtype", [jnp.int8, np.float64])
def test_other_dtypes_are_refused(checkpoints, dtype):
    with pytest.raises(ValueError, match=f"`dtype` must be jnp.bfloat16 or jnp.float32.*{jnp.dtype(dtype).name}"):
        jlora.load(checkpoints["gpt2"][0], dtype=dtype)


# Broken directories


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_a_path_that_is_not_there(name):
    message = load_error(name, FileNotFoundError)
    assert repr(name) in message and "not a directory" in message


def test_a_file_is_not_a_directory(checkpoints):
    assert "is not a directory" in load_error(checkpoints["gpt2"][0] / WEIGHTS, FileNotFoundError)


def test_an_empty_directory(tmp_path):
    message = load_error(tmp_path, FileNotFoundError)
    assert "no config.json" in message and "adapter" not in message


def test_an_adapter_directory_is_not_a_model(checkpoints, tmp_path):
    model, params = jlora.load(checkpoints["gpt2"][0])
    config = jlora.LoraConfig(rank=2)
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(tmp_path, adapted, config=config, base_model="gpt2")
    message = load_error(tmp_path, FileNotFoundError)
    assert "It holds an adapter" in message and "jlora.load_adapter" in message


def test_only_pickled_weights(checkpoints, tmp_path):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    message = load_error(copy, FileNotFoundError)
    assert "only pytorch_model.bin" in message and "save_pretrained" in message


def test_no_weights_at_all(checkpoints, tmp_path):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    (copy / WEIGHTS).unlink()
    message = load_error(copy, FileNotFoundError)
    assert f"no {WEIGHTS} and no {INDEX}" in message and "only" not in message


@pytest.mark.parametrize("length", [0, 4, 200, -100])
def test_truncated_weights(checkpoints, tmp_path, length):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:length])
    message = load_error(copy)
    assert "not a valid safetensors file" in message and WEIGHTS in message


@pytest.mark.parametrize("text", ["{", "", "\xff", "not json"])
def test_a_config_that_is_not_json(checkpoints, tmp_path, text):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    message = load_error(copy)
    assert "config.json" in message and ("must be UTF-8" if text == "\xff" else "not valid JSON") in message


def test_a_config_that_is_a_list(checkpoints, tmp_path):
    copy = copy_of(checkpoints["gpt2"][0], tmp_path)
    (copy / "config.json").write_text("[]")
    assert "must hold a JSON object; got a list" in load_error(copy)


@pytest.fixture
def sharded(tmp_path):
    directory = tmp_path / "sharded"
    make_torch_model("gpt2").save_pretrained(directory, max_shard_size="60KB")
    return directory


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = load_error(sharded, FileNotFoundError)
    assert repr(shard.name) in message and "missing" in message


@pytest.mark.parametrize("place", ["../{}", "sub/{}", "/{}"])
def test_an_index_may_not_point_elsewhere(sharded, place):
    name = sorted(sharded.glob("model-*.safetensors"))[0].name
    outside = place.format(name)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"transformer.wte.weight": outside}))
    shutil.copy(sharded / name, sharded.parent / name)  # what is there must not be read either
    message = load_error(sharded)
    assert repr(outside) in message and "beside the index" in message


def test_an_index_of_another_checkpoint(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(second, first)
    message = load_error(sharded)
    assert repr(first.name) in message and "does not hold them" in message


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ("\xff", "UTF-8"),
    ],
)
def test_an_index_that_is_none(sharded, text, says):
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    message = load_error(sharded)
    assert INDEX in message and says in message


# The hub


def test_a_hub_id_without_a_network():
    message = load_error("jlora-tests/no-such-model", FileNotFoundError)
    for part in ("'jlora-tests/no-such-model'", "neither a directory here nor", "hub", "Check the spelling"):
        assert part in message


REPOSITORY = [
    ".gitattributes", "README.md", "config.json", "flax_model.msgpack", "generation_config.json", "merges.txt",
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "onnx/decoder_model.onnx",
    "pytorch_model.bin", "rust_model.ot", "special_tokens_map.json", "tf_model.h5", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "chat_template.jinja", "original/consolidated.00.pth", "original/params.json",
    "consolidated.safetensors",
]  # fmt: skip
UNUSED = {".md", ".gitattributes", ".msgpack", ".onnx", ".bin", ".ot", ".h5", ".pth"}


def test_a_hub_id_downloads_what_is_needed_and_no_more(checkpoints, monkeypatch):
    directory, _ = checkpoints["gpt2"]
    calls = []

    def snapshot_download(repo_id, **patterns):
        calls.append((repo_id, patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, params = jlora.load("openai-community/gpt2", dtype=jnp.float32)
    assert_equal(params, jlora.load(directory, dtype=jnp.float32)[1])
    ((repo_id, patterns),) = calls
    assert repo_id == "openai-community/gpt2"
    taken = set(filter_repo_objects(REPOSITORY, **patterns))
    in_their_own_format = ("original/", "consolidated")
    assert taken == {
        file for file in REPOSITORY if not file.startswith(in_their_own_format) and not any(map(file.endswith, UNUSED))
    }


def test_an_error_of_the_hub_is_explained(monkeypatch):
    def snapshot_download(*_, **__):
        raise PermissionError("gated\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = load_error("meta-llama/Llama-3.2-1B", FileNotFoundError)
    assert "PermissionError: gated)" in message and "hf auth login" in message


def test_a_directory_wins_over_a_hub_id(checkpoints, tmp_path, monkeypatch):
    copy_of(checkpoints["gpt2"][0], tmp_path).rename(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert jlora.load("gpt2")[0].config.vocab_size == VOCAB


# save_pretrained


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stack", [False, True])
def test_save_and_load_again_gives_the_same_bits(checkpoint, tmp_path, dtype, stack):
    model, params = jlora.load(checkpoint[0], dtype=dtype, stack=stack)
    jlora.save_pretrained(tmp_path / "saved", model, params)
    again, params_again = jlora.load(tmp_path / "saved", dtype=dtype, stack=stack)
    assert again == model
    assert_equal(params_again, params)


SAVED = {
    "gpt2": {},
    "gpt2 untied": {"tie_word_embeddings": False},
    "llama": {},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "llama plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rms_norm_eps": 1e-3},
    "qwen2": {},
    "qwen2 untied": {"tie_word_embeddings": False, "eos_token_id": [1, 5]},
    "mistral": {},
}


@pytest.mark.parametrize("case", SAVED)
def test_transformers_reads_what_is_saved(tmp_path, case):
    oracle = make_torch_model(case.split()[0], **SAVED[case])
    oracle.save_pretrained(tmp_path / "theirs")
    model, params = jlora.load(tmp_path / "theirs", dtype=jnp.float32)
    jlora.save_pretrained(tmp_path / "ours", model, params)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(config) is type(oracle.config) and config.dtype == torch.float32
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(oracle)
    np.testing.assert_array_equal(torch_logits(again.eval(), token_ids()), torch_logits(oracle, token_ids()))
    for name in ("bos_token_id", "eos_token_id"):
        assert getattr(again.generation_config, name) == getattr(oracle.config, name)


def test_readers_of_transformers_4_find_their_fields(checkpoints, tmp_path):
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.bfloat16)
    jlora.save_pretrained(tmp_path, model, params)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["rope_theta"] == 500000.0 and fields["torch_dtype"] == fields["dtype"] == "bfloat16"
    assert fields["rope_scaling"] == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    edit_json(tmp_path / "config.json", lambda fields: fields.pop("rope_parameters"))
    assert jlora.load(tmp_path)[0] == model


def test_shards_of_the_asked_size(checkpoint, tmp_path):
    directory, oracle = checkpoint
    model, params = jlora.load(directory, dtype=jnp.float32)
    jlora.save_pretrained(tmp_path, model, params, max_shard_bytes=40_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / WEIGHTS).exists()
    assert all(sum(t.nbytes for t in load_file(s).values()) <= 40_000 for s in shards)
    assert_equal(jlora.load(tmp_path, dtype=jnp.float32)[1], params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(torch_logits(again, token_ids()), torch_logits(oracle, token_ids()))


@pytest.mark.few(1)
@pytest.mark.parametrize("stack", [False, True])
def test_adapters_are_merged_on_saving(checkpoints, tmp_path, stack):
    model, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32, stack=stack)
    adapter, base = jlora.split(jlora.add_lora(params, jlora.LoraConfig(rank=2), key=jax.random.key(0)))
    adapted = jlora.combine(jax.tree.map(lambda x: x + 0.05, adapter), base)
    jlora.save_pretrained(tmp_path, model, adapted)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert np.abs(torch_logits(oracle, token_ids()) - logits(model, adapted)).max() <= 1e-4
    assert np.abs(torch_logits(oracle, token_ids()) - logits(model, params)).max() > 1e-1


@pytest.mark.parametrize("existing", [WEIGHTS, INDEX, "model-00001-of-00002.safetensors", "adapter_model.safetensors"])
def test_existing_weights_are_not_overwritten(checkpoints, tmp_path, existing):
    model, params = jlora.load(checkpoints["gpt2"][0])
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=existing):
        jlora.save_pretrained(tmp_path, model, params)
    assert [f.name for f in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_bytes() == b"precious"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stack", [False, True])
def test_what_is_not_finite_is_not_saved(checkpoints, tmp_path, value, stack):
    model, params = jlora.load(checkpoints["gpt2"][0], stack=stack)
    params = jlora.add_lora(params, jlora.LoraConfig(rank=2, targets=["c_fc"]), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    adapter = jax.tree.map(lambda x: x.at[..., -1, -1].set(value), adapter)
    with pytest.raises(ValueError, match="'transformer/h/./mlp/c_fc/kernel' is not finite.*nothing was written"):
        jlora.save_pretrained(tmp_path / "out", model, jlora.combine(adapter, base))
    assert not (tmp_path / "out").exists()


def test_rope_fields_that_disagree_are_refused(checkpoints, tmp_path):
    copy = copy_of(checkpoints["llama"][0], tmp_path)
    config = json.loads((copy / "config.json").read_text())
    agreeing = dict(config["rope_parameters"])
    (copy / "config.json").write_text(json.dumps(config | {"rope_scaling": agreeing}))
    jlora.load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"rope_scaling": agreeing | {"factor": 8.0}}))
    with pytest.raises(ValueError, match=r"`rope_scaling.factor` in config.json disagree: 32.0 and 8.0"):
        jlora.load(copy)
