"""Training in float16: the loss is scaled as by torch's GradScaler, and what overflows is left out."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from oracles import FAMILIES
from safetensors.numpy import load_file, save_file

import jlora
from jlora.runs.flags import compute
from jlora.runs.loop import TrainingDiverged
from jlora.train import dynamic_loss_scale, init_state, make_step
from jlora.train import loss_scale as module

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
ASSETS = Path(__file__).parents[1] / "examples" / "assets"


def test_constants_are_torch_s():
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    ours = module.INITIAL, module.GROWTH, module.BACKOFF, module.GROWTH_INTERVAL
    theirs = scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    assert ours == theirs


def loss_fn(params, batch, key):
    y = (batch["x"] * batch["size"].astype(jnp.float16)) @ params["w"].astype(jnp.float16)
    return jnp.sum(jnp.square(y.astype(jnp.float32) * 0.1)), jnp.int32(y.size)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_follow_torch_s_scaler(accumulate):
    """Through overflow, growth and updates, of a float16 product whose gradient overflows at first and now and then."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float16)
    sizes = [1.0, 40.0, 1.0, 1.0, 1.0, 900.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    theirs = torch.nn.Parameter(torch.tensor(w))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3)

    tx = dynamic_loss_scale(optax.adamw(1e-2, weight_decay=0.0), initial=2.0**17, growth_interval=3)
    step, state = make_step(loss_fn, tx, accumulate=accumulate), init_state({"w": jnp.asarray(w)}, tx)
    scales = []
    for size in sizes:
        optimizer.zero_grad()
        y = (torch.tensor(x) * np.float16(size)) @ theirs.to(torch.float16)
        scaler.scale((y.float() * 0.1).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        batch = {"x": jnp.asarray(x), "size": jnp.full((len(x), 1), size)}
        state, metrics = step(state, None, batch, KEY)
        assert float(state.opt_state.scale) == scaler.get_scale()
        np.testing.assert_allclose(state.adapter["w"], theirs.detach(), atol=2e-4)
        scales.append(scaler.get_scale())
    assert min(scales) < 2.0**17 < max(scales), "it falls and grows"
    assert int(state.opt_state.skipped) == sum(b < a for a, b in zip([2.0**17, *scales], scales, strict=False)) > 1
    assert int(state.step) == len(sizes) and step._cache_size() == 1


def test_a_skipped_step_changes_nothing_but_the_scale():
    tx = dynamic_loss_scale(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), initial=2.0**40)
    w = {"w": jnp.ones((6, 3))}
    batch = {"x": jnp.ones((4, 6), jnp.float16), "size": jnp.ones((4, 1))}
    before = init_state(w, tx)
    state, metrics = make_step(loss_fn, tx)(init_state(w, tx), None, batch, KEY)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, state.adapter, before.adapter)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state.inner, before.opt_state.inner)
    assert (float(state.opt_state.scale), int(state.opt_state.skipped), int(state.step)) == (2.0**39, 1, 1)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_float16_are_float32_s(checkpoints, family):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 90, (2, 16)))
    segments = jnp.asarray(np.repeat([[1, 2, 0]], 2, axis=0).repeat([6, 6, 4], axis=1))
    found = []
    for dtype in (jnp.float16, jnp.float32):
        model, params = jlora.load(checkpoints[family][0], dtype=dtype, stack=True)
        found.append(model.apply({"params": params}, ids, segment_ids=segments))
    assert found[0].dtype == jnp.float32 and np.isfinite(found[0]).all()
    assert np.abs(found[0] - found[1]).max() < 0.01 * np.abs(found[1]).max()


# Runs


def config(gpt2_dir, text_file, output, **changes):
    fields = {
        "model": gpt2_dir, "data": text_file, "output": str(output), "steps": 4, "rank": 2, "targets": ("c_attn",), "batch_size": 2,
        "max_length": 16, "eval_fraction": 0, "checkpoint_every": 2, "quiet": True, "learning_rate": 1e-2, "dtype": "float16",
    }  # fmt: skip
    return jlora.FinetuneConfig(**fields | changes)


def scaled_from(monkeypatch, initial):
    monkeypatch.setattr(compute, "dynamic_loss_scale", functools.partial(dynamic_loss_scale, initial=initial))


@pytest.mark.slow
def test_a_run_resumes_to_the_byte_with_its_scale(gpt2_dir, text_file, tmp_path, monkeypatch, capsys):
    scaled_from(monkeypatch, 2.0**21)  # of which two steps overflow
    options = config(gpt2_dir, text_file, tmp_path / "run")
    whole = jlora.finetune(dataclasses.replace(options, quiet=False))
    said = capsys.readouterr()
    assert "float16 is slow on a CPU" in " ".join(said.err.split()) and "2 steps were left out" in said.out
    log = tiny.read_log(tmp_path / "run")
    assert [entry["skipped"] for entry in log] == [1, 2, 2, 2]
    assert [entry["loss_scale"] for entry in log] == [2.0**20, 2.0**19, 2.0**19, 2.0**19]
    assert [entry["grad_norm"] is None for entry in log] == [True, True, False, False]
    assert len({entry["learning_rate"] for entry in log[:3]}) == 1, "no update was made before the third step"
    before = (whole.adapter_dir / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(whole.adapter_dir)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = jlora.finetune(dataclasses.replace(options, resume=True))
    assert (resumed.adapter_dir / "adapter_model.safetensors").read_bytes() == before
    without = [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in log]
    again = tiny.read_log(tmp_path / "run")
    assert [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in again] == without


@pytest.mark.slow
def test_a_run_that_always_overflows_ends(gpt2_dir, text_file, tmp_path, monkeypatch):
    scaled_from(monkeypatch, 1.5)
    edit = Path(tiny.write_checkpoint(tmp_path / "large", tiny.GPT2))
    tensors = load_file(edit / "model.safetensors")
    tensors = {name: x * 3000 if ".mlp." in name else x for name, x in tensors.items()}
    save_file(tensors, edit / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingDiverged, match="--dtype float32"):
        jlora.finetune(config(str(edit), text_file, tmp_path / "run"))


def test_a_model_is_measured_and_speaks_in_float16(call):
    """As it does in float32: what was trained in float16 is used on the same card."""
    model, text = ASSETS / "tiny-llama", ASSETS / "style.txt"
    flags = "--max-length", 64, "--eval-fraction", 0.02
    loss, said = {}, {}
    for dtype in ("float16", "float32"):
        report = json.loads(call("evaluate", "--model", model, "--data", text, *flags, "--dtype", dtype).out)
        loss[dtype] = report["eval_loss"]
        said[dtype] = call(
            "generate", "--model", model, "--prompts", "The lamp", "--temperature", 0, "--dtype", dtype
        ).out
    assert loss["float16"] == pytest.approx(loss["float32"], rel=1e-3) and loss["float16"] != loss["float32"]
    assert said["float16"] == said["float32"] and len(said["float16"]) > 40


def test_activations_that_float16_cannot_hold(fails, tmp_path):
    broken = shutil.copytree(ASSETS / "tiny-llama", tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    scale = {name: 3e4 if "down_proj" in name else 1 for name in tensors}
    save_file(
        {n: t * t.dtype.type(scale[n]) for n, t in tensors.items()}, broken / "model.safetensors", {"format": "pt"}
    )
    flags = "--model", broken, "--data", ASSETS / "style.txt", "--max-length", 64, "--eval-fraction", 0.02
    assert "Compute in float32 (`--dtype float32`)" in fails("evaluate", *flags, "--dtype", "float16")
