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
from jlora.data import IGNORED, InstructDataset, load_data, prompt_ids, read_records, trained_too
from jlora.data.columns import has_empty_answer
from jlora.files import base_model_of
from jlora.models import model_from_config
from jlora.storage.structured import read_json
from jlora.train import init_state, make_step
from jlora.train.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def test_a_template_that_drops_earlier_thoughts_gives_each_answer_a_row():
    """trl#5213: the tokens of the prompt are not the beginning of the conversation's."""
    messages = [
        USER,
        {**ANSWER, "content": "<think>\nwhy\n</think>\n\nyes"},
        USER,
        {**ANSWER, "content": "<think>\nhm\n</think>\n\nno"},
    ]
    tokenizer = _tokenizer(THINKING)
    data = InstructDataset([("r:1", {"messages": messages})], tokenizer, template="chat", max_length=512)
    rows = [data.row(index) for index in range(len(data))]
    assert [tokenizer.decode(row.input_ids[row.labels != IGNORED]) for row in rows] == [
        "why\n</think>\n\nyes<|im_end|>",
        "hm\n</think>\n\nno<|im_end|>",
    ]
    # Behind what the model is given when it is to answer.
    for row, turns in zip(rows, (1, 3), strict=True):
        given = prompt_ids({"messages": messages[:turns]}, tokenizer, template="chat")
        assert row.input_ids[: len(given)].tolist() == given and "why" not in tokenizer.decode(given)
    assert (data.stats.records, data.stats.rows, data.stats.apart, data.stats.apart_at) == (1, 2, 1, ("r:1",))
    assert "1 records of which each answer is a row of its own" in data.stats.odd()[0]


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


@pytest.mark.slow
@pytest.mark.few(1)
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


@pytest.mark.slow
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


def test_the_newest_checkpoint_is_kept_though_the_evaluation_gets_worse(small, tmp_path):
    """orbax#526: with a measure of the best, the newest were deleted, and a run went on from an older one."""
    _, _, adapter, _, _ = small
    state, checkpoints = init_state(adapter, optax.sgd(0.1)), Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in enumerate((1.0, 2.0, 3.0, 4.0), 1):
        checkpoints.save(state._replace(step=jnp.int32(step)), eval_loss=loss if step == 1 else None)
    assert (checkpoints.latest, checkpoints.best) == (4, 1)


@pytest.mark.slow
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


@pytest.mark.slow
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


# What is there twice

REPEATED = {
    "a value": ('{"rank": 2, "rank": 4}', "rank"),
    "the same value": ('{"rank": 2, "rank": 2}', "rank"),
    "within": ('{"a": {"b": [{"c": 1, "c": 2}]}}', "c"),
    "escaped": ('{"rank": 2, "\\u0072ank": 4}', "rank"),
    "thrice": ('{"a": 1, "rank": 2, "rank": 3, "rank": 4}', "rank"),
    "empty": ('{"": 1, "": 2}', ""),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_a_key_that_is_there_twice_in_json(tmp_path, kind):
    """Readers take the last of the two."""
    text, key = REPEATED[kind]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.* cannot be used: the key '{key}' is there twice"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("text", ['{"a": {"b": 1}, "c": {"b": 1}}', '{"a": 1, "A": 2}', '{"a": [{"b": 1}, {"b": 2}]}'])
def test_keys_of_different_objects(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert read_json(tmp_path / "config.json") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("rank: 2\nalpha: 4\nrank: 4\n", "rank", "1 and 3"),
        ("rank: 2\n'rank': 4\n", "rank", "1 and 2"),
        ("{rank: 2, rank: 2}\n", "rank", "1 and 1"),
        ("# a comment\nmodel: gpt2\n\ntargets: [a]\ntargets: [b]\n", "targets", "4 and 5"),
        ("rank: 2\nmodel: {a: 1, b: 2, a: 3}\n", "a", "2 and 2"),
        ("a:\n- b: 1\n  b: 2\n", "b", "2 and 3"),
    ],
)
def test_a_key_that_is_there_twice_in_yaml(tmp_path, capsys, text, key, lines):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["finetune", "--config", str(tmp_path / "run.yaml")])
    assert f"run.yaml' is not valid YAML: the key {key!r} is there twice, in lines {lines}" in capsys.readouterr().err


