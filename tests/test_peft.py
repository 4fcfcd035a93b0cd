"""Adapters live against PEFT: files both ways, and training step by step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from oracles import VOCAB, make_torch_model, our_logits, torch_logits
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora.lora import adapted_modules

NAMES = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "down_proj"]}
LAYER = {"gpt2": r"transformer\.h\.1\..*", "llama": r"model\.layers\.1\..*", "qwen2": r"model\.layers\.1\..*"}


def peft_configs(family):
    first, second = NAMES[family]
    return {
        "names": {"target_modules": NAMES[family]},
        "all-linear": {"target_modules": "all-linear"},
        "patterns": {
            "target_modules": NAMES[family],
            # The first match wins. PEFT sorts the keys when it writes, and cannot read its own file if that changes them.
            "rank_pattern": {r".*\.1\..*": 3, first: 6},
            "alpha_pattern": {second: 5},
        },
        "rslora": {"target_modules": NAMES[family], "use_rslora": True},
        "layers": {"target_modules": NAMES[family], "layers_to_transform": [1]},
        "exclude": {"target_modules": NAMES[family], "exclude_modules": [second]},
        "regex": {"target_modules": LAYER[family] + f"({first}|{second})"},
    }


def wrapped(family, **fields):
    """A PEFT model whose B is not zero."""
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | fields
    return peft.get_peft_model(make_torch_model(family), peft.LoraConfig(**config)).eval()


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["names", "all-linear", "patterns", "rslora", "layers", "exclude", "regex"])
def test_files_go_both_ways(checkpoint, family, kind, tmp_path):
    directory, base = checkpoint
    theirs = wrapped(family, **peft_configs(family)[kind])
    theirs.save_pretrained(tmp_path / "peft")
    expected = torch_logits(theirs)

    model, params = jlora.load(directory, dtype=jnp.float32)
    adapted = jlora.load_adapter(tmp_path / "peft", params)
    np.testing.assert_allclose(our_logits(model, adapted), expected, atol=1e-4)
    assert np.abs(expected - torch_logits(base)).max() > 1e-2, "the adapter must show"
    modules = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ours = adapted_modules(adapted)
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in modules.items()} == {
        n: (w.rank, w.scaling) for n, w in ours.items()
    }

    config = jlora.LoraConfig.load(tmp_path / "peft")
    jlora.save_adapter(tmp_path / "ours", adapted, config=config, base_model=str(directory))
    back = peft.PeftModel.from_pretrained(make_torch_model(family), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(back), expected, atol=1e-4)
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "ours"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_stacked_form_reads_and_writes_the_same_file(checkpoint, family, tmp_path):
    directory, _ = checkpoint
    wrapped(family, target_modules=NAMES[family]).save_pretrained(tmp_path / "peft")
    config = jlora.LoraConfig.load(tmp_path / "peft")
    written = []
    for stack in (False, True):
        model, params = jlora.load(directory, dtype=jnp.float32, stack=stack)
        adapted = jlora.load_adapter(tmp_path / "peft", params)
        jlora.save_adapter(tmp_path / str(stack), adapted, config=config, base_model="base")
        written.append((tmp_path / str(stack) / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]
    expected = torch_logits(peft.PeftModel.from_pretrained(make_torch_model(family), tmp_path / "True").eval())
    np.testing.assert_allclose(our_logits(model, adapted), expected, atol=1e-4)


def save(directory, params, config):
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(directory, adapted, config=config, base_model="base")
    return adapted


def kinds(params):
    return {module: (w.rank, w.scaling) for module, w in adapted_modules(params).items()}


def test_bytes_depend_on_the_arguments_alone(checkpoints, tmp_path):
    _, params = jlora.load(checkpoints["gpt2"][0], dtype=jnp.float32)
    config = jlora.LoraConfig(rank=2, rank_pattern={"c_fc": 3})
    adapted = save(tmp_path / "one", params, config)
    save(tmp_path / "two", params, config)
    half = jlora.split(adapted)[0]
    jlora.save_adapter(tmp_path / "half", half, config=config, base_model="base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({(tmp_path / d / name).read_bytes() for d in ("one", "two", "half")}) == 1
    path = tmp_path / "one" / "adapter_model.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + jlora.nbytes(half), "the whole adapter and nothing else"


def test_the_order_of_patterns_survives_the_file(checkpoints, tmp_path):
    """The first match wins, so a writer that sorts keys changes ranks and, unseen by any shape, scalings."""
    _, params = jlora.load(checkpoints["gpt2"][0], dtype=jnp.float32)
    config = jlora.LoraConfig(
        rank_pattern={"mlp.c_proj": 4, "c_proj": 2}, alpha_pattern={"transformer.*c_fc": 3.0, ".*": 5.0}
    )
    adapted = save(tmp_path, params, config)
    assert {kind for kind in kinds(adapted).values()} == {(4, 1.25), (2, 2.5), (8, 0.375), (8, 0.625)}
    assert kinds(jlora.load_adapter(tmp_path, params)) == kinds(adapted)
    back = peft.PeftModel.from_pretrained(make_torch_model("gpt2"), tmp_path)
    theirs = {n.removeprefix("base_model.model."): m for n, m in back.named_modules() if hasattr(m, "lora_A")}
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in theirs.items()} == kinds(adapted)


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude": ["q_proj"]},
        {"exclude": r".*\.(q|down)_proj"},
        {"exclude": ["model.layers.0.mlp.up_proj"]},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [1], "exclude": ["mlp.up_proj"]},
        {"targets": ["q_proj", "lm_head"], "layers_to_transform": [1]},
        {"targets": r".*\.1\..*_proj", "exclude": ["o_proj"]},
    ],
    ids=str,
)
def test_what_is_written_reads_back_onto_the_same_modules(checkpoints, fields, tmp_path):
    """ "all-linear" is written as names; with exclusions they must still say which modules, to both readers."""
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    adapted = save(tmp_path / "one", params, jlora.LoraConfig(rank=2, **fields))
    again = jlora.load_adapter(tmp_path / "one", params)
    assert kinds(again) == kinds(adapted)
    back = peft.PeftModel.from_pretrained(make_torch_model("llama"), tmp_path / "one")
    assert {
        n.removeprefix("base_model.model.")
        for n, m in back.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    } == kinds(adapted).keys()
    jlora.save_adapter(tmp_path / "two", again, config=jlora.LoraConfig.load(tmp_path / "one"), base_model="base")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_config_has_what_readers_want(checkpoints, tmp_path):
    for family, fan_in_fan_out in (("gpt2", True), ("llama", False)):
        _, params = jlora.load(checkpoints[family][0], dtype=jnp.float32)
        config = jlora.LoraConfig(rank=2, alpha=4.0)
        adapted = jlora.add_lora(params, config, key=jax.random.key(0))
        jlora.save_adapter(tmp_path / family, adapted, config=config, base_model="the/base")
        fields = json.loads((tmp_path / family / "adapter_config.json").read_text())
        expected = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4.0, "bias": "none", "use_dora": False,
            "fan_in_fan_out": fan_in_fan_out, "inference_mode": True, "base_model_name_or_path": "the/base",
            "modules_to_save": None, "init_lora_weights": True, "use_rslora": False,
        }  # fmt: skip
        assert expected.items() <= fields.items()
        tails = {m.rpartition(".")[2] for m in adapted_modules(adapted)}
        assert set(fields["target_modules"]) == tails and "lm_head" not in tails


def break_file(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_key(tensors):
    return sorted(tensors)[0]


def drop(tensors):
    del tensors[first_key(tensors)]


def add(tensors):
    tensors["base_model.model.surprise.lora_A.weight"] = np.zeros((2, 2), np.float32)


def reprefix(tensors):
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.")] = tensors.pop(name)


def reshape(tensors):
    name = first_key(tensors)
    tensors[name] = np.ascontiguousarray(tensors[name][:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (4, 48)"),
        (add, "unexpected: base_model.model.surprise.lora_A.weight (2, 2)"),
        (
            reprefix,
            "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (4, 48) "
            "(there is base_model.model.layers.0.self_attn.q_proj.lora_A.weight)",
        ),
        (
            reshape,
            "shape: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is (2, 48), should be (4, 48)",
        ),
    ],
)
def test_an_adapter_that_fits_in_part_is_refused(checkpoints, tmp_path, change, message):
    wrapped("llama", target_modules=["q_proj"]).save_pretrained(tmp_path)
    break_file(tmp_path, change)
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    with pytest.raises(ValueError, match="does not fit these parameters") as error:
        jlora.load_adapter(tmp_path, params)
    assert message in str(error.value)


def edit_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, r"shape: .*q_proj\.lora_A\.weight is \(4, 48\), should be \(8, 48\)"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"missing: .*v_proj\.lora_A\.weight"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, r"unexpected: .*layers\.1\..*q_proj"),
        ({"target_modules": ["c_attn"]}, r"`targets` 'c_attn' matches no linear kernel"),
        ({"peft_type": "IA3"}, r"peft_type 'LOHA' or 'LORA' or 'MISS'; this one is 'IA3'"),
        ({"use_dora": True}, r"missing: .*q_proj\.lora_magnitude_vector \(64,\)"),
        ({"modules_to_save": ["lm_head"]}, r"missing: base_model\.model\.lm_head\.weight \(97, 48\)"),
        ({"lora_bias": True}, r"lora_bias = True"),
    ],
    ids=str,
)
def test_an_adapter_whose_config_does_not_fit_is_refused(checkpoints, tmp_path, fields, message):
    wrapped("llama", target_modules=["q_proj"]).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    with pytest.raises(ValueError, match=message):
        jlora.load_adapter(tmp_path, params)


@pytest.mark.parametrize("kept", [4, 100, -4])
def test_a_truncated_file_is_refused_by_name(checkpoints, tmp_path, kept):
    wrapped("llama", target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is not a valid safetensors file"):
        jlora.load_adapter(tmp_path, params)


def test_an_adapter_goes_onto_unadapted_parameters(checkpoints, tmp_path):
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    adapted = save(tmp_path, params, jlora.LoraConfig(rank=2))
    with pytest.raises(ValueError, match="adapted already"):
        jlora.load_adapter(tmp_path, adapted)


def test_broken_directories(checkpoints, tmp_path):
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        jlora.load_adapter(tmp_path, params)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="Convert adapter_model.bin"):
        jlora.load_adapter(tmp_path, params)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        jlora.load_adapter(tmp_path, params)


def test_what_would_mislead_a_reader_is_not_written(checkpoints, tmp_path):
    _, params = jlora.load(checkpoints["llama"][0], dtype=jnp.float32)
    config = jlora.LoraConfig(rank=2, targets=["q_proj"])
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="not the one these parameters were adapted with"):
        jlora.save_adapter(
            tmp_path / "a", adapted, config=jlora.LoraConfig(rank=2, alpha=1, targets=["q_proj"]), base_model="b"
        )
    with pytest.raises(ValueError, match="not the one these parameters were adapted with"):
        jlora.save_adapter(tmp_path / "a", adapted, config=jlora.LoraConfig(rank=2, targets=["k_proj"]), base_model="b")
    adapter, base = jlora.split(adapted)
    broken = jlora.combine(jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), adapter), base)
    with pytest.raises(ValueError, match="is not finite"):
        jlora.save_adapter(tmp_path / "a", broken, config=config, base_model="b")
    with pytest.raises(ValueError, match="found no adapter"):
        jlora.save_adapter(tmp_path / "a", params, config=config, base_model="b")
    assert not (tmp_path / "a").exists()


@pytest.mark.few(1)
@pytest.mark.parametrize("trained_family", ["gpt2", "llama"])
def test_twenty_steps_follow_peft_and_torch(checkpoints, trained_family, tmp_path):
    """From PEFT's initial adapter, on the same batches, with clipping and unsupervised labels."""
    directory, _ = checkpoints[trained_family]
    theirs = wrapped(trained_family, target_modules=NAMES[trained_family], init_lora_weights=True)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(2)
    batches = []
    for _ in range(20):
        ids = rng.integers(0, VOCAB // 4, (4, 16))
        batches.append((ids, np.where(rng.random(ids.shape) < 0.7, ids, -100)))
    rate, clip = 5e-3, 1.0

    theirs.train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    expected = []
    for ids, labels in batches:
        loss = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        adam.step()
        expected.append(loss.item())

    model, params = jlora.load(directory, dtype=jnp.float32)
    adapter, base = jlora.split(jlora.load_adapter(tmp_path, params))
    tx = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=0.01))
    state = jlora.train.init_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    losses = []
    for ids, labels in batches:
        state, metrics = step(state, base, {"input_ids": ids, "labels": labels}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, atol=1e-3)
    final = peft.get_peft_model_state_dict(theirs)
    started = load_file(tmp_path / "adapter_model.safetensors")
    for module, weight in adapted_modules(jlora.combine(state.adapter, base)).items():
        for name in ("lora_A", "lora_B"):
            key = f"base_model.model.{module}.{name}.weight"
            moved = np.abs(final[key].numpy() - started[key]).max()
            # Adam divides by the gradient's size, so float32 noise in a near-zero gradient moves an element by up to the
            # rate: the bound is a twentieth of what training moved, and the mean is held closer.
            difference = np.abs(np.asarray(getattr(weight, name)).T - final[key].numpy())
            assert moved > 1e-2 and difference.max() < 0.05 * moved and difference.mean() < 1e-3 * moved
    assert losses[-1] < losses[0] - 0.1, "training must have gone somewhere"


@pytest.mark.few(1)
def test_merged_checkpoint_loads_in_transformers(checkpoint, family, tmp_path):
    directory, _ = checkpoint
    theirs = wrapped(family, target_modules=NAMES[family])
    theirs.save_pretrained(tmp_path / "peft")
    model, params = jlora.load(directory, dtype=jnp.float32)
    adapted = jlora.load_adapter(tmp_path / "peft", params)
    jlora.save_pretrained(tmp_path / "merged", model, adapted, max_shard_bytes=40_000)
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    back = type(theirs.get_base_model()).from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(torch_logits(back), torch_logits(theirs), atol=1e-4)
    again_model, again = jlora.load(tmp_path / "merged", dtype=jnp.float32)
    assert again_model.config == model.config
    np.testing.assert_allclose(our_logits(again_model, again), torch_logits(theirs), atol=1e-4)
    with pytest.raises(FileExistsError, match="already holds"):
        jlora.save_pretrained(tmp_path / "merged", model, adapted)
