"""Situations of public bug reports of other libraries that had no test of their own here; docs/silent-failures.md lists all."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from transformers import AutoTokenizer

import jlora
from jlora.cli import main
from jlora.data import IGNORED, InstructDataset
from jlora.io import base_model_of
from jlora.models import model_from_config
from jlora.train import init_state, make_step
from jlora.train.checkpoints import Checkpoints

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}

# The part of each family's template that says where a turn begins and ends.
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen3's: thoughts stay in the last answer only, and the generation prompt may open them.
THINKING = (
    "{% for m in messages %}{% set last = loop.last %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if last %}<think>\n{{ (parts[0] if parts | length > 1 else '').split('<think>')[-1].strip('\n') }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def _model(fields):
    model = model_from_config(fields | {"vocab_size": 64}, dtype=jnp.float32)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _tokenizer(template):
    tokenizer = tiny.tokenizer(chat=template)
    marks = ["<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    return tokenizer


def _supervised(messages, tokenizer):
    (row,) = [InstructDataset([("r:1", {"messages": messages})], tokenizer, template="chat", max_length=512).row(0)]
    return tokenizer.decode(row.input_ids[row.labels != IGNORED])


@pytest.mark.parametrize(
    ("template", "end", "before"),
    [
        (GEMMA, "<end_of_turn>", ""),
        (MISTRAL, tiny.EOT, " "),
        (LLAMA3, "<|eot_id|>", ""),
        (tiny.CHATML, "<|im_end|>", ""),
    ],
)
@pytest.mark.parametrize("text", ["yes", "yes yes", "user", "model", "two\n\nlines", "[INST]"])
def test_answers_and_their_ends_are_supervised_whatever_they_repeat(template, end, before, text):
    """axolotl#3754: the end of a turn was never trained; axolotl#2089: answers were looked for by their text."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    one = before + text + end
    assert _supervised(messages, _tokenizer(template)) == one
    assert _supervised(messages * 2, _tokenizer(template)) == one * 2


@pytest.mark.parametrize(
    ("content", "supervised"),
    [
        ("<think>\nwhy\n</think>\n\nyes", "why\n</think>\n\nyes<|im_end|>"),
        ("why\n</think>\n\nyes", "why\n</think>\n\nyes<|im_end|>"),  # as a model that was given "<think>" writes it
        ("yes", "\n</think>\n\nyes<|im_end|>"),
    ],
)
def test_thoughts_are_trained_behind_the_prompt_that_opens_them(content, supervised):
    """trl#6361: "<think>" stood in the training text twice."""
    assert _supervised([USER, {**ANSWER, "content": content}], _tokenizer(THINKING)) == supervised


def test_a_template_that_drops_earlier_thoughts_is_refused_for_several_answers():
    """trl#5213: the tokens of the prompt are not the beginning of the conversation's."""
    with pytest.raises(ValueError, match=r"r:1: .*template"):
        _supervised([USER, {**ANSWER, "content": "<think>\nwhy\n</think>\n\nyes"}, USER, ANSWER], _tokenizer(THINKING))


def test_truncation_and_padding_left_in_tokenizer_json_cut_nothing(tmp_path):
    """A tokenizer saved after a call that cut and padded keeps both in its file."""
    tokenizer = tiny.tokenizer(chat=tiny.CHATML)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fields["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": tiny.EOT,
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    record = [("r:1", {"messages": [USER, {**ANSWER, "content": "the keeper lit a lamp and wrote of wind"}]})]
    rows = [
        InstructDataset(record, t, template="chat", max_length=128).row(0).input_ids.tolist()
        for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path))
    ]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def small():
    model, params = _model(tiny.GPT2)
    config = jlora.LoraConfig(rank=2, targets=["c_attn"])
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    ids = jax.random.randint(jax.random.key(1), (4, 16), 0, 60)
    return model, params, adapter, base, {"input_ids": ids, "labels": ids}


