"""`LoraConfig`: its fields, its PEFT form, and the modules it means, compared live against PEFT."""

import dataclasses
import json
import math

import jax
import peft
import pytest
from oracles import make_torch_model

import jlora
from jlora import LoraConfig
from jlora.files.peft import _NEUTRAL, from_peft, to_peft
from jlora.lora import adapted_modules

DEPTH = {"gpt2": {"n_layer": 3}, "llama": {"num_hidden_layers": 3}}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """family -> unadapted parameters of three layers; Llama's head is its own."""
    made = {}
    for family, depth in DEPTH.items():
        directory = tmp_path_factory.mktemp(family)
        make_torch_model(family, **depth).save_pretrained(directory)
        made[family] = jlora.load(directory)[1]
    return made


# Fields


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rank": 0}, ["`rank`", "integer of at least 1", "got 0"]),
        ({"rank": -4}, ["`rank`", "got -4"]),
        ({"rank": 2.0}, ["`rank`", "got 2.0"]),
        ({"rank": True}, ["`rank`", "got True"]),
        ({"rank": "8"}, ["`rank`", "got '8'"]),
        ({"rank_pattern": {"q_proj": 0}}, ["`rank_pattern['q_proj']`", "integer of at least 1", "got 0"]),
        ({"rank_pattern": {"(": 4}}, ["`rank_pattern['(']`", "regular expression", "got '('"]),
        ({"alpha": 0}, ["`alpha`", "positive number", "got 0"]),
        ({"alpha": -1.0}, ["`alpha`", "got -1.0"]),
        ({"alpha": math.nan}, ["`alpha`", "got nan"]),
        ({"alpha": math.inf}, ["`alpha`", "got inf"]),
        ({"alpha": "16"}, ["`alpha`", "got '16'"]),
        ({"alpha_pattern": {"q_proj": 0.0}}, ["`alpha_pattern['q_proj']`", "positive number", "got 0.0"]),
        ({"alpha_pattern": {"*": 1.0}}, ["`alpha_pattern['*']`", "regular expression", "got '*'"]),
        ({"dropout": 1.0}, ["`dropout`", "[0, 1)", "got 1.0"]),
        ({"dropout": -0.1}, ["`dropout`", "got -0.1"]),
        ({"dropout": math.nan}, ["`dropout`", "got nan"]),
        ({"dropout": "0.1"}, ["`dropout`", "got '0.1'"]),
        ({"init": "olora"}, ["`init`", "'kaiming', 'gaussian', 'pissa'", "got 'olora'"]),
        ({"bias": "some"}, ["`bias`", "'none', 'lora_only', 'all'", "got 'some'"]),
        ({"modules_to_save": ["lm_head", ""]}, ["`modules_to_save`", "got ('lm_head', '')"]),
        ({"targets": ()}, ["`targets`", "at least one module", "got ()", "all-linear"]),
        ({"targets": ""}, ["`targets`", "at least one module", "got ''"]),
        ({"targets": ["q_proj", ""]}, ["`targets`", "got ('q_proj', '')"]),
        ({"targets": [1]}, ["`targets`", "got (1,)"]),
        ({"targets": None}, ["`targets`", "at least one module"]),
        ({"targets": "(q_proj"}, ["`targets`", "regular expression", "got '(q_proj'"]),
        ({"exclude": "[a"}, ["`exclude`", "regular expression", "got '[a'"]),
        ({"layers_to_transform": []}, ["`layers_to_transform`", "layer numbers from 0", "got ()"]),
        ({"layers_to_transform": -1}, ["`layers_to_transform`", "got (-1,)"]),
        ({"layers_to_transform": [0, 1.0]}, ["`layers_to_transform`", "got (0, 1.0)"]),
        ({"layers_to_transform": [0, True]}, ["`layers_to_transform`", "got (0, True)"]),
        (
            {"layers_to_transform": 1, "targets": r".*q_proj"},
            ["`layers_to_transform`", "list in `targets`", "got the regular expression '.*q_proj'"],
        ),
    ],
)
def test_a_field_out_of_range_names_the_rule_and_the_value(fields, parts):
    with pytest.raises(ValueError, match="LoraConfig is not usable") as error:
        LoraConfig(**fields)
    assert [part for part in parts if part not in str(error.value)] == []


