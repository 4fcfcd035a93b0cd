"""Adapters in mlx-lm's layout. Slow tests have mlx-lm itself read and write them; the others know its format."""

import dataclasses
import importlib
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from damage import edit_json, header, raw, refused, text
from oracles import make_torch_model
from safetensors.numpy import load_file, save_file
from trees import adapted

import jlora
from jlora.cli import main
from jlora.cli.inspect import adapter_table
from jlora.files.mlx import MlxConfig, mlx_module
from jlora.lora import adapted_modules

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
IDS = np.array([[5, 30, 17, 96, 9, 44, 12, 8, 61, 7, 35, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
TAILS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": tuple(f"self_attn.{x}_proj" for x in "kqvo") + tuple(f"mlp.{x}_proj" for x in ("down", "gate", "up")),
}
TAILS["qwen2"] = TAILS["llama"]
FIRST = {"gpt2": "c_attn", "llama": "q_proj", "qwen2": "q_proj"}

# What an adapter may be like -> fields of its config, given a target of the family.
CASES = {
    "all-linear": lambda target: {},
    "two targets": lambda target: {"targets": [target, "mlp.c_proj" if target == "c_attn" else "down_proj"]},
    "last layer": lambda target: {"targets": [target], "layers_to_transform": [1]},
    "first layer": lambda target: {"targets": [target], "layers_to_transform": [0]},
    "uneven layers": lambda target: {"targets": rf".*\.{target}|.*\.1\.mlp\..*"},
    "rslora": lambda target: {"use_rslora": True, "alpha": 3.0},
    "dora": lambda target: {"use_dora": True},
    "rank pattern": lambda target: {"rank_pattern": {target: 5}, "alpha_pattern": {r"0\.mlp\..*": 3.0}},
    "dora with patterns": lambda target: {"use_dora": True, "rank_pattern": {target: 2}},
    "pissa": lambda target: {"init": "pissa", "rank": 2},
}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """family -> (model, parameters), read once each."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = jlora.load(checkpoints[family][0], dtype="float32")
        return made[family]

    return get


@pytest.fixture(scope="module")
def untied(checkpoints):
    """(model, parameters) of a Llama with a head of its own, which `checkpoints` has."""
    model, params = jlora.load(checkpoints["llama"][0], dtype="float32")
    assert not model.config.tie_word_embeddings
    return model, params


def config_of(family, case, **fields):
    return jlora.LoraConfig(**{"rank": 4, "alpha": 8.0, **CASES[case](FIRST[family]), **fields})


def logits(model, params, ids=IDS):
    return np.asarray(model.apply({"params": params}, jnp.asarray(ids)))


def arrays(params):
    """Module -> name -> array of what is trained."""
    return {
        module: {n: np.asarray(x) for n in w.TRAINED if (x := getattr(w, n)) is not None}
        for module, w in adapted_modules(params).items()
    }


def same(one, other):
    """Whether the arrays are equal bit for bit."""
    names = {m: set(x) for m, x in one.items()}
    return names == {m: set(x) for m, x in other.items()} and all(
        np.array_equal(one[m][n], other[m][n]) for m in one for n in one[m]
    )


def written(directory):
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)


# What is written


def test_keys_shapes_and_config(family, loaded, tmp_path):
    model, params = loaded(family)
    config = jlora.LoraConfig(rank=4, alpha=8.0, dropout=0.25)
    params = adapted(params, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model, base_model="some/base")
    fields, tensors = written(tmp_path)
    assert fields == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.25, "keys": sorted(TAILS[family])},
        "model": "some/base",
    }
    modules = adapted_modules(params)
    container = "model.h" if family == "gpt2" else "model.layers"
    assert {name.rpartition(".")[0] for name in tensors} == {
        f"{container}.{i}.{t}" for i in (0, 1) for t in TAILS[family]
    }
    for module, w in modules.items():
        for suffix, factor in (("lora_a", w.lora_A), ("lora_b", w.lora_B)):
            stored = tensors.pop(f"{mlx_module(module)}.{suffix}")
            assert stored.dtype == np.float32 and np.array_equal(stored, factor)
    assert not tensors
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    ("case", "layers", "keys"),
    [
        ("last layer", 1, ["self_attn.q_proj"]),
        ("first layer", 2, ["model.layers.0.self_attn.q_proj"]),
        ("two targets", 2, ["mlp.down_proj", "self_attn.q_proj"]),
    ],
)
def test_layers_are_counted_from_the_end_or_named(case, layers, keys, loaded, tmp_path):
    model, params = loaded("llama")
    config = config_of("llama", case)
    jlora.save_mlx_adapter(tmp_path, adapted(params, config), config=config, model=model)
    fields, _ = written(tmp_path)
    assert (fields["num_layers"], fields["lora_parameters"]["keys"]) == (layers, keys)
    assert "model" not in fields


def test_one_rank_and_scale_for_all(loaded, tmp_path):
    """Patterns are folded: ranks padded, ratios of the scalings in lora_b, most modules left as they are."""
    model, params = loaded("llama")
    config = jlora.LoraConfig(rank=4, alpha=8.0, rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 3.0})
    params = adapted(params, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    fields, tensors = written(tmp_path)
    assert (fields["lora_parameters"]["rank"], fields["lora_parameters"]["scale"]) == (6, 2.0)
    for module, w in adapted_modules(params).items():
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert a.shape[1] == b.shape[0] == 6
        assert not a[:, w.rank :].any() and not b[w.rank :].any()
        assert np.array_equal(a[:, : w.rank], w.lora_A)
        assert np.array_equal(b[: w.rank], np.asarray(w.lora_B) * np.float32(w.scaling / 2.0))


# There and back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "case"), [*(("llama", case) for case in CASES), ("gpt2", "uneven layers"), ("qwen2", "dora")]
)
def test_there_and_back(family, case, loaded, tmp_path):
    model, onto = loaded(family)
    config = config_of(family, case)
    params = adapted(onto, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    again, back = jlora.load_adapter(tmp_path, onto), jlora.LoraConfig.load(tmp_path)
    folded = "pattern" in case or case == "pissa"
    if not folded:
        assert same(arrays(again), arrays(params))
        assert (back.rank, back.dropout, back.use_dora) == (config.rank, config.dropout, config.use_dora)
        assert math.isclose(back.alpha / back.rank, config.scaling_of(""), rel_tol=1e-15)
    ours = logits(model, params)
    # float32: folding rounds lora_b once, PiSSA's plain form adds and subtracts the initial update.
    np.testing.assert_allclose(logits(model, again), ours, atol=1e-4 if folded else 1e-5)
    assert np.abs(ours - logits(model, onto)).max() > 1e-2, "the adapter must show"
    # The config that comes out is the one of what was loaded: every writer checks it.
    jlora.save_mlx_adapter(tmp_path / "again", again, config=back, model=model)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    jlora.save_adapter(tmp_path / "peft", again, config=back, base_model="base")
    assert same(arrays(jlora.load_adapter(tmp_path / "peft", onto)), arrays(again))


@pytest.mark.parametrize("case", ["two targets", "dora"])
def test_the_stacked_form_reads_and_writes_the_same_file(case, loaded, tmp_path):
    model, onto = loaded("llama")
    config = config_of("llama", case)
    params = adapted(onto, config)
    jlora.save_mlx_adapter(tmp_path / "one", params, config=config, model=model)
    stacked = jlora.load_adapter(tmp_path / "one", jlora.stack_layers(onto))
    assert same(arrays(stacked), arrays(params))
    jlora.save_mlx_adapter(tmp_path / "two", stacked, config=jlora.LoraConfig.load(tmp_path / "one"), model=model)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("alpha", [8, 16.0, 3.7, 0.1])
@pytest.mark.parametrize("rank", [1, 3, 7, 49])
def test_alpha_survives(alpha, rank):
    """16 at rank 49 must not come back as 15.999999999999998."""
    fields = dict(rank=rank, scale=alpha / rank, dropout=0.0, use_dora=False, num_layers=-1, keys=None)
    assert MlxConfig(**fields).alpha == alpha


def test_embeddings_and_head(untied, tmp_path):
    model, params = untied
    config = jlora.LoraConfig(rank=4, targets=["embed_tokens", "lm_head", "v_proj"])
    params = adapted(params, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    fields, tensors = written(tmp_path)
    assert fields["lora_parameters"]["keys"] == ["self_attn.v_proj", "lm_head", "model.embed_tokens"]
    assert tensors["model.embed_tokens.lora_a"].shape == (97, 4) and tensors["lm_head.lora_b"].shape == (4, 97)
    again = jlora.load_adapter(tmp_path, jlora.remove_lora(params))
    assert same(arrays(again), arrays(params))
    assert set(jlora.LoraConfig.load(tmp_path).targets) == {"self_attn.v_proj", "lm_head", "model.embed_tokens"}
    assert adapter_table(str(tmp_path)).row_count == 4


def test_the_adapter_of_a_quantized_base(loaded, tmp_path):
    model, params = loaded("llama")
    config = jlora.LoraConfig(rank=4, use_dora=True)
    params = adapted(jlora.quantize_params(params, jlora.NF4()), config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    assert same(arrays(jlora.load_adapter(tmp_path, jlora.remove_lora(params))), arrays(params))


def test_the_half_of_split_is_enough(loaded, tmp_path):
    model, params = loaded("qwen2")
    config = jlora.LoraConfig(rank=2)
    params = adapted(params, config)
    for name, tree in (("whole", params), ("half", jlora.split(params)[0])):
        jlora.save_mlx_adapter(tmp_path / name, tree, config=config, model=model)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "half" / WEIGHTS).read_bytes()


def test_without_keys_every_linear_layer_of_the_blocks_is_meant(loaded, tmp_path):
    """mlx-lm's default: `keys` absent, the last `num_layers` blocks, neither embeddings nor the head."""
    model, params = loaded("llama")
    config = jlora.LoraConfig(rank=4, layers_to_transform=[1])
    params = adapted(params, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    edit_json(CONFIG, lambda c: c["lora_parameters"].pop("keys") and None)(tmp_path)
    onto = jlora.remove_lora(params)
    assert same(arrays(jlora.load_adapter(tmp_path, onto)), arrays(params))
    back = jlora.LoraConfig.load(tmp_path)
    assert (set(back.targets), back.layers_to_transform) == (set(TAILS["llama"]), (1,))
    edit_json(CONFIG, lambda c: c.update(num_layers=-1))(tmp_path)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.down_proj\.lora_a \(64, 4\)"):
        jlora.load_adapter(tmp_path, onto)


# What is not represented, written


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        (
            "qwen2",
            {"targets": ["q_proj"], "bias": "lora_only"},
            "model/layers/0/self_attn/q_proj/bias: not a low-rank update",
        ),
        ("llama", {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head/kernel: not a low-rank update"),
        ("llama", {"targets": ["embed_tokens"], "use_dora": True}, "model.embed_tokens: DoRA on an embedding"),
        ("gpt2", {"targets": ["wte", "c_attn"]}, "transformer.wte: an embedding that is also the output head"),
        ("qwen2", {"targets": ["embed_tokens"]}, "model.embed_tokens: an embedding that is also the output head"),
    ],
    ids=str,
)
def test_what_mlx_does_not_represent_is_not_written(family, fields, says, loaded, tmp_path):
    model, params = loaded(family)
    config = jlora.LoraConfig(rank=2, **fields)
    with pytest.raises(ValueError, match="does not represent") as error:
        jlora.save_mlx_adapter(tmp_path / "x", adapted(params, config), config=config, model=model)
    assert says in str(error.value) and not (tmp_path / "x").exists()


def test_what_would_mislead_is_not_written(loaded, tmp_path):
    model, params = loaded("llama")
    config = jlora.LoraConfig(rank=2, targets=["q_proj"])
    params = adapted(params, config)

    def save(tree=params, **changes):
        arguments = {"config": config, "model": model} | changes
        jlora.save_mlx_adapter(tmp_path / "x", tree, **arguments)

    with pytest.raises(ValueError, match="is not the one these parameters were adapted with"):
        save(config=dataclasses.replace(config, alpha=1.0))
    with pytest.raises(ValueError, match="no adapter"):
        save(jlora.remove_lora(params))
    with pytest.raises(ValueError, match="not a module of this model"):
        save(model=loaded("gpt2")[0])
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="not finite"):
        save(broken)
    assert not (tmp_path / "x").exists()
    jlora.save_adapter(tmp_path / "x", params, config=config, base_model="base")
    before = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    with pytest.raises(FileExistsError, match="in PEFT's layout"):
        save()
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before
    jlora.save_mlx_adapter(tmp_path / "y", params, config=config, model=model)
    with pytest.raises(FileExistsError, match="in mlx-lm's layout"):
        jlora.save_adapter(tmp_path / "y", params, config=config, base_model="base")


# What is not represented, read


def parameter(**fields):
    return edit_json(CONFIG, lambda c: c["lora_parameters"].update(fields))


def field(**fields):
    return edit_json(CONFIG, lambda c: c.update(fields))


A = "model.layers.0.self_attn.q_proj.lora_a"

MALFORMED = {
    "a full fine-tune": (field(fine_tune_type="full"), "fine_tune_type = 'full'"),
    "an unknown kind": (field(fine_tune_type="vera"), "fine_tune_type = 'vera'"),
    "no number of layers": (edit_json(CONFIG, lambda c: c.pop("num_layers") and None), "num_layers must be a number"),
    "layers by their old name": (
        edit_json(CONFIG, lambda c: c.update(lora_layers=c.pop("num_layers"))),
        "Early versions called it `lora_layers`",
    ),
    "no parameters": (edit_json(CONFIG, lambda c: c.pop("lora_parameters") and None), "lora_parameters must be an object"),
    "alpha for scale": (
        edit_json(CONFIG, lambda c: c["lora_parameters"].update(alpha=c["lora_parameters"].pop("scale"))),
        "lora_parameters.scale must be a positive number; got None",
    ),
    "a negative scale": (parameter(scale=-1.0), "got -1.0"),
    "an infinite scale": (parameter(scale=math.inf), "got inf"),
    "rank as text": (parameter(rank="4"), "got '4'"),
    "rank of zero": (parameter(rank=0), "lora_parameters.rank must be an integer of at least 1; got 0"),
    "dropout of one": (parameter(dropout=1.0), "dropout must be in [0, 1)"),
    "keys as a word": (parameter(keys="q_proj"), "keys must be a list"),
    "no keys at all": (parameter(keys=[]), "keys must be a list"),
    "an unknown parameter": (parameter(use_rslora=True), "use_rslora, which jlora does not represent"),
    "another rank than the weights'": (parameter(rank=3), f"shape: {A} is (48, 4), should be (48, 3)"),
    "more keys than weights": (parameter(keys=["self_attn.q_proj", "mlp.up_proj"]), "missing: model.layers.0.mlp.up_proj.lora_a"),
    "fewer layers than weights": (field(num_layers=1), f"unexpected: {A} (48, 4)"),
    "a misspelt key": (parameter(keys=["self_attn.qproj", "mlp.upproj"]), "Did you mean 'mlp.up_proj'"),
    "keys of another model": (parameter(keys=["attn.c_attn"]), "'attn.c_attn' in lora_parameters.keys names no module"),
    "dora without magnitudes": (field(fine_tune_type="dora"), "missing: model.layers.0.self_attn.q_proj.m (64,)"),
    "a misspelt name": (header(lambda h: h.__setitem__(A + "s", h.pop(A)), WEIGHTS), f"missing: {A} (48, 4) (there is {A}s)"),
    "a tensor too many": (
        header(lambda h: h.__setitem__("more", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), WEIGHTS),
        "unexpected: more",
    ),
    "integers for weights": (header(lambda h: h[A].update(dtype="I32"), WEIGHTS), f"dtype: {A} is I32"),
    "weights cut": (raw(lambda d: d[:-1], WEIGHTS), "not a valid safetensors file"),
    "weights are a zip": (text(WEIGHTS, b"PK\x03\x04" + b"\0" * 99), "not a valid safetensors file"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"There is no {WEIGHTS}"),
    "no config": (lambda d: (d / CONFIG).unlink(), "no adapter_config.json"),
    "config is a list": (text(CONFIG, "[]"), "must hold a JSON object"),
    "PEFT's weights beside it": (text("adapter_model.safetensors", b""), "mixes two layouts"),
    "PEFT's config": (text(CONFIG, '{"peft_type": "LORA", "target_modules": ["q_proj"]}'), "mixes two layouts"),
    "both configs in one": (field(peft_type="LORA"), "mixes two layouts"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(loaded, tmp_path_factory):
    model, params = loaded("llama")
    config = jlora.LoraConfig(rank=4, targets=["q_proj"])
    directory = tmp_path_factory.mktemp("mlx-adapter")
    jlora.save_mlx_adapter(directory, adapted(params, config), config=config, model=model)
    return directory


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_adapters_are_refused(case, adapter, loaded, tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(adapter, directory)
    _, params = loaded("llama")
    jlora.load_adapter(directory, params)
    change, says = MALFORMED[case]
    change(directory)
    assert says in refused(lambda: jlora.load_adapter(directory, params), directory)


def test_a_key_that_names_nothing_is_passed_over(adapter, loaded, tmp_path):
    """As in mlx-lm: the tensors fit."""
    _, params = loaded("llama")
    shutil.copytree(adapter, tmp_path / "x")
    parameter(keys=["self_attn.q_proj", "mlp.upproj"])(tmp_path / "x")
    pair = [jlora.load_adapter(directory, params) for directory in (adapter, tmp_path / "x")]
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_an_empty_file_gives_no_config(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "x")
    save_file({"more": np.zeros(1, np.float32)}, tmp_path / "x" / WEIGHTS)
    with pytest.raises(ValueError, match="holds no `lora_a`"):
        jlora.LoraConfig.load(tmp_path / "x")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_an_adapter_on_a_tied_embedding_is_not_read(family, loaded, tmp_path):
    _, params = loaded(family)
    module = "model.wte" if family == "gpt2" else "model.embed_tokens"
    save_file(
        {f"{module}.lora_a": np.zeros((97, 2), np.float32), f"{module}.lora_b": np.zeros((2, 48), np.float32)},
        tmp_path / WEIGHTS,
    )
    fields = {"num_layers": -1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": [module]}}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="also the output head"):
        jlora.load_adapter(tmp_path, params)


# Commands


def test_export_inspect_and_back(llama_dir, tmp_path, capsys):
    """PEFT -> mlx -> PEFT by commands, the tensors equal; every command reads either."""
    model, params = jlora.load(llama_dir, dtype="float32")
    config = jlora.LoraConfig(rank=4, alpha=8.0, targets=("k_proj", "up_proj"))
    jlora.save_adapter(tmp_path / "one", adapted(params, config), config=config, base_model=llama_dir)
    main(["export", "--adapter", str(tmp_path / "one"), "--to", "mlx", "--output", str(tmp_path / "mlx")])
    assert f"--model {llama_dir}" in capsys.readouterr().out
    main(["export", "--adapter", str(tmp_path / "mlx"), "--to", "peft", "--output", str(tmp_path / "two")])
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    tables = []
    for name in ("one", "mlx"):
        capsys.readouterr()
        main(["inspect", "--adapter", str(tmp_path / name)])
        tables.append(capsys.readouterr().out)
    assert "(mlx-lm): base" in tables[1] and "0 (untrained)" not in tables[1]
    rows = [sorted(line for line in table.splitlines() if line.startswith("model.")) for table in tables]
    assert len(rows[0]) == 2 * model.config.depth and [r.split() for r in rows[0]] == [r.split() for r in rows[1]]
    with pytest.raises(SystemExit):
        main(["export", "--adapter", str(tmp_path / "one"), "--to", "mlx", "--output", str(tmp_path / "mlx")])
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--model", llama_dir, "--to", "mlx", "--output", str(tmp_path / "x")])
    assert "without --adapter" in capsys.readouterr().err


# mlx-lm itself


@pytest.fixture(scope="module")
def mlx():
    """mlx and mlx-lm, on the CPU. `make slow` installs them: the extra "mlx"."""
    core = importlib.import_module("mlx.core")
    core.set_default_device(core.cpu)
    return core


@pytest.fixture(scope="module")
def mlx_checkpoint(loaded, tmp_path_factory):
    """family -> directory that mlx-lm loads. Ours, as transformers 5 writes no `rope_theta`, without which mlx-lm takes its
    own default and computes something else."""
    made = {}

    def get(family):
        if family not in made:
            directory = made[family] = tmp_path_factory.mktemp(f"mlx-{family}")
            jlora.save_pretrained(directory, *loaded(family))
            if family == "gpt2":
                # mlx-lm knows the names of the hub's files only, which have no "transformer." before them.
                tensors = load_file(directory / "model.safetensors")
                tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
                save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return made[family]

    return get


def mlx_model(directory, adapter=None):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    return model


def mlx_logits(mlx, model, ids=IDS):
    return np.array(model(mlx.array(ids)).astype(mlx.float32))


# Both compute in float32, in another order. Logits are up to 6; the largest difference seen is 9e-6.
ATOL = 5e-5


@pytest.mark.slow
def test_the_base_models_agree(family, loaded, mlx, mlx_checkpoint):
    """So that what the next tests compare is the adapter."""
    ours = logits(*loaded(family))
    np.testing.assert_allclose(mlx_logits(mlx, mlx_model(mlx_checkpoint(family))), ours, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_reads_what_we_write(case, family, loaded, mlx, mlx_checkpoint, tmp_path):
    model, params = loaded(family)
    config = config_of(family, case)
    params = adapted(params, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    theirs = mlx_model(mlx_checkpoint(family), tmp_path)
    ours = logits(model, params)
    np.testing.assert_allclose(mlx_logits(mlx, theirs), ours, atol=ATOL)
    assert np.abs(ours - logits(model, jlora.remove_lora(params))).max() > 100 * ATOL, "the adapter must show"
    names = {name.removesuffix(".lora_a") for name in load_file(tmp_path / WEIGHTS) if name.endswith(".lora_a")}
    # mlx-lm passes over what the file lacks, so the modules it adapted are compared, too.
    assert {name for name, m in theirs.named_modules() if "lora_a" in m} == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["embed_tokens", "lm_head", "v_proj"]), ("gpt2", ["wpe", "c_attn"])]
)
def test_mlx_lm_reads_adapted_embeddings(family, targets, loaded, mlx, mlx_checkpoint, tmp_path):
    model, params = loaded(family)
    config = jlora.LoraConfig(rank=4, targets=targets)
    params = adapted(params, config)
    jlora.save_mlx_adapter(tmp_path, params, config=config, model=model)
    theirs = mlx_logits(mlx, mlx_model(mlx_checkpoint(family), tmp_path))
    np.testing.assert_allclose(theirs, logits(model, params), atol=ATOL)
    assert same(arrays(jlora.load_adapter(tmp_path, jlora.remove_lora(params))), arrays(params))


@pytest.mark.slow
def test_mlx_lm_adapts_a_tied_head_with_its_embedding(loaded, mlx, mlx_checkpoint, tmp_path):
    """Why such an adapter is refused: the same factors give other logits there."""
    model, params = loaded("qwen2")
    config = jlora.LoraConfig(rank=4, targets=["embed_tokens"])
    params = adapted(params, config)
    (factors,) = arrays(params).values()
    tensors = {f"model.embed_tokens.{name.lower()}": x for name, x in factors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    keys = ["model.embed_tokens"]
    fields = {"num_layers": -1, "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": keys}}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    theirs = mlx_logits(mlx, mlx_model(mlx_checkpoint("qwen2"), tmp_path))
    assert np.abs(theirs - logits(model, params)).max() > 100 * ATOL


WRITTEN_BY_MLX = {
    "defaults": {},
    "last layer": {"num_layers": 1},
    "dora": {"fine_tune_type": "dora"},
    "keys": {"keys": 2},
    "whole path": {"num_layers": 1, "keys": 1, "whole": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN_BY_MLX)
def test_what_mlx_lm_writes_is_read(case, family, loaded, mlx, mlx_checkpoint, tmp_path):
    """Layers made by mlx-lm's own code, lora_b drawn, saved as its trainer saves them."""
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    wanted = WRITTEN_BY_MLX[case]
    parameters = {"rank": 3, "scale": 1.7, "dropout": 0.0}
    if "keys" in wanted:
        parameters["keys"] = list(TAILS[family][: wanted["keys"]])
    if wanted.get("whole"):
        parameters["keys"].append("model.h.0.mlp.c_fc" if family == "gpt2" else "model.layers.0.mlp.up_proj")
    kind, num_layers = wanted.get("fine_tune_type", "lora"), wanted.get("num_layers", -1)
    theirs = mlx_model(mlx_checkpoint(family))
    theirs.freeze()
    mlx.random.seed(0)
    linear_to_lora_layers(theirs, num_layers, parameters, use_dora=kind == "dora")
    drawn = tree_map_with_path(lambda name, x: x + 0.1 * mlx.random.normal(x.shape), theirs.trainable_parameters())
    theirs.update(drawn)
    mlx.save_safetensors(str(tmp_path / WEIGHTS), dict(tree_flatten(theirs.trainable_parameters())))
    save_config(
        {
            "model": "base",
            "fine_tune_type": kind,
            "num_layers": num_layers,
            "lora_parameters": parameters,
            "iters": 600,
        },
        tmp_path / CONFIG,
    )
    model, params = loaded(family)
    ours = jlora.load_adapter(tmp_path, params)
    theirs.eval()
    np.testing.assert_allclose(logits(model, ours), mlx_logits(mlx, theirs), atol=ATOL)
    assert np.abs(logits(model, ours) - logits(model, params)).max() > 100 * ATOL, "the adapter must show"
    # And on to PEFT, by the config that comes out.
    config = jlora.LoraConfig.load(tmp_path)
    assert (config.rank, config.scaling_of("")) == (3, 1.7)
    jlora.save_adapter(tmp_path / "peft", ours, config=config, base_model="base")
    back = peft.PeftModel.from_pretrained(make_torch_model(family), tmp_path / "peft").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(IDS)).logits.numpy(), logits(model, ours), atol=ATOL)


@pytest.mark.slow
def test_both_refuse_a_misspelt_name(adapter, mlx, mlx_checkpoint, loaded, tmp_path):
    shutil.copytree(adapter, tmp_path / "x")
    MALFORMED["a misspelt name"][0](tmp_path / "x")
    with pytest.raises(ValueError, match="not an adapter parameter"):
        mlx_model(mlx_checkpoint("llama"), tmp_path / "x")
    with pytest.raises(ValueError, match="unexpected|missing"):
        jlora.load_adapter(tmp_path / "x", loaded("llama")[1])
