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


LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

MODELS = {
    "empty weights": text(WEIGHTS, b""),
    "seven bytes": text(WEIGHTS, b"1234567"),
    "header longer than the file": raw(lambda d: struct.pack("<Q", 1 << 40) + d[8:]),
    "header length of 2^64 - 1": raw(lambda d: b"\xff" * 8 + d[8:]),
    "header length of zero": raw(lambda d: struct.pack("<Q", 0) + d[8:]),
    "header is not JSON": raw(lambda d: d[:8] + b"}" + d[9:]),
    "header is not UTF-8": raw(lambda d: d[:9] + b"\xff\xfe" + d[11:]),
    "header is a list": header(lambda h: []),
    "data cut by a byte": raw(lambda d: d[:-1]),
    "data cut in half": raw(lambda d: d[: len(d) // 2]),
    "data too long": raw(lambda d: d + b"\0" * 64),
    "header alone": raw(lambda d: d[: 8 + struct.unpack("<Q", d[:8])[0]]),
    "a zip instead": text(WEIGHTS, b"PK\x03\x04" + b"\0" * 400),
    "a pickle instead": text(WEIGHTS, b"\x80\x04\x95" + b"\0" * 400),
    "unknown dtype": entry(dtype="F31"),
    "integer dtype of the same size": entry(dtype="I32"),
    "dtype of another size": entry(dtype="F16"),
    "offsets that overlap": entry(data_offsets=[0, 4 * 64 * 48]),
    "offsets reversed": entry(data_offsets=[64, 0]),
    "offsets past the end": entry(data_offsets=[1 << 40, (1 << 40) + 4 * 64 * 48]),
    "negative offset": entry(data_offsets=[-4, 4 * 64 * 48 - 4]),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "negative dimension": entry(shape=[-64, -48]),
    "dimensions that overflow": entry(shape=[1 << 33, 1 << 33]),
    "transposed shape": entry(shape=[48, 64]),
    "shape of another rank": entry(shape=[64 * 48]),
    "no shape": header(lambda h: h[NAME].pop("shape") and None),
    "renamed tensor": header(lambda h: h.__setitem__(NAME + "s", h.pop(NAME))),
    "index leads out of the directory": index(lambda names: dict.fromkeys(names, "../model-00001.safetensors")),
    "index with an absolute path": index(lambda names: dict.fromkeys(names, "/etc/passwd")),
    "index names a missing shard": index(lambda names: dict.fromkeys(names, "model-00002.safetensors")),
    "index with numbers for files": index(lambda names: dict.fromkeys(names, 1)),
    "index is a list": index(lambda names: ["model-00001.safetensors"]),
    "index promises what is not there": index(lambda names: dict.fromkeys([*names, "more"], "model-00001.safetensors")),
    "config is empty": text(CONFIG, ""),
    "config is a list": text(CONFIG, "[]"),
    "config is cut": raw(lambda d: d[:-5], CONFIG),
    "config without a family": edit_json(CONFIG, lambda c: c.pop("model_type") and None),
    "unknown family": set_config(model_type="mamba"),
    "no layers": set_config(num_hidden_layers=0),
    "negative width": set_config(hidden_size=-48),
    "width as text": set_config(hidden_size="48"),
    "a billion layers": set_config(num_hidden_layers=3),
    "vocabulary of another size": set_config(vocab_size=12345),
    "heads that do not divide": set_config(num_attention_heads=5, head_dim=None),
    "key heads that do not divide": set_config(num_key_value_heads=3),
    "epsilon of zero": set_config(rms_norm_eps=0),
    "unknown activation": set_config(hidden_act="relu"),
    "rope is a number": set_config(rope_parameters=7),
    "unknown rope": set_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
    "llama3 rope without its factors": set_config(rope_parameters={"rope_type": "llama3"}),
    "tied is a word": set_config(tie_word_embeddings="yes"),
    "quantized by another method": set_config(quantization_config={"quant_method": "gptq"}),
}

ADAPTERS = {
    "no config": lambda d: (d / ADAPTER_CONFIG).unlink(),
    "no weights": lambda d: (d / ADAPTER).unlink(),
    "config is a list": text(ADAPTER_CONFIG, "[]"),
    "config is cut": raw(lambda d: d[:-5], ADAPTER_CONFIG),
    "another method": edit_json(ADAPTER_CONFIG, lambda c: c.update(peft_type="IA3")),
    "rank of zero": edit_json(ADAPTER_CONFIG, lambda c: c.update(r=0)),
    "rank as text": edit_json(ADAPTER_CONFIG, lambda c: c.update(r="8")),
    "another rank than the weights'": edit_json(ADAPTER_CONFIG, lambda c: c.update(r=3)),
    "a broken expression": edit_json(ADAPTER_CONFIG, lambda c: c.update(target_modules="(")),
    "targets of another model": edit_json(ADAPTER_CONFIG, lambda c: c.update(target_modules=["c_attn"])),
    "a kind that is not supported": edit_json(ADAPTER_CONFIG, lambda c: c.update(layer_replication=[[0, 2]])),
    "weights cut": raw(lambda d: d[:-1], ADAPTER),
    "weights are not safetensors": text(ADAPTER, b"PK\x03\x04" + b"\0" * 99),
    "a missing prefix": header(lambda h: h.__setitem__(LORA_A.removeprefix("base_model."), h.pop(LORA_A)), ADAPTER),
    "a key too many": header(lambda h: h.__setitem__("more", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), ADAPTER),
    "integers for weights": entry(ADAPTER, LORA_A, dtype="I32"),
}  # fmt: skip


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
    MODELS[case](directory)
    refused(lambda: jlora.load(directory), directory)


@pytest.mark.parametrize("case", ADAPTERS)
def test_malformed_adapters_are_refused(case, checkpoints, adapter, tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(adapter, directory)
    _, params = jlora.load(checkpoints["llama"][0])
    jlora.load_adapter(directory, params)
    ADAPTERS[case](directory)
    refused(lambda: jlora.load_adapter(directory, params), directory)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), new=st.binary(min_size=1, max_size=12), keep=st.floats(0, 1), cut=st.booleans())
def test_any_damage_to_the_header_is_an_error_or_harmless(checkpoints, tmp_path, at, new, keep, cut):
    """Bytes overwritten anywhere in the header, or the file cut: an explained error, or the shapes that config.json asks for."""
    source = checkpoints["llama"][0]
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
        assert len(str(error)) > 20
    else:
        assert all(np.asarray(leaf).size for leaf in jax.tree.leaves(params))