def test_every_problem_is_in_one_error():
    with pytest.raises(ValueError) as error:
        LoraConfig(rank=0, alpha=-1, dropout=2.0, init="x", targets=())
    assert all(f"`{name}`" in str(error.value) for name in ("rank", "alpha", "dropout", "init", "targets"))


def test_defaults_are_those_of_the_design():
    config = LoraConfig()
    assert (config.rank, config.alpha, config.targets, config.dropout) == (8, 16.0, "all-linear", 0.0)
    assert (config.use_rslora, config.init, config.exclude, config.layers_to_transform) == (False, "kaiming", (), None)
    assert config.rank_pattern == config.alpha_pattern == {}


def test_lists_become_tuples_and_an_int_one_layer():
    config = LoraConfig(targets=["a", "b"], exclude=["c"], layers_to_transform=[0, 2])
    assert (config.targets, config.exclude, config.layers_to_transform) == (("a", "b"), ("c",), (0, 2))
    assert LoraConfig(layers_to_transform=0).layers_to_transform == (0,)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().rank = 4
    with pytest.raises(TypeError):
        LoraConfig(8)


def test_the_callers_dictionary_is_not_the_configs():
    pattern = {"q_proj": 4}
    config = LoraConfig(rank_pattern=pattern)
    pattern["q_proj"] = 9
    assert config.rank_of("layers.0.q_proj") == 4


def test_equal_configs_have_equal_hashes():
    """16 == 16.0, so hashes of the text of the fields would break dictionaries."""
    fields = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "layers_to_transform": [0]}
    one = LoraConfig(alpha=16, targets=["q_proj"], **fields)
    two = LoraConfig(alpha=16.0, targets=("q_proj",), **fields)
    assert one == two and hash(one) == hash(two) and {one: 1}[two] == 1


def test_the_order_of_patterns_is_part_of_a_config():
    """The first match wins: the same keys in another order adapt with other ranks."""
    one = LoraConfig(rank_pattern={"proj": 2, ".*proj": 4})
    two = LoraConfig(rank_pattern={".*proj": 4, "proj": 2})
    assert one.rank_of("a.proj") != two.rank_of("a.proj")
    assert one != two and len({one, two}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "loha"},
        {"kind": "miss"},
        {"rank": 4},
        {"alpha": 8.0},
        {"targets": ("q_proj",)},
        {"dropout": 0.1},
        {"use_rslora": True},
        {"init": "gaussian"},
        {"init": "pissa"},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ("lm_head",)},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4.0}},
        {"exclude": ("q_proj",)},
        {"layers_to_transform": (1,)},
        {"trainable_token_indices": (1, 5)},
        {"trainable_token_indices": {"embed_tokens": (1, 5), "lm_head": (1,)}},
    ],
)
def test_every_field_takes_part_in_equality_and_in_the_peft_round_trip(change):
    config = LoraConfig(**change)
    assert config != LoraConfig() and hash(config) == hash(LoraConfig(**change))
    assert from_peft(json.loads(json.dumps(to_peft(config)))) == config


def test_the_changes_above_are_all_the_fields():
    (mark,) = test_every_field_takes_part_in_equality_and_in_the_peft_round_trip.pytestmark
    changed = {name for change in mark.args[1] for name in change}
    assert changed == {field.name for field in dataclasses.fields(LoraConfig)}


def test_scaling():
    config = LoraConfig(rank=16, alpha=8.0, rank_pattern={"a": 4}, alpha_pattern={"b": 32.0})
    assert [config.scaling_of(f"x.{name}") for name in "abc"] == [2.0, 2.0, 0.5]
    stabilized = dataclasses.replace(config, use_rslora=True)
    assert [stabilized.scaling_of(f"x.{name}") for name in "abc"] == [4.0, 8.0, 2.0]


# PEFT's fields