WHOLE = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' is there twice"),
        ('{"instruction": "a", "instruction": "a", "output": "b"}', "the key 'instruction' is there twice"),
        (
            '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
            "the key 'content' is there twice",
        ),
        (WHOLE[:-1] + ', "tools": "[{\\"name\\": \\"f\\", \\"name\\": \\"g\\"}]"}', "the key 'name' is there twice"),
        (WHOLE[:-1] + ', "x": ' + "[" * 100 + "]" * 100 + "}", "nested deeper than 64"),
        (WHOLE[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 64"),
        (WHOLE[:-1] + ', "x": ' + "9" * 5000 + "}", "integer"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_records_that_cannot_be_taken_at_their_word(tmp_path, line, says, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text(f"{WHOLE}\n{line}\n{WHOLE}\n" if ending == "jsonl" else f"[{WHOLE},\n{line},\n{WHOLE}]")
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert says in str(error.value)
    in_one = ending == "json" and len(line) > 1000  # the file is one value, which Python's reader gives up
    assert (f"a.{ending}: " if in_one else f"a.{ending}:2: ") in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("file", ["adapter_config.json", "config.json"])
def test_a_model_or_adapter_that_says_two_things(base, tmp_path, file):
    directory, (model, params) = tmp_path / "m", jlora.load(base, dtype=jnp.float32)
    config = jlora.LoraConfig(rank=2, targets=["c_attn"])
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    if file == "config.json":
        jlora.save_pretrained(directory, model, params)
    else:
        jlora.save_adapter(directory, adapted, config=config, base_model="x")
    text = (directory / file).read_text()
    (directory / file).write_text(text.replace("{", '{"r": 3, "n_head": 4,', 1))
    with pytest.raises(ValueError, match=rf"{file}.*the key '(r|n_head)' is there twice"):
        jlora.load(directory) if file == "config.json" else jlora.load_adapter(directory, params)


# What is trained as well, and what says nothing

SEVEN = [("hi", word) for word in "lamp wind salt rope rain tide gull".split()]


@pytest.mark.parametrize(
    ("train", "held_out", "both"),
    [
        (SEVEN, SEVEN, "7 of 7"),
        (SEVEN, [*SEVEN[:2], ("hi", "new")], "2 of 3"),
        (SEVEN * 3, [SEVEN[0], SEVEN[0]], "2 of 2"),
        (SEVEN[:4], SEVEN[4:], None),
        (SEVEN, [("hello", "lamp")], None),
        (SEVEN, [("hi", "lamp ")], None),
        ([("hi", LONG + " end")], [("hi", LONG + " other end")], "1 of 1"),  # the same within max_length
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_held_out_records_that_are_trained_too(base, tmp_path, train, held_out, both, pack):
    """axolotl#2719: the loss of what was trained on, called an evaluation."""
    sets = load_data(
        _chats(tmp_path / "a.jsonl", train), jlora.load_tokenizer(base), template="chat", max_length=48, seed=0,
        eval_data=_chats(tmp_path / "b.jsonl", held_out), directory=tmp_path, pack=pack,
    )  # fmt: skip
    said = trained_too(*sets)
    assert said == (both and f"{both} records to evaluate on are in the training data too")


@pytest.mark.parametrize(("given", "said"), [("same", "1 of 1 documents"), ("other", None), ("share", None)])
def test_held_out_text_that_is_trained_too(base, tmp_path, given, said):
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        (tmp_path / f"{name}.txt").write_text(tiny.text(seed=seed))
    more = {"eval_fraction": 0.5} if given == "share" else {"eval_data": str(tmp_path / f"{given}.txt")}
    sets = load_data(
        str(tmp_path / "a.txt"), jlora.load_tokenizer(base), max_length=32, seed=0, directory=tmp_path / "d", **more
    )
    assert trained_too(*sets) == (said and f"{said} to evaluate on are in the training data too")


EMPTY = {
    "empty": ({"instruction": "a", "output": ""}, True),
    "spaces": ({"instruction": "a", "output": " \n\t"}, True),
    "no-break space": ({"instruction": "a", "output": "\u00a0"}, True),
    "a letter": ({"instruction": "a", "output": "x"}, False),
    "no input": ({"instruction": "a", "input": "", "output": "x"}, False),
    "a turn": ({"messages": [USER, {**ANSWER, "content": ""}]}, True),
    "one of two turns": ({"messages": [USER, {**ANSWER, "content": " "}, USER, ANSWER]}, True),
    "a turn that is not trained": ({"messages": [USER, {**ANSWER, "content": " ", "train": False}, USER, ANSWER]}, False),
    "the user's": ({"messages": [{**USER, "content": ""}, ANSWER]}, False),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_answers_are_counted_and_trained(tmp_path, kind):
    """axolotl#1731; Alpaca has 28 of them."""
    record, is_empty = EMPTY[kind]
    path = tiny.write_records(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, record])
    made = InstructDataset(read_records(path), _tokenizer(tiny.CHATML), template="chat", max_length=128)
    assert (made.stats.empty, made.stats.empty_at) == ((1, (f"{path}:2",)) if is_empty else (0, ()))
    assert len(made) == 2
    said = f"1 records with an empty answer, which is trained (first: {path}:2)"
    assert made.stats.odd() == ([said] if is_empty else []) and made.stats.cut() == []


def test_a_tool_call_or_a_thought_is_no_empty_answer():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert not has_empty_answer({"messages": [USER, call]})
    assert not has_empty_answer({"messages": [USER, {**ANSWER, "content": "", "reasoning_content": "why"}]})
    assert has_empty_answer({"messages": [USER, {**ANSWER, "content": "", "reasoning_content": ""}]})


@pytest.mark.slow
def test_both_are_said_once_by_finetune_and_by_evaluate(base, tmp_path, capsys):
    data = _chats(tmp_path / "a.jsonl", [*SEVEN, ("hi", " ")] * 3)
    config = jlora.FinetuneConfig(
        model=base, data=data, output=str(tmp_path / "run"), template="chat", steps=1, max_length=48, batch_size=2
    )
    jlora.finetune(config)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("2 of 2 records to evaluate on are in the training data too") == 1
    assert len(re.findall(r"\d records with an empty answer", said)) == 1
    main(["evaluate", "--adapter", str(tmp_path / "run/adapter")])
    captured = capsys.readouterr()
    assert captured.err.count("note: 2 of 2 records to evaluate on are in the training data too\n") == 1
    main(["evaluate", "--adapter", str(tmp_path / "run/adapter"), "--split", "train"])
    captured = capsys.readouterr()
    assert "in the training data too" not in captured.err and "--max-length" not in captured.err
    assert len(re.findall(r"note: \d records with an empty answer", captured.err)) == 1
