"""Models and adapters from outside: each field right, or one error that names the file and the field."""

import itertools
import json
import re
import shutil
import struct
import time
import warnings

import bitsandbytes
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from oracles import torch_logits
from safetensors.numpy import load_file, save_file

import jlora
from jlora.files.peft import known_fields
from jlora.lora import LoraConfig
from jlora.lora.kinds import KINDS
from jlora.tree.modules import names_match, pattern_matches

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = "examples/assets/tiny-llama"
IDS = np.arange(100, 140)[None]


def edited(directory, target, file="config.json", **fields):
    """A copy with fields of a JSON file changed."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


def logits(model, params):
    return np.asarray(model.apply({"params": params}, IDS))


# The rotation, in both spellings

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
OLD_LLAMA3 = {"type" if name == "rope_type" else name: value for name, value in LLAMA3.items()}
SAME = {
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "transformers 5 without a type": {"rope_parameters": {"rope_theta": 5e4}},
    "transformers 4": {"rope_theta": 5e4},
    "transformers 4, null": {"rope_theta": 5e4, "rope_scaling": None},
    "transformers 4, empty": {"rope_theta": 5e4, "rope_scaling": {}},
    "both, theta outside": {"rope_theta": 5e4, "rope_scaling": {"rope_type": "default"}, "rope_parameters": None},
    "both alike": {"rope_theta": 5e4, "rope_parameters": {"rope_type": "default", "rope_theta": 50000}},
    "an integer": {"rope_theta": 50000},
    "nothing": {},
    "all of the head": {"rope_theta": 5e4, "partial_rotary_factor": 1.0},
    "llama3, 4": {"rope_theta": 5e4, "rope_scaling": OLD_LLAMA3},
    "llama3, 4, later": {"rope_theta": 5e4, "rope_scaling": LLAMA3},
    "llama3, 5": {"rope_parameters": LLAMA3 | {"rope_theta": 5e4}},
    "linear": {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3, theta outside": {"rope_theta": 5e4, "rope_parameters": LLAMA3},
}
DISAGREE = {
    "theta outside": ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "10000.0 and 500000.0"),
    "theta outside beside both": (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5},
        "10000.0 and 500000.0",
    ),
    "types": ({"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "default"}}, "'llama3' and 'default'"),
    "factors": ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}}, "8.0 and 4.0"),
    "type and rope_type": ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "'linear' and 'default'"),
    "original length": ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "32 and 64"),
    "part of the head": ({"rope_parameters": {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5}, "1.0 and 0.5"),
    "linear without a factor": ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "half the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "for each type of layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each type of layer"),
    "a factor is missing": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    "theta is zero": ({"rope_theta": 0}, "rope_theta"),
    "theta is infinite": ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
    "theta is text": ({"rope_theta": "10000"}, "rope_theta"),
    "a list": ({"rope_scaling": [1]}, "rope_scaling"),
    "the type is a list": ({"rope_scaling": {"type": ["llama3"]}}, "rope type"),
}  # fmt: skip


def with_rope(target, fields):
    shutil.copytree(MODEL, target)
    config = json.loads((target / "config.json").read_text())
    config = {name: value for name, value in config.items() if "rope" not in name}
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


@pytest.mark.few(4)
@pytest.mark.parametrize("case", SAME)
def test_rotations_are_those_of_transformers(case, tmp_path):
    directory = with_rope(tmp_path / "m", SAME[case])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    np.testing.assert_allclose(logits(*jlora.load(directory, dtype="float32")), torch_logits(oracle, IDS), atol=1e-4)


@pytest.mark.parametrize("case", DISAGREE)
def test_rotations_that_cannot_be_told_are_refused(case, tmp_path):
    fields, says = DISAGREE[case]
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        jlora.load(with_rope(tmp_path / "m", fields))
    assert "config.json" in str(error.value)


# Fields of config.json and adapter_config.json

CONFIG = {
    "num_hidden_layers": (10**6, 0, -1, 1.0, True, "2", [], 2**63),
    "hidden_size": (2**63, 10**30, 0, "128", 128.0),
    "vocab_size": (True, 2**40, -5, {}),
    "num_attention_heads": (0, 2**20, "4"),
    "num_key_value_heads": (0, 3, 1.0, False),
    "head_dim": (0, 33, 2**30, "32"),
    "intermediate_size": (384.0, 0, [384]),
    "max_position_embeddings": (0, 2**63, "long"),
    "rms_norm_eps": (float("inf"), float("nan"), 0, -1e-5, "1e-5", True),
    "tie_word_embeddings": ("false", 0, 1, []),
    "attention_bias": ("true", 1),
    "mlp_bias": ("no",),
    "hidden_act": ("gelu", 5, ["silu"]),
    "bos_token_id": ([], "0", -1, 2**31, 1.5, True),
    "eos_token_id": ([], [[2]], ["2"], 2**64),
    "quantization_config": ("bitsandbytes", ["x"], {"quant_method": "gptq"}, 7),
    "layer_types": (["sliding_attention"], "full_attention"),
    "model_type": ("evil", [], None, 3),
    "pretraining_tp": (2, "1"),
}
ADAPTER = {
    "r": (0, -1, 2**63, "8", 8.0, True, None, [8]),
    "lora_alpha": (True, 1e308, float("nan"), float("inf"), 0, -1, "16"),
    "target_modules": (
        5,
        True,
        [1],
        {"q_proj": 1},
        None,
        "(",
        "(" * 9000,
        "a{99999999999}",
        r"(.*?)*\d\d",
        "[[:alpha:]]*",
    ),
    "exclude_modules": (5, True, [None]),
    "modules_to_save": (5, True, [[]]),
    "layers_to_transform": (0.5, True, "0", [0.5], [-1], [2**63]),
    "rank_pattern": ([1], {"q_proj": "4"}, {"q_proj": 2**63}, {"(": 4}, 3),
    "alpha_pattern": ([1], {"q_proj": True}, {"q_proj": 1e308}, "x"),
    "lora_dropout": (1.0, -0.1, "0", True, float("nan")),
    "use_rslora": ("false", 0, 1, []),
    "use_dora": ("false", 1),
    "init_lora_weights": (3, [], {}),
    "bias": ("some", True, 5, []),
    "peft_type": ("IA3", None, 5, []),
    "base_model_name_or_path": (True, ["a"], 5),
    "lora_bias": (True, "x"),
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize("name, value", cases(CONFIG), ids=str)
def test_fields_of_a_model(name, value, tmp_path):
    with pytest.raises(ValueError, match=name) as error:
        jlora.load(edited(MODEL, tmp_path / "m", **{name: value}))
    assert len(str(error.value)) < 2000 and "config.json" in str(error.value)


@pytest.fixture(scope="module")
def base():
    return jlora.load(MODEL, dtype="float32")[1]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(rank=2, targets=["q_proj", "v_proj"])
    jlora.save_adapter(directory, trained(base, config), config=config, base_model=MODEL)
    return directory


def trained(base, config):
    """An adapter whose every factor says something."""
    adapter, rest = jlora.split(jlora.add_lora(base, config, key=jax.random.key(0)))
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.05 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jlora.combine(jax.tree.unflatten(structure, leaves), rest)


@pytest.mark.parametrize("name, value", cases(ADAPTER), ids=lambda v: str(v)[:30])
def test_fields_of_an_adapter(name, value, adapter, base, tmp_path):
    directory = edited(adapter, tmp_path / "a", "adapter_config.json", **{name: value})
    with pytest.raises(ValueError) as error:
        jlora.load_adapter(directory, base)
        jlora.files.base_model_of(directory)
    assert type(error.value) is ValueError and len(str(error.value)) < 3000
    ours = {"r": "rank", "target_modules": "targets", "lora_alpha": "alpha"}
    assert (
        name in str(error.value) or ours.get(name, name) in str(error.value) or "regular expression" in str(error.value)
    )


def test_peft_fields_that_nobody_knows_are_named_once(adapter, base, tmp_path):
    directory = edited(adapter, tmp_path / "a", "adapter_config.json", brand_new_feature=True, another=None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        jlora.load_adapter(directory, base)
    (warning,) = [w for w in seen if "adapter_config.json" in str(w.message)]
    assert "brand_new_feature = True" in str(warning.message) and "another" not in str(warning.message)


def test_every_field_of_peft_is_known():
    import dataclasses

    for name, theirs in {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "miss": peft.MissConfig}.items():
        known = known_fields(KINDS[name]) | set(KINDS[name].PEFT.training)
        assert {field.name for field in dataclasses.fields(theirs)} <= known


EXPRESSIONS = (
    r".*\.(q|v)_proj", r".*layers\.[0-2]\..*q_proj", r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj)", r"^model.*$",
    r"(?!.*mlp).*proj", r".*\.(?:[0-9]|1[0-9])\..*", r"(?i).*Q_PROJ", r"(?P<a>model).*", r"a|b|.*q_proj", r"\w+(\.\w+)*",
    r".*\.h\.\d+\..*c_attn", r".*(?<=self_attn\.)q_proj", r"[\w.]+q_proj\Z", r".{3,}q_proj", r"x{0}.*", r"(.+)+X", r"",
)  # fmt: skip


def test_expressions_match_as_in_re():
    modules = (
        "model.layers.3.self_attn.q_proj",
        "model.layers.12.mlp.up_proj",
        "transformer.h.0.attn.c_attn",
        "lm_head",
    )
    for expression, module in itertools.product(EXPRESSIONS, modules):
        if expression != r"(.+)+X":  # takes `re` half a minute
            assert names_match(expression, module) == bool(re.fullmatch(expression, module)), (expression, module)
            if "(?i)" not in expression:
                expected = bool(re.match(rf"(.*\.)?({expression})$", module))
                assert pattern_matches(expression, module) == expected, (expression, module)


# Adapters whose tensors fit

FITS = {
    "a dead target": {"target_modules": ["q_proj", "v_proj", "c_attn"]},
    "a dead exclusion": {"exclude_modules": ["lm_head", "c_attn"]},
    "an expression that excludes nothing": {"exclude_modules": r".*\.vision\..*"},
    "a dead rank": {"rank_pattern": {"c_attn": 64}},
    "a dead alpha": {"alpha_pattern": {"o_proj": 64}},
    "a dead module to save": {"modules_to_save": ["score", "classifier"]},
    "layers beyond the depth": {"layers_to_transform": list(range(40))},
    "layers with their pattern": {"layers_to_transform": list(range(40)), "layers_pattern": "layers"},
    "layers beside whole paths": None,
    "biases where there are none": {"bias": "lora_only"},
    "an expression": {"target_modules": r".*\.(q_proj|v_proj)"},
}


@pytest.mark.few(5)
@pytest.mark.parametrize("case", FITS)
def test_adapters_that_fit_are_read_as_peft_reads_them(case, adapter, base, tmp_path):
    fields = FITS[case]
    if fields is None:
        names = [n for n in load_file(adapter / "adapter_model.safetensors") if ".lora_A." in n]
        paths = [n.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for n in names]
        fields = {"target_modules": paths, "layers_to_transform": [0]}
    directory = edited(adapter, tmp_path / "a", "adapter_config.json", **fields)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    oracle = peft.PeftModel.from_pretrained(oracle, directory).eval()
    model, _ = jlora.load(MODEL, dtype="float32")
    params = jlora.load_adapter(directory, base)
    np.testing.assert_allclose(logits(model, params), torch_logits(oracle, IDS), atol=1e-4)
    # And written again.
    config = LoraConfig.load(directory)
    jlora.save_adapter(tmp_path / "b", params, config=config, base_model=MODEL)
    np.testing.assert_array_equal(logits(model, jlora.load_adapter(tmp_path / "b", base)), logits(model, params))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=2, layers_to_transform=[0, 1], exclude=r".*\.1\..*"),
        LoraConfig(rank=2, layers_to_transform=1),
        LoraConfig(rank=2, targets=["q_proj", "lm_head"], layers_to_transform=[0]),
        LoraConfig(rank=2, exclude=["q_proj", "up_proj"], rank_pattern={r"layers\.0\..*": 3}),
        LoraConfig(rank=2, targets=r".*0\.self_attn\.[qk]_proj", modules_to_save=["norm"]),
        LoraConfig(rank=2, targets=["embed_tokens", "o_proj"], use_dora=True, layers_to_transform=[0]),
    ],
    ids=str,
)
def test_what_jlora_writes_both_read(config, base, tmp_path):
    if "lm_head" in config.targets and "lm_head" not in base:
        config = LoraConfig(rank=2, targets=["q_proj", "embed_tokens"], layers_to_transform=[0, 1])
    model, _ = jlora.load(MODEL, dtype="float32")
    params = trained(base, config)
    jlora.save_adapter(tmp_path, params, config=config, base_model=MODEL)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not (fields["layers_to_transform"] and any("." in name for name in fields["target_modules"]))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    oracle = peft.PeftModel.from_pretrained(oracle, tmp_path).eval()
    np.testing.assert_allclose(logits(model, jlora.load_adapter(tmp_path, base)), torch_logits(oracle, IDS), atol=1e-4)


def test_names_that_mean_nothing_explain_a_misfit(adapter, base, tmp_path):
    directory = edited(adapter, tmp_path / "a", "adapter_config.json", target_modules=["q_proj", "v_porj"])
    with pytest.raises(ValueError, match=r"unexpected: .*v_proj(.|\n)*'v_porj' matches no linear kernel"):
        jlora.load_adapter(directory, base)


# Not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_adapters_that_are_not_finite_are_refused(value, base, tmp_path):
    config = LoraConfig(rank=2, targets=["q_proj"], use_dora=True, modules_to_save=["norm"])
    params = trained(base, config)
    jlora.save_adapter(tmp_path, params, config=config, base_model=MODEL)
    jlora.save_adapter(tmp_path / "second", params, config=config, base_model=MODEL)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for kind in ("lora_A", "lora_B", "magnitude", "model.norm"):
        name = next(n for n in tensors if kind in n)
        bad = tensors[name].copy()
        bad.reshape(-1)[-1] = value
        save_file(tensors | {name: bad}, file, metadata={"format": "pt"})
        for read in (jlora.load_adapter, jlora.files.load_adapters):
            with pytest.raises(ValueError, match=re.escape(name)):
                read(tmp_path, base)


def test_mlx_adapters_that_are_not_finite_are_refused(base, tmp_path):
    model, _ = jlora.load(MODEL)
    config = LoraConfig(rank=2, targets=["q_proj"])
    jlora.files.save_mlx_adapter(tmp_path, trained(base, config), config=config, model=model)
    tensors = load_file(tmp_path / "adapters.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match=re.escape(name)):
        jlora.load_adapter(tmp_path, base)


@pytest.mark.parametrize("quantize", [None, jlora.NF4()])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_models_that_are_not_finite_are_refused(name, quantize, tmp_path):
    shutil.copytree(MODEL, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[7] = np.inf
    save_file(tensors, file, metadata={"format": "pt"})
    for stack in (False, True):
        with pytest.raises(ValueError, match=re.escape(name)):
            jlora.load(tmp_path / "m", quantize=quantize, stack=stack)


def test_inspect_does_not_call_it_untrained(adapter, tmp_path):
    from jlora.cli.inspect import adapter_table

    shutil.copytree(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    zero = {n: np.zeros_like(t) if ".lora_B." in n else np.full_like(t, np.nan) for n, t in tensors.items()}
    save_file(zero, file, metadata={"format": "pt"})
    cells = list(adapter_table(str(tmp_path / "a")).columns[3].cells)
    assert cells and set(cells) == {"not finite"}


# bitsandbytes' bytes under other dtypes


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """bnb_4bit_quant_storage -> (directory, transformers' model)."""
    made = {}
    for storage in ("uint8", "bfloat16", "float16", "float32"):
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_quant_storage=storage,
            bnb_4bit_use_double_quant=storage == "bfloat16",
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )
        directory = tmp_path_factory.mktemp(storage)
        model.save_pretrained(directory)
        made[storage] = directory, model
    return made


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_packed_bytes_are_read_under_any_dtype(storage, packed):
    directory, oracle = packed[storage]
    assert any(
        t.dtype.name == storage for n, t in load_file(directory / "model.safetensors").items() if "up_proj.weight" in n
    )
    _, params = jlora.load(directory, dtype="float32")
    for i, layer in enumerate(oracle.model.layers):
        theirs = layer.mlp.up_proj.weight
        dense = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state).float().numpy()
        ours = params["model"]["layers"][str(i)]["mlp"]["up_proj"]["kernel"]
        np.testing.assert_array_equal(np.asarray(jlora.dequantize(ours, dtype="float32")).T, dense)
    if storage in ("float16", "float32"):
        for ours, theirs in zip(
            *map(jax.tree.leaves, (params, jlora.load(packed["uint8"][0], dtype="float32")[1])), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


STATES = {
    "shape": [1, 2, 3], "blocksize": 63, "quant_type": "fp4", "dtype": "float64", "nested_blocksize": 128, "nested_offset": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", STATES)
def test_quantization_states_of_other_kinds_are_refused(field, packed, tmp_path):
    shutil.copytree(packed["bfloat16"][0], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "quant_state" in n)
    for value in (STATES[field], None, [], {}, True):
        state = json.loads(tensors[name].tobytes()) | {field: value}
        save_file(
            tensors | {name: np.frombuffer(json.dumps(state).encode(), np.uint8)}, file, metadata={"format": "pt"}
        )
        with pytest.raises(ValueError, match=f"quantization state(.|\n)*{field}"):
            jlora.load(tmp_path / "m")


# Files of weights


def test_weights_that_are_no_file(tmp_path):
    for number, make in enumerate(
        (lambda p: p.mkdir(), lambda p: p.symlink_to(p.name), lambda p: p.symlink_to("nowhere"))
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        shutil.copy(f"{MODEL}/config.json", directory)
        make(directory / "model.safetensors")
        with pytest.raises(ValueError, match="is not a file"):
            jlora.load(directory)


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    shutil.copytree(MODEL, tmp_path / "m")
    opened = type(tmp_path).open

    def denied(path, *args, **kwargs):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), "open", denied)
    with pytest.raises(ValueError, match="Permission denied"):
        jlora.load(tmp_path / "m")


def test_tensors_that_the_index_does_not_list_are_seen(tmp_path):
    shutil.copytree(MODEL, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "part.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(list(tensors)[1:], "part.safetensors")}))
    jlora.load(tmp_path / "m")
    save_file(
        tensors | {"model.more": np.zeros(3, np.float32)},
        tmp_path / "m" / "part.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"unexpected: model\.more"):
        jlora.load(tmp_path / "m")


# Mutations of every file: read, or one error

VALUES = (None, True, 0, -1, 2**63, 0.5, 1e308, float("nan"), "", "text", [], [[]], {}, {"a": {}})
JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


DAMAGED = (
    b"",
    b"[]",
    b"null",
    b"7",
    b"{",
    b"\xff\xfe",
    b"[" * 99_999,
    b'{"a":' * 99_999,
    b'{"a":' + b"9" * 9999 + b"}",
)


def mutations(fields, depth=2, path=()):
    """Every place of an object, some levels deep, with every value; and without it."""
    for name in fields:
        yield (*path, name), ...
        for value in VALUES:
            yield (*path, name), value
        if depth and isinstance(fields[name], dict) and len(fields[name]) < 40:
            yield from mutations(fields[name], depth - 1, (*path, name))


def mutated(fields, path, value):
    copy = json.loads(json.dumps(fields))
    node = copy
    for name in path[:-1]:
        node = node[name]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copy


def assert_read_or_refused(call, what):
    started = time.process_time()
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), (what, type(error))
        assert 20 < len(str(error)) < 6000, what
    except BaseException as error:  # noqa: BLE001
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.process_time() - started < 20, what


def fuzz(every, tmp_path, adapter, base):
    model = tmp_path / "m"
    shutil.copytree(MODEL, model)
    (model / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    )
    shutil.copytree(adapter, tmp_path / "a")
    readers = {
        **{model / file: lambda: jlora.load_tokenizer(model) for file in JSON_FILES},
        model / "config.json": lambda: jlora.load(model),
        tmp_path / "a" / "adapter_config.json": lambda: jlora.load_adapter(tmp_path / "a", base),
    }
    count = 0
    for file, read in readers.items():
        whole = file.read_bytes()
        fields = json.loads(whole)
        for path, value in itertools.islice(mutations(fields), 0, None, every):
            file.write_text(json.dumps(mutated(fields, path, value)))
            assert_read_or_refused(read, (file.name, path, value))
            count += 1
        for content in DAMAGED:
            file.write_bytes(content)
            assert_read_or_refused(read, (file.name, content[:20]))
            count += 1
        file.write_bytes(whole)
    return count


def headers(every, tmp_path):
    model = tmp_path / "h"
    shutil.copytree(MODEL, model)
    file = model / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    fields, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in fields if name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")]
    chosen = {name: fields[name] for name in names}
    for path, value in itertools.islice(mutations(chosen), 0, None, every):
        encoded = json.dumps(fields | mutated(chosen, path, value)).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        assert_read_or_refused(lambda: jlora.load(model), (path, value))


def test_some_mutations_are_read_or_refused(tmp_path, adapter, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fuzz(23, tmp_path, adapter, base) > 60
        headers(17, tmp_path)


@pytest.mark.slow
def test_all_mutations_are_read_or_refused(tmp_path, adapter, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fuzz(1, tmp_path, adapter, base) > 1000
        headers(1, tmp_path)