def test_absent_peft_fields_have_pefts_defaults():
    config = from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]})
    default = peft.LoraConfig()
    assert (config.rank, config.alpha, config.dropout) == (default.r, default.lora_alpha, default.lora_dropout)
    assert config.use_rslora == default.use_rslora and config.init == "kaiming"


def test_what_peft_writes_is_read(tmp_path):
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        lora_dropout=0.25,
        use_rslora=True,
        init_lora_weights="gaussian",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3},
        exclude_modules=["k_proj"],
        layers_to_transform=[1],
    )
    theirs.save_pretrained(tmp_path)
    assert LoraConfig.load(tmp_path) == LoraConfig(
        rank=4,
        alpha=6,
        targets=("q_proj",),
        dropout=0.25,
        use_rslora=True,
        init="gaussian",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3},
        exclude=("k_proj",),
        layers_to_transform=(1,),
    )


def test_what_we_write_peft_reads():
    config = LoraConfig(
        rank=4,
        alpha=6.0,
        targets=("q_proj",),
        dropout=0.25,
        init="gaussian",
        layers_to_transform=1,
        exclude=("k_proj",),
    )
    theirs = peft.LoraConfig(**to_peft(config))
    assert (theirs.r, theirs.lora_alpha, theirs.target_modules, theirs.lora_dropout) == (4, 6.0, {"q_proj"}, 0.25)
    assert (theirs.init_lora_weights, theirs.layers_to_transform, theirs.exclude_modules) == (
        "gaussian",
        [1],
        {"k_proj"},
    )