def _distance(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.MultiSteps(optax.adam(1e-3), 2),
        lambda: optax.MultiSteps(optax.chain(optax.zero_nans(), optax.adam(1e-3)), 2),  # optax#828: a TypeError
    ],
)
def test_optax_multi_steps_over_micro_batches_is_accumulation(small, wrap):
    """optax#320: equal numbers of supervised tokens in the halves, so that a mean of means is the mean."""
    model, _, adapter, base, batch = small
    loss, key = jlora.train.causal_lm_loss(model), jax.random.key(2)
    tx = optax.adam(1e-3)
    whole, _ = make_step(loss, tx, accumulate=2)(init_state(adapter, tx), base, batch, key)
    tx = wrap()
    step, state = make_step(loss, tx), init_state(adapter, tx)
    for half in (slice(0, 2), slice(2, 4)):
        state, _ = step(state, base, {name: rows[half] for name, rows in batch.items()}, key)
    assert 0 < _distance(whole.adapter, adapter)
    assert _distance(state.adapter, whole.adapter) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_batch_without_supervised_tokens_moves_nothing(small, dtype):
    """optax#1754: Adam's epsilon is zero in float16, and 0 / 0 poisons all that follows."""
    model, _, adapter, base, batch = small
    adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    nothing = batch | {"labels": jnp.full_like(batch["labels"], IGNORED)}
    step = make_step(jlora.train.causal_lm_loss(model), tx)
    state, metrics = step(init_state(adapter, tx), base, nothing, jax.random.key(2))
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)
    assert _distance(state.adapter, adapter) == 0.0
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("other", ["rank", "layers", "modules", "dtype", "optimizer"])
def test_a_checkpoint_of_another_state_is_not_restored_in_part(small, tmp_path, other):
    """orbax#2972: a smaller tree was filled from a larger checkpoint without a word."""
    _, params, adapter, _, _ = small
    tx = optax.adamw(1e-3)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(init_state(adapter, tx)._replace(step=jnp.int32(1)), eval_loss=None)
    configs = {
        "rank": {"rank": 3}, "layers": {"layers_to_transform": [0]}, "modules": {"targets": ["c_attn", "c_fc"]},
    }  # fmt: skip
    config = jlora.LoraConfig(**{"rank": 2, "targets": ["c_attn"]} | configs.get(other, {}))
    adapter, _ = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    if other == "dtype":
        adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter)
    like = init_state(adapter, optax.sgd(0.1) if other == "optimizer" else tx)
    with pytest.raises(ValueError, match="another adapter or optimizer"):
        checkpoints.restore(like, 1)
    checkpoints.close()


def test_the_newest_checkpoint_is_kept_though_the_evaluation_gets_worse(small, tmp_path):
    """orbax#526: with a measure of the best, the newest were deleted, and a run went on from an older one."""
    _, _, adapter, _, _ = small
    state, checkpoints = init_state(adapter, optax.sgd(0.1)), Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in enumerate((1.0, 2.0, 3.0, 4.0), 1):
        checkpoints.save(state._replace(step=jnp.int32(step)), eval_loss=loss)
    assert (checkpoints.latest, checkpoints.best) == (4, 1)
    checkpoints.close()


def test_a_save_that_fails_ends_the_run(tmp_path, monkeypatch):
    """orbax#605, keras#23609: an error of a checkpoint stayed in its thread, and training went on."""
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    for name in ("save", "async_save"):
        monkeypatch.setattr(ocp.StandardCheckpointHandler, name, fail, raising=False)
    model = tiny.write_checkpoint(tmp_path / "model", tiny.GPT2)
    (tmp_path / "text.txt").write_text(tiny.text())
    config = jlora.FinetuneConfig(
        model=model, data=str(tmp_path / "text.txt"), output=str(tmp_path / "run"), steps=1, max_length=32,
        batch_size=2, eval_fraction=0, quiet=True,
    )  # fmt: skip
    with pytest.raises(OSError, match="the disk is gone"):
        jlora.finetune(config)
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_saved_in_bfloat16_is_read_in_its_own_dtype(tmp_path):
    """aprender#2189: the bytes of bfloat16 factors were taken for float32."""
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    _, params = _model(tiny.LLAMA)
    config = jlora.LoraConfig(rank=2, targets=["q_proj"])
    jlora.save_adapter(
        tmp_path / "a", jlora.add_lora(params, config, key=jax.random.key(0)), config=config, base_model="x"
    )
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}, path, metadata={"format": "pt"})
    read = jlora.load_adapter(tmp_path / "a", params)
    wanted = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    factor = read["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"].lora_A
    np.testing.assert_allclose(np.asarray(factor).T, wanted, rtol=1e-2)


