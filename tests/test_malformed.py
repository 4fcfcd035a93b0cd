"""Broken and hostile inputs: each is refused with a clear error, quickly, and nothing is written."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
from damage import WEIGHTS, edit_json, header, raw, refused, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jlora
from jlora.storage import Checkpoint

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "model.layers.0.mlp.up_proj.weight"


def entry(file=WEIGHTS, name=NAME, **fields):
    return header(lambda h: h[name].update(fields), file)


def index(weight_map):
    def apply(directory):
        names = list(Checkpoint(directory).shapes)
        mapped = weight_map(names)
        (directory / INDEX).write_text(json.dumps({"weight_map": mapped} if isinstance(mapped, dict) else mapped))
        (directory / WEIGHTS).rename(directory / "model-00001.safetensors")

    return apply


def set_config(**fields):
    return edit_json(CONFIG, lambda c: c.update(fields))


def set_adapter(**fields):
    return edit_json(ADAPTER_CONFIG, lambda c: c.update(fields))


LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

BROKEN = "is not a valid safetensors file"

MODELS = {
    "empty weights": (text(WEIGHTS, b""), BROKEN),
    "seven bytes": (text(WEIGHTS, b"1234567"), BROKEN),
    "header longer than the file": (raw(lambda d: struct.pack("<Q", 1 << 40) + d[8:]), BROKEN),
    "header length of 2^64 - 1": (raw(lambda d: b"\xff" * 8 + d[8:]), BROKEN),
    "header length of zero": (raw(lambda d: struct.pack("<Q", 0) + d[8:]), BROKEN),
    "header is not JSON": (raw(lambda d: d[:8] + b"}" + d[9:]), BROKEN),
    "header is not UTF-8": (raw(lambda d: d[:9] + b"\xff\xfe" + d[11:]), BROKEN),
    "header is a list": (header(lambda h: []), BROKEN),
    "data cut by a byte": (raw(lambda d: d[:-1]), BROKEN),
    "data cut in half": (raw(lambda d: d[: len(d) // 2]), BROKEN),
    "data too long": (raw(lambda d: d + b"\0" * 64), BROKEN),
    "header alone": (raw(lambda d: d[: 8 + struct.unpack("<Q", d[:8])[0]]), BROKEN),
    "a zip instead": (text(WEIGHTS, b"PK\x03\x04" + b"\0" * 400), BROKEN),
    "a pickle instead": (text(WEIGHTS, b"\x80\x04\x95" + b"\0" * 400), BROKEN),
    "unknown dtype": (entry(dtype="F31"), BROKEN),
    "integer dtype of the same size": (
        entry(dtype="I32"),
        "dtype: model.layers.0.mlp.up_proj.weight is I32, should be F64 or F32 or F16 or BF16",
    ),
    "dtype of another size": (entry(dtype="F16"), BROKEN),
    "offsets that overlap": (entry(data_offsets=[0, 4 * 64 * 48]), BROKEN),
    "offsets reversed": (entry(data_offsets=[64, 0]), BROKEN),
    "offsets past the end": (entry(data_offsets=[1 << 40, (1 << 40) + 4 * 64 * 48]), BROKEN),
    "negative offset": (entry(data_offsets=[-4, 4 * 64 * 48 - 4]), BROKEN),
    "three offsets": (entry(data_offsets=[0, 1, 2]), BROKEN),
    "negative dimension": (entry(shape=[-64, -48]), BROKEN),
    "dimensions that overflow": (entry(shape=[1 << 33, 1 << 33]), BROKEN),
    "transposed shape": (
        entry(shape=[48, 64]),
        "shape: model.layers.0.mlp.up_proj.weight is (48, 64), should be (64, 48)",
    ),
    "shape of another rank": (
        entry(shape=[64 * 48]),
        "shape: model.layers.0.mlp.up_proj.weight is (3072,), should be (64, 48)",
    ),
    "no shape": (header(lambda h: h[NAME].pop("shape") and None), BROKEN),
    "renamed tensor": (
        header(lambda h: h.__setitem__(NAME + "s", h.pop(NAME))),
        "missing: model.layers.0.mlp.up_proj.weight (64, 48) (there is model.layers.0.mlp.up_proj.weights)",
    ),
    "index leads out of the directory": (
        index(lambda names: dict.fromkeys(names, "../model-00001.safetensors")),
        "names the shard '../model-00001.safetensors'; a shard must be a file beside the index",
    ),
    "index with an absolute path": (
        index(lambda names: dict.fromkeys(names, "/etc/passwd")),
        "names the shard '/etc/passwd'; a shard must be a file beside the index",
    ),
    "index names a missing shard": (
        index(lambda names: dict.fromkeys(names, "model-00002.safetensors")),
        "The shard 'model-00002.safetensors' of",
    ),
    "index with numbers for files": (
        index(lambda names: dict.fromkeys(names, 1)),
        "`weight_map` must be an object, each value text",
    ),
    "index is a list": (
        index(lambda names: ["model-00001.safetensors"]),
        "model.safetensors.index.json' must hold a JSON object; got a list",
    ),
    "index promises what is not there": (
        index(lambda names: dict.fromkeys([*names, "more"], "model-00001.safetensors")),
        "places ['more'] in 'model-00001.safetensors', which does not hold them",
    ),
    "config is empty": (text(CONFIG, ""), "config.json' is not valid JSON"),
    "config is a list": (text(CONFIG, "[]"), "config.json' must hold a JSON object; got a list"),
    "config is cut": (raw(lambda d: d[:-5], CONFIG), "config.json' is not valid JSON"),
    "config without a family": (
        edit_json(CONFIG, lambda c: c.pop("model_type") and None),
        "config.json has `model_type` None; jlora runs",
    ),
    "unknown family": (set_config(model_type="mamba"), "config.json has `model_type` 'mamba'; jlora runs"),
    "no layers": (set_config(num_hidden_layers=0), "`num_hidden_layers` in config.json must be an integer from 1"),
    "negative width": (set_config(hidden_size=-48), "`hidden_size` in config.json must be an integer from 1"),
    "width as text": (set_config(hidden_size="48"), "got '48'"),
    "a billion layers": (set_config(num_hidden_layers=3), "missing: model.layers.2.input_layernorm.weight (48,)"),
    "vocabulary of another size": (
        set_config(vocab_size=12345),
        "shape: lm_head.weight is (97, 48), should be (12345, 48)",
    ),
    "heads that do not divide": (
        set_config(num_attention_heads=5, head_dim=None),
        "`head_dim` in config.json must be even, for its rotation by pairs; got 9",
    ),
    "key heads that do not divide": (
        set_config(num_key_value_heads=3),
        "`num_key_value_heads` in config.json must divide `num_attention_heads` = 4; got 3",
    ),
    "epsilon of zero": (
        set_config(rms_norm_eps=0),
        "`rms_norm_eps` in config.json must be a positive number up to 1; got 0",
    ),
    "unknown activation": (set_config(hidden_act="relu"), "config.json has `hidden_act` = 'relu'"),
    "rope is a number": (set_config(rope_parameters=7), "`rope_parameters` in config.json must be an object; got 7"),
    "unknown rope": (
        set_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "config.json asks for rope type 'yarn'",
    ),
    "llama3 rope without its factors": (
        set_config(rope_parameters={"rope_type": "llama3"}),
        "lacks factor, low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "tied is a word": (
        set_config(tie_word_embeddings="yes"),
        "`tie_word_embeddings` in config.json must be true or false; got 'yes'",
    ),
    "quantized by another method": (set_config(quantization_config={"quant_method": "gptq"}), "is quantized ('gptq')"),
}

ADAPTERS = {
    "no config": (lambda d: (d / ADAPTER_CONFIG).unlink(), "there is no adapter_config.json"),
    "no weights": (lambda d: (d / ADAPTER).unlink(), "There is no adapter_model.safetensors in"),
    "config is a list": (text(ADAPTER_CONFIG, "[]"), "adapter_config.json' must hold a JSON object; got a list"),
    "config is cut": (raw(lambda d: d[:-5], ADAPTER_CONFIG), "adapter_config.json' is not valid JSON"),
    "another method": (set_adapter(peft_type="IA3"), "'IA3'"),
    "rank of zero": (set_adapter(r=0), "`r` must be an integer from 1"),
    "rank as text": (set_adapter(r="8"), "got '8'"),
    "another rank than the weights'": (
        set_adapter(r=3),
        "self_attn.q_proj.lora_A.weight is (2, 48), should be (3, 48)",
    ),
    "a broken expression": (set_adapter(target_modules="("), "`targets` must be a regular expression; got '('"),
    "targets of another model": (set_adapter(target_modules=["c_attn"]), "`targets` 'c_attn' matches no linear kernel"),
    "a kind that is not supported": (set_adapter(layer_replication=[[0, 2]]), "layer_replication = [[0, 2]]"),
    "weights cut": (raw(lambda d: d[:-1], ADAPTER), BROKEN),
    "weights are not safetensors": (text(ADAPTER, b"PK\x03\x04" + b"\0" * 99), BROKEN),
    "a missing prefix": (
        header(lambda h: h.__setitem__(LORA_A.removeprefix("base_model."), h.pop(LORA_A)), ADAPTER),
        "(there is model.model.layers.0.self_attn.q_proj.lora_A.weight)",
    ),
    "a key too many": (
        header(lambda h: h.__setitem__("more", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), ADAPTER),
        "unexpected: more (0,)",
    ),
    "integers for weights": (entry(ADAPTER, LORA_A, dtype="I32"), "self_attn.q_proj.lora_A.weight is I32, should be"),
}


@pytest.fixture(scope="module")
def adapter(checkpoints, tmp_path_factory):
    _, params = jlora.load(checkpoints["llama"][0], dtype="float32")
    config = jlora.LoraConfig(rank=2, targets=["q_proj"])
    directory = tmp_path_factory.mktemp("adapter")
    params = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(directory, params, config=config, base_model="base")
    return directory


@pytest.mark.parametrize("case", MODELS)
def test_malformed_models_are_refused(case, checkpoints, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(checkpoints["llama"][0], directory)
    jlora.load(directory)
    damage, says = MODELS[case]
    damage(directory)
    assert says in refused(lambda: jlora.load(directory), directory)


@pytest.mark.parametrize("case", ADAPTERS)
def test_malformed_adapters_are_refused(case, checkpoints, adapter, tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(adapter, directory)
    _, params = jlora.load(checkpoints["llama"][0])
    jlora.load_adapter(directory, params)
    damage, says = ADAPTERS[case]
    damage(directory)
    assert says in refused(lambda: jlora.load_adapter(directory, params), directory)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), new=st.binary(min_size=1, max_size=12), keep=st.floats(0, 1), cut=st.booleans())
def test_any_damage_to_the_header_is_an_error_or_harmless(checkpoints, tmp_path, at, new, keep, cut):
    """Bytes overwritten anywhere in the header, or the file cut: an explained error, or the shapes that config.json asks for."""
    source = checkpoints["llama"][0]
    shapes = jax.tree.map(np.shape, jlora.load(source)[1])
    data = bytearray((source / WEIGHTS).read_bytes())
    length = 8 + struct.unpack("<Q", data[:8])[0]
    start = int(at * (length - 1))
    data[start : start + len(new)] = new
    directory = tmp_path / "model"
    shutil.copytree(source, directory, dirs_exist_ok=True)
    (directory / WEIGHTS).write_bytes(data[: int(keep * len(data))] if cut else data)
    try:
        _, params = jlora.load(directory)
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error)
    else:
        assert jax.tree.map(np.shape, params) == shapes