NEUTRAL = {**LoraConfig().weight.PEFT.neutral, **_NEUTRAL}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_peft_feature_that_is_not_represented_is_refused_by_name(name):
    value = ["something"]
    fields = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="merge_and_unload") as error:
        from_peft(fields | {name: value})
    assert f"{name} = {value!r}" in str(error.value)
    for neutral in NEUTRAL[name]:
        from_peft(fields | {name: neutral})


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "eva", "loftq", "orthogonal", "lora_ga"])
def test_an_init_that_changes_the_base_is_refused(init):
    with pytest.raises(ValueError, match=f"init_lora_weights = '{init}'"):
        from_peft({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": init})


def test_every_field_of_the_installed_peft_is_accounted_for():
    """A new PEFT with a new feature fails here instead of being read without it."""
    represented = set(to_peft(LoraConfig(trainable_token_indices=[0])))  # written where there are some
    without_effect_on_outputs = {
        *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_version", "revision"),
        *("task_type", "qalora_group_size"),
        # Details of initializations, which `init_lora_weights` names; and of Megatron's parallel layers.
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    }
    assert set(peft.LoraConfig().to_dict()) - represented - set(NEUTRAL) - without_effect_on_outputs == set()


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused(kind):
    with pytest.raises(ValueError, match=f"peft_type 'LOHA' or 'LORA' or 'MISS'; this one is {kind!r}"):
        from_peft({"peft_type": kind, "target_modules": ["q_proj"]})


def test_a_peft_config_without_targets_is_refused():
    with pytest.raises(ValueError, match="`target_modules`"):
        from_peft({"peft_type": "LORA", "target_modules": None})


def test_no_adapter_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        LoraConfig.load(tmp_path)


@pytest.mark.parametrize("text", ['{"r": 8,', "[1]"])
def test_a_broken_adapter_config_is_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        LoraConfig.load(tmp_path)


# Which modules, at which rank and scaling: PEFT's fields in both libraries

RULES = {
    "gpt2": {
        "suffix": {"target_modules": ["c_attn"]},
        "suffix of two modules": {"target_modules": ["c_proj"]},
        "longer suffix": {"target_modules": ["mlp.c_proj"]},
        "full paths and suffixes": {"target_modules": ["transformer.h.1.attn.c_proj", "c_fc"]},
        "regex": {"target_modules": r"transformer\.h\.[02]\.mlp\.c_(fc|proj)"},
        "regex is a full match": {"target_modules": r".*c_proj"},
        "all-linear": {"target_modules": "all-linear"},
        "exclude list": {"target_modules": "all-linear", "exclude_modules": ["attn.c_proj"]},
        "exclude full path": {"target_modules": ["c_fc"], "exclude_modules": ["transformer.h.2.mlp.c_fc"]},
        "exclude regex": {"target_modules": ["c_proj"], "exclude_modules": r".*\.1\..*"},
        "exclude from regex": {"target_modules": r".*\.c_.*", "exclude_modules": ["mlp.c_proj", "c_attn"]},
        "one layer": {"target_modules": ["c_proj"], "layers_to_transform": 1},
        "layer 0": {"target_modules": ["c_proj"], "layers_to_transform": 0},
        "no layers named": {"target_modules": ["c_proj"], "layers_to_transform": []},
        "two layers": {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [0, 2]},
        "layers do not bind full paths": {
            "target_modules": ["transformer.h.0.attn.c_attn", "c_fc"],
            "layers_to_transform": [1],
        },
        "rank pattern": {"target_modules": "all-linear", "rank_pattern": {"c_proj": 2, "mlp.c_proj": 4}},
        "rank pattern, other order": {"target_modules": "all-linear", "rank_pattern": {"mlp.c_proj": 4, "c_proj": 2}},
        "rank pattern, regexes": {
            "target_modules": "all-linear",
            "rank_pattern": {r"^transformer\.h\.0\..*": 2, r"h\.[12]\.mlp\.c_fc|c_attn": 6},
        },
        "alpha pattern": {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"c_fc": 5, ".*": 7}},
        "both patterns, rsLoRA": {
            "target_modules": "all-linear",
            "rank_pattern": {"attn.c_proj": 9},
            "alpha_pattern": {r"h\.1\..*": 3},
            "use_rslora": True,
        },
    },
    "llama": {
        "defaults": {"target_modules": ["q_proj", "v_proj"]},
        "all-linear leaves the head": {"target_modules": "all-linear"},
        "the head by name": {"target_modules": ["lm_head", "o_proj"]},
        "the embedding by name": {"target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"embed_tokens": 3}},
        "the embedding by regex": {"target_modules": r".*(embed_tokens|v_proj)"},
        "layers leave the embedding out": {"target_modules": ["embed_tokens", "q_proj"], "layers_to_transform": [1]},
        "longer suffix": {"target_modules": ["self_attn.q_proj"]},
        "regex": {"target_modules": r"model\.layers\.\d+\.(mlp\.(up|gate)|self_attn\.[qk])_proj"},
        "regex with a head": {"target_modules": r".*(lm_head|v_proj)"},
        "exclude list": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp.down_proj"]},
        "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.0\..*"},
        "layers": {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": [1, 2]},
        "layers leave the head out": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
        "patterns": {
            "target_modules": "all-linear",
            "rank_pattern": {r"self_attn\.[qk]_proj": 2, r"layers\.1\..*": 3},
            "alpha_pattern": {"down_proj": 1, r"model\.layers\.2\..*": 5},
        },
        "rsLoRA": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 3}},
    },
}
CASES = [(family, case) for family, cases in RULES.items() for case in cases]


@pytest.mark.parametrize(("family", "case"), CASES, ids=[f"{f}: {c}" for f, c in CASES])
def test_modules_ranks_and_scalings_are_pefts(trees, family, case):
    fields = {"r": 8, "lora_alpha": 12} | RULES[family][case]
    wrapped = peft.get_peft_model(make_torch_model(family, **DEPTH[family]), peft.LoraConfig(**fields))
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    config = from_peft({"peft_type": "LORA"} | fields)
    # Shapes suffice, and cost no compilation.
    adapted = adapted_modules(jax.eval_shape(lambda p: jlora.add_lora(p, config, key=jax.random.key(0)), trees[family]))
    assert {module: (w.lora_A.shape[1], w.scaling) for module, w in adapted.items()} == theirs
    assert all(w.rank == w.lora_B.shape[0] == config.rank_of(module) for module, w in adapted.items())