LONG = " ".join(["the keeper lit a lamp"] * 20)
CUT = [("hi", "yes"), (LONG, "no"), (LONG, "rain"), ("hi", LONG)]  # one whole, two without an answer left, one cut


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "model", tiny.GPT2, chat=tiny.CHATML)


def _chats(path, pairs):
    turns = [[{**USER, "content": said}, {**ANSWER, "content": answer}] for said, answer in pairs]
    return tiny.write_records(path, [{"messages": messages} for messages in turns])


@pytest.mark.parametrize("held_out", ["file", "share"])
def test_what_is_cut_of_the_evaluation_data_is_said(base, tmp_path, capsys, held_out):
    """trl#1053: an evaluation over what was left."""
    data = _chats(tmp_path / "train.jsonl", [("hi", "yes")] * 8 if held_out == "file" else CUT * 8)
    evaluation = {"eval_data": _chats(tmp_path / "eval.jsonl", CUT)} if held_out == "file" else {"eval_fraction": 0.5}
    config = jlora.FinetuneConfig(
        model=base, data=data, output=str(tmp_path / "run"), template="chat", steps=1, max_length=24, batch_size=2,
        **evaluation,
    )  # fmt: skip
    jlora.finetune(config)
    said = " ".join(capsys.readouterr().out.split())
    counts = {
        what: re.search(rf"of the evaluation data (\d+) records {what} at", said) for what in ("truncated", "dropped")
    }
    assert all(counts.values()), said
    if held_out == "file":
        assert {what: int(found[1]) for what, found in counts.items()} == {"truncated": 1, "dropped": 2}
        assert said.count("at max_length") == 2, "nothing of the training data was cut"


@pytest.mark.parametrize(("pairs", "truncated", "dropped"), [(CUT, 1, 2), ([("hi", "yes")], 0, 0), (CUT[::3], 1, 0)])
def test_evaluate_counts_what_is_cut(base, tmp_path, capsys, pairs, truncated, dropped):
    data = _chats(tmp_path / "eval.jsonl", pairs)
    flags = ["--data", data, "--template", "chat", "--split", "all", "--max-length", "24"]
    main(["evaluate", "--model", base, *flags])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["truncated"], report["dropped"]) == (truncated, dropped)
    assert (f"{truncated} records truncated at max_length (first: {data}:" in captured.err) == (truncated > 0)
    assert (f"{dropped} records dropped at max_length (first: {data}:2)" in captured.err) == (dropped > 0)


@pytest.mark.parametrize(
    ("base_model", "revision", "refused"),
    [
        ("org/name", "v1.2", True), ("gpt2", "0123abc", True), ("org/name", "main", False), ("org/name", None, False),
        ("", "v1.2", False), (".", "v1.2", False), ("/not/there", "v1.2", True),
    ],
)  # fmt: skip
def test_an_adapter_of_another_revision_of_its_base(tmp_path, base_model, revision, refused):
    """peft#1567: the adapter went onto the newest base."""
    fields = {
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "base_model_name_or_path": base_model,
        "revision": revision,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    if refused:
        with pytest.raises(ValueError, match=f"of revision '{revision}' of '{base_model}'.*--model"):
            base_model_of(tmp_path)
    else:
        assert base_model_of(tmp_path) == base_model
