"""Runs that train something else than a new adapter: every parameter, an adapter that is there, with a teacher beside the data."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import options
from transformers import AutoModelForCausalLM

import jlora
from jlora.runs import steps

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def batches(monkeypatch):
    """Step, from 0 -> the batch that a run took for it."""
    seen, batch = {}, steps.data_lib.batch
    monkeypatch.setattr(
        steps.data_lib, "batch", lambda data, step, **where: seen.setdefault(step, batch(data, step, **where))
    )
    return seen


def losses(result):
    return [entry["loss"] for entry in result.history if entry["step"]]


def logits_and_labels(model, batch):
    """Of the tokens that are predicted, by transformers."""
    ids, labels = (torch.tensor(np.asarray(batch[name])).long() for name in ("input_ids", "labels"))
    return model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


# Every parameter


@pytest.fixture(scope="module")
def full(gpt2_dir, text_file, tmp_path_factory):
    changes = {"full": True, "rank": 8, "targets": ("all-linear",), "learning_rate": 3e-3, "weight_decay": 0.1}
    output = tmp_path_factory.mktemp("full") / "run"
    return options(model=gpt2_dir, data=text_file, output=str(output), eval_fraction=0.1, **changes)


def test_a_full_run_follows_torch(full, batches):
    result = jlora.finetune(full)
    model = AutoModelForCausalLM.from_pretrained(full.model, dtype=torch.float32).eval()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer, rates, expected = torch.optim.AdamW(groups, lr=1.0), full.rates(full.steps), []
    for step in range(full.steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates(step))
        loss = torch.nn.functional.cross_entropy(*logits_and_labels(model, batches[step]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses(result), expected, rtol=1e-4)
    assert result.adapter_dir is None and not (Path(full.output) / "adapter").exists()
    assert (result.model_dir / "tokenizer.json").is_file()
    saved = dict(AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32).named_parameters())
    for name, p in model.named_parameters():
        # Where a gradient is next to nothing, Adam makes a whole step of its rounding.
        difference = (saved[name] - p).abs()
        assert difference.mean() < 2e-5 and difference.max() < 2e-3, name
    assert result.eval_loss < result.base_eval_loss


@pytest.mark.slow
def test_a_full_run_resumes_to_the_byte(full, tmp_path):
    config = dataclasses.replace(full, output=str(tmp_path / "run"))
    result = jlora.finetune(config)
    weights = result.model_dir / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(result.model_dir)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = jlora.finetune(dataclasses.replace(config, resume=True))
    assert weights.read_bytes() == before and again.eval_loss == result.eval_loss


def test_the_memory_of_a_full_step(llama_dir, call):
    flags = ("memory", "--model", llama_dir, "--full", "--json")
    adamw, sgd = (json.loads(call(*flags, *more).out) for more in ((), ("--optimizer", "sgd")))
    parameters = jlora.count(jlora.load(llama_dir)[1])
    assert (adamw["weights"], adamw["adapter"], adamw["gradients"]) == (0, 4 * parameters, 4 * parameters)
    assert adamw["optimizer"] >= 8 * parameters > sgd["optimizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": True}, "`rank` has no effect with `full`, which trains no adapter; got 2"),
        ({"full": True, "rank": 8, "quantize": "nf4"}, "`full` trains dense parameters; got quantize='nf4'"),
        ({"full": True, "rank": 8, "lora_plus_ratio": 2.0}, "`lora_plus_ratio` is of an adapter"),
        ({"full": True, "rank": 8, "init_adapter": "a"}, "`init_adapter` is of an adapter"),
        ({"init_adapter": "a", "init": "pissa"}, "`init` has no effect with `init_adapter`"),
        ({"teacher_weight": 0.5}, "`teacher_weight` has no effect without `teacher`"),
        ({"teacher": "t", "teacher_weight": 1.5}, "`teacher_weight` must be in"),
        ({"teacher": "t", "teacher_temperature": 0.0}, "`teacher_temperature` must be positive"),
    ],
)
def test_what_excludes_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


# An adapter that is there


def test_a_run_starts_from_another_s_adapter(gpt2_dir, text_file, tmp_path):
    first = options(
        model=gpt2_dir, data=text_file, output=str(tmp_path / "first"), eval_fraction=0.1, learning_rate=1e-2
    )
    adapter = jlora.finetune(first).adapter_dir
    changes = {"output": str(tmp_path / "second"), "init_adapter": str(adapter), "steps": 2, "dropout": 0.1}
    second = dataclasses.replace(first, **changes)
    result = jlora.finetune(second)
    assert result.base_eval_loss == tiny.read_log(first.output)[-1]["eval_loss"] != result.eval_loss
    assert [entry["step"] for entry in result.history] == [0, 1, 2]
    for other, message in (
        ({"rank": 4}, r"lora_A: the adapter has \[2, 32, 2\], this run \[2, 32, 4\]"),
        ({"targets": ("c_fc",)}, "c_attn/kernel/lora_A: the adapter has .*this run none"),
        ({"alpha": 1.0}, "scaling: the adapter has 8.0, this run 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            jlora.finetune(dataclasses.replace(second, output=str(tmp_path / "third"), **other))
    # Another adapter, or none: another run.
    with pytest.raises(ValueError, match="init_adapter: was '.*', is None"):
        jlora.finetune(dataclasses.replace(second, resume=True, init_adapter=None))
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="init_adapter: was '.*', is '.*'"):
        jlora.finetune(dataclasses.replace(second, resume=True))


# A teacher


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """Wider than the model, with its tokenizer."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "teacher", tiny.GPT2 | {"n_embd": 48}, seed=1)


@pytest.mark.few(1)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_teacher_is_learned_from(quantize, gpt2_dir, teacher_dir, text_file, tmp_path, batches):
    """The first loss is PyTorch's of transformers' logits."""
    taught = options(
        model=gpt2_dir, data=text_file, output=str(tmp_path / "run"), eval_fraction=0.1, steps=1, teacher=teacher_dir,
        teacher_temperature=2.0, teacher_quantize=quantize,
    )  # fmt: skip
    result = jlora.finetune(taught)
    with torch.no_grad():
        (ours, labels), (theirs, _) = (
            logits_and_labels(AutoModelForCausalLM.from_pretrained(name).eval(), batches[0])
            for name in (gpt2_dir, teacher_dir)
        )
        data = torch.nn.functional.cross_entropy(ours, labels)
        ours, theirs = ((x / 2.0).log_softmax(-1)[labels != -100] for x in (ours, theirs))
        divergence = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    expected = (0.5 * data + 0.5 * 2.0**2 * divergence).item()
    assert losses(result)[0] == pytest.approx(expected, rel=1e-4 if quantize is None else 1e-2)
    assert result.base_eval_loss == pytest.approx(data.item(), rel=0.05), "evaluation is of the data alone"
    assert abs(expected - data.item()) > 0.2 * data.item()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["origin"]["teacher"]


def test_a_teacher_with_other_tokens_is_refused(gpt2_dir, teacher_dir, text_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher_dir, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|start|>"))
    config = options(model=gpt2_dir, data=text_file, output=str(tmp_path / "run"), teacher=str(other))
    with pytest.raises(ValueError, match="`teacher` must have the vocabulary of the model.*has another"):
        jlora.finetune(config)
    assert not (tmp_path / "run").exists()