def test_all_linear_goes_with_layers_to_transform(trees):
    """PEFT refuses the two together; here "all-linear" is a list of names like any other."""
    config = LoraConfig(targets="all-linear", layers_to_transform=[1])
    adapted = adapted_modules(jlora.add_lora(trees["gpt2"], config, key=jax.random.key(0)))
    assert len(adapted) == 4 and all(".h.1." in module for module in adapted)


# Patterns that match nothing


@pytest.mark.parametrize(
    ("family", "fields", "parts"),
    [
        ("gpt2", {"targets": ["q_proj"]}, ["`targets` 'q_proj' matches no linear kernel"]),
        ("gpt2", {"targets": ["c_attn", "c_prj"]}, ["`targets` 'c_prj'", "Did you mean 'c_proj'"]),
        ("gpt2", {"targets": ["proj"]}, ["`targets` 'proj' matches no"]),
        ("gpt2", {"targets": [r".*c_attn"]}, ["'.*c_attn'", "never a regular expression", "not in a list"]),
        ("gpt2", {"targets": r"h\.\d\.c_attn"}, [r"'h\\.\\d\\.c_attn' matches no linear kernel"]),
        ("gpt2", {"targets": "c_attn"}, ["'c_attn' matches no", "whole module path", "['c_attn']"]),
        (
            "gpt2",
            {"targets": ["c_attn", "ln_1"]},
            ["'ln_1' names 'transformer.h.0.ln_1'", "not a linear kernel", "take it out"],
        ),
        (
            "llama",
            {"targets": r".*layernorm"},
            ["'.*layernorm' names 'model.layers.0.input_layernorm'", "not a linear"],
        ),
        ("llama", {"exclude": ["qproj"]}, ["`exclude` 'qproj' excludes none", "Did you mean 'q_proj'"]),
        ("llama", {"targets": ["q_proj"], "exclude": ["k_proj"]}, ["`exclude` 'k_proj' excludes none"]),
        ("llama", {"exclude": r".*c_attn"}, ["`exclude` '.*c_attn' excludes none of the targets"]),
        ("llama", {"targets": ["q_proj"], "exclude": r".*"}, ["`exclude` '.*' leaves nothing", "('q_proj',)"]),
        ("llama", {"layers_to_transform": [1, 3]}, ["`layers_to_transform` [3] matches no layer", "there are 0-2"]),
        ("llama", {"targets": ["lm_head"], "layers_to_transform": 0}, ["`layers_to_transform` [0]", "no numbered"]),
        ("llama", {"rank_pattern": {"qproj": 4}}, ["`rank_pattern` 'qproj' matches none", "Did you mean 'q_proj'"]),
        (
            "llama",
            {"targets": ["q_proj"], "alpha_pattern": {"k_proj": 4.0}},
            ["`alpha_pattern` 'k_proj' matches none of the adapted modules"],
        ),
    ],
)
def test_a_pattern_that_matches_nothing_raises_with_what_there_is(trees, family, fields, parts):
    there = {
        "gpt2": "attn.c_attn (layers 0-2), attn.c_proj (layers 0-2), mlp.c_fc (layers 0-2)",
        "llama": "self_attn.v_proj (layers 0-2)",
    }
    with pytest.raises(ValueError) as error:
        jlora.add_lora(trees[family], LoraConfig(**fields), key=jax.random.key(0))
    message = str(error.value)
    assert [part for part in (*parts, there[family]) if part not in message] == []


def test_every_dead_pattern_is_in_one_error(trees):
    config = LoraConfig(targets=["q_proj", "qq"], exclude=["vv"], rank_pattern={"rr": 4}, alpha_pattern={"aa": 4.0})
    with pytest.raises(ValueError) as error:
        jlora.add_lora(trees["llama"], config, key=jax.random.key(0))
    assert all(f"'{name}'" in str(error.value) for name in ("qq", "vv", "rr", "aa"))


def test_a_stacked_tree_is_described_like_its_layers(trees):
    stacked = jlora.stack_layers(trees["gpt2"])
    messages = []
    for params in (trees["gpt2"], stacked):
        with pytest.raises(ValueError) as error:
            jlora.add_lora(params, LoraConfig(targets=["nothing"]), key=jax.random.key(0))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
