"""Templates and instruction rows: what is supervised, one BOS, one end-of-text, nothing lost in silence."""

import json
from datetime import date

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jlora.data import (
    IGNORED,
    InstructDataset,
    batch,
    eval_batches,
    load_data,
    pad_id,
    preview,
    prompt_ids,
    render,
    split_records,
    steps_per_epoch,
    summary,
    supervised_tokens,
)
from jlora.data.templates import ALPACA_WITH_INPUT, CHAT_DATE
from jlora.data.tokens import added_bos, encode

EOT, END = "<|endoftext|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The part of Llama 3's that matters here: BOS in the text, contents trimmed, the date asked for.
LLAMA3 = (
    "{{- bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
# Written by hand from the Stanford repository, not from the code under test.
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a color.\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:"
)
COLOR = {"instruction": "Name a color.", "input": "", "output": "Red."}
ADD = {"instruction": "Add {x}.", "input": "1 2", "output": "3"}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a color."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another?"},
        {"role": "assistant", "content": " Blue.\n"},
    ]
}


def make_tokenizer(*, adds_bos=False, bos=True, eos=True, pad=False, chat=CHATML):
    """A small byte-level BPE tokenizer with the special tokens asked for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOT, "<s>", "<pad>", "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([NO_INPUT, WITH_INPUT] * 3, trainer)
    if adds_bos:
        ids = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    names = {"bos_token": "<s>"} if bos else {}
    names |= ({"eos_token": EOT} if eos else {}) | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def dataset(records, tokenizer, template="alpaca", max_length=512, pack=False):
    records = [(f"f:{i}", record) for i, record in enumerate(records, 1)]
    return InstructDataset(records, tokenizer, template=template, max_length=max_length, pack=pack)


def random_records(n, seed=0):
    rng = np.random.default_rng(seed)

    def words(most):
        return " ".join(rng.choice(["red", "add", "é", "3"], rng.integers(0, most)))

    return [{"instruction": words(40), "input": words(5), "output": words(60)} for _ in range(n)]


# ---- alpaca


def test_alpaca_is_stanfords(tokenizer):
    assert render(COLOR, tokenizer, template="alpaca") == [(NO_INPUT, False), ("Red." + EOT, True)]
    assert render(ADD, tokenizer, template="alpaca") == [(WITH_INPUT, False), ("3" + EOT, True)]
    without = {"instruction": "Name a color.", "output": "Red." + EOT}
    assert render(without, tokenizer, template="alpaca") == [(NO_INPUT, False), ("Red." + EOT, True)], "one end of text"


def test_loss_on_the_response_and_its_end_only(tokenizer):
    row = dataset([COLOR], tokenizer).row(0)
    prompt, response = encode(tokenizer, NO_INPUT), [*encode(tokenizer, "Red."), tokenizer.eos_token_id]
    assert row.input_ids.tolist() == prompt + response
    assert row.labels.tolist() == [IGNORED] * len(prompt) + response
    assert row.input_ids.dtype == row.labels.dtype == np.int32 and row.segment_ids is None
    assert prompt_ids(COLOR, tokenizer, template="alpaca") == prompt


def test_pad_equal_to_end_of_text_is_harmless(tokenizer):
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    rows, eos = dataset([COLOR, ADD], tokenizer), tokenizer.eos_token_id
    n = len(rows.row(0).input_ids)
    arrays = next(eval_batches(rows, batch_size=3))
    assert n < rows.length and arrays["labels"][0, n - 1] == eos, "the end of text is learned"
    assert (arrays["input_ids"][0, n:] == eos).all() and (arrays["labels"][0, n:] == IGNORED).all()
    assert (arrays["input_ids"][2] == eos).all() and (arrays["labels"][2] == IGNORED).all()


def test_pad_id_falls_back():
    assert pad_id(make_tokenizer(pad=True)) == 2
    assert pad_id(make_tokenizer(eos=False)) == 0


def test_a_response_that_begins_inside_a_word_keeps_the_prompts_tokens(tokenizer):
    """Encoded together, ":" and the response could become one token that no prompt at generation ends in."""
    joined = "### Response:: Red"
    tokenizer = make_tokenizer()
    record = COLOR | {"output": ": Red"}
    row = dataset([record], tokenizer).row(0)
    prompt = prompt_ids(record, tokenizer, template="alpaca")
    assert row.input_ids[: len(prompt)].tolist() == prompt and row.labels[len(prompt)] != IGNORED
    assert tokenizer.decode(row.input_ids).endswith(joined + EOT)


# ---- chat


def test_chat_supervises_each_answer_through_its_end_of_turn(tokenizer):
    first = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a color.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(TALK, tokenizer, template="chat") == [
        (first, False),
        ("Red.<|im_end|>", True),
        ("\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n", False),
        (" Blue.\n<|im_end|>", True),
        ("\n", False),
    ]
    row = dataset([TALK], tokenizer, "chat").row(0)
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(TALK["messages"], tokenize=True)["input_ids"]
    supervised = row.input_ids[row.labels != IGNORED]
    assert tokenizer.decode(supervised) == "Red.<|im_end|> Blue.\n<|im_end|>"


@pytest.mark.parametrize("chat", [CHATML, LLAMA3])
def test_the_prompt_at_generation_is_the_prompt_in_training(chat):
    tokenizer = make_tokenizer(chat=chat)
    for record in (TALK, COLOR, ADD):
        prompt = prompt_ids(record, tokenizer, template="chat")
        row = dataset([record], tokenizer, "chat").row(0)
        assert row.input_ids[: len(prompt)].tolist() == prompt
        assert row.labels[len(prompt)] != IGNORED and (row.labels[len(prompt) - 1] == IGNORED)
    open_end = {"messages": TALK["messages"][:-1]}
    assert prompt_ids(open_end, tokenizer, template="chat") == prompt_ids(TALK, tokenizer, template="chat")
    without = {"instruction": COLOR["instruction"]}
    for template in ("chat", "alpaca"):
        assert prompt_ids(without, tokenizer, template=template) == prompt_ids(COLOR, tokenizer, template=template)


def test_instruction_columns_in_a_chat_template(tokenizer):
    asked = "<|im_start|>user\nAdd {x}.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    assert render(ADD, tokenizer, template="chat") == [(asked, False), ("3<|im_end|>", True), ("\n", False)]


def test_a_template_without_end_of_turn_gets_an_end_of_text():
    tokenizer = make_tokenizer(chat="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert render(COLOR, tokenizer, template="chat")[-1] == ("assistant: Red.\n" + EOT, True)
    tokenizer = make_tokenizer(eos=False, chat=tokenizer.chat_template)
    assert render(COLOR, tokenizer, template="chat")[-1] == ("assistant: Red.\n", True)


def test_the_date_in_a_template_stands_still():
    pieces = render(COLOR, make_tokenizer(chat=LLAMA3), template="chat")
    assert pieces[0][0].startswith("<s>Today: 26 Jul 2024\n") and CHAT_DATE == date(2024, 7, 26)
    odd = "\n{% set form = '%H' %}{{ strftime_now(form) }} {{ strftime_now(\"%Y-%m\") }}" + CHATML
    assert render(COLOR, make_tokenizer(chat=odd), template="chat")[0][0].startswith("\n00 2024-07<|im_start|>")


UNSTABLE = {
    # A generation prompt that is not how the turn starts, https://github.com/ml-explore/mlx-lm/issues/1355
    "header": CHATML.replace("assistant\n{% endif", "model\n{% endif"),
    "count": "{{ messages | length }}" + CHATML,
}


@pytest.mark.parametrize("name", UNSTABLE)
def test_a_template_that_is_not_prefix_stable(name):
    tokenizer = make_tokenizer(chat=UNSTABLE[name])
    with pytest.raises(ValueError, match=r"^f:1: a chat template must render .* at turn \d, what came before"):
        dataset([TALK], tokenizer, "chat")


@pytest.mark.parametrize("name", UNSTABLE)
def test_the_message_for_it_shows_the_difference(name):
    with pytest.raises(ValueError) as caught:
        render(TALK, make_tokenizer(chat=UNSTABLE[name]), template="chat")
    assert "at turn " in str(caught.value) and "expected '" in str(caught.value) and "Use another" in str(caught.value)


# ---- one BOS


@pytest.mark.parametrize(
    ("adds_bos", "chat", "template", "count"),
    [
        (True, LLAMA3, "chat", 1),  # in the template and added by the tokenizer
        (False, LLAMA3, "chat", 1),  # in the template only
        (True, CHATML, "chat", 1),  # added by the tokenizer only
        (True, CHATML, "alpaca", 1),
        (False, CHATML, "chat", 0),
        (False, CHATML, "alpaca", 0),
    ],
)
def test_count_of_bos(adds_bos, chat, template, count):
    tokenizer = make_tokenizer(adds_bos=adds_bos, chat=chat)
    bos = tokenizer.bos_token_id
    assert added_bos(tokenizer) == (bos if adds_bos else None)
    rows = dataset([ADD, COLOR], tokenizer, template)
    for index, record in enumerate((ADD, COLOR)):
        for ids in (rows.row(index).input_ids.tolist(), prompt_ids(record, tokenizer, template=template)):
            assert ids.count(bos) == count == ids[:1].count(bos)
    arrays = batch(rows, 0, batch_size=2, seed=0)
    assert (arrays["input_ids"] == bos).sum() == 2 * count and (arrays["labels"][:, 0] == IGNORED).all()


def test_a_doubled_bos_in_the_template_is_one():
    tokenizer = make_tokenizer(adds_bos=True, chat="{{ bos_token }}" + LLAMA3)
    row = dataset([COLOR], tokenizer, "chat").row(0)
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1


# ---- rows


def test_the_first_token_of_a_row_is_never_supervised():
    answers = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "Red."}]}
    row = dataset([talk], make_tokenizer(chat=answers), "chat").row(0)
    assert row.labels[0] == IGNORED and (row.labels[1:] == row.input_ids[1:]).all()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_supervised_tokens_of_an_epoch_are_counted_exactly(tokenizer, pack, seed):
    records = random_records(23, seed)
    expected = sum(len(encode(tokenizer, record["output"])) + 1 for record in records)
    rows = dataset(records, tokenizer, max_length=600, pack=pack)
    assert rows.stats.supervised_tokens == expected and rows.stats.truncated == rows.stats.dropped == 0
    steps = steps_per_epoch(rows, batch_size=4)
    batches = [batch(rows, step, batch_size=4, seed=seed) for step in range(steps)]
    assert sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches) == expected
    assert all(("segment_ids" in b) == pack for b in batches)
    assert sum(map(supervised_tokens, (rows.row(i) for i in range(len(rows))))) == expected


def test_length_is_the_longest_row_rounded_up(tokenizer):
    n = len(encode(tokenizer, NO_INPUT + "Red." + EOT))
    rounded = -(-n // 8) * 8
    assert dataset([COLOR], tokenizer).length == rounded
    assert dataset([COLOR], tokenizer, max_length=n).length == n
    assert dataset([COLOR], tokenizer, max_length=512, pack=True).length == 512
    stats = dataset([COLOR], tokenizer).stats
    assert (stats.longest, stats.tokens, stats.padding_efficiency) == (n, n, n / rounded)


def test_packing_keeps_every_record_whole_and_apart(tokenizer):
    records = random_records(30)
    plain = dataset(records, tokenizer, max_length=400)
    rows = dataset(records, tokenizer, max_length=400, pack=True)
    assert len(rows) < len(plain) and rows.stats.padding_efficiency > plain.stats.padding_efficiency
    assert rows.stats.tokens == plain.stats.tokens and rows.stats.rows == len(rows)
    found = []
    for i in range(len(rows)):
        row = rows.row(i)
        assert len(row.input_ids) <= 400 and (np.diff(row.segment_ids) >= 0).all() and row.segment_ids[0] == 1
        for segment in range(1, row.segment_ids[-1] + 1):
            inside = row.segment_ids == segment
            assert row.labels[inside][0] == IGNORED
            found.append((row.input_ids[inside].tolist(), row.labels[inside].tolist()))
    assert sorted(found) == sorted((plain.row(i).input_ids.tolist(), plain.row(i).labels.tolist()) for i in range(30))


@pytest.mark.parametrize("pack", [False, True])
def test_truncated_and_dropped_are_counted_and_named(tokenizer, pack):
    long_answer, long_question = COLOR | {"output": "Red. " * 200}, COLOR | {"instruction": "why? " * 400}
    rows = dataset([COLOR, long_answer, long_question], tokenizer, max_length=200, pack=pack)
    stats = rows.stats
    assert (stats.records, stats.truncated, stats.dropped) == (3, 1, 1)
    assert (stats.truncated_at, stats.dropped_at) == (("f:2",), ("f:3",))
    assert stats.longest == len(
        encode(tokenizer, render(long_question, tokenizer, template="alpaca")[0][0] + "Red." + EOT)
    )
    assert len(rows) == 2 and rows.length == 200 and len(rows.row(1).input_ids) in (200, stats.tokens - 200)
    if not pack:
        assert rows.row(1).labels[-1] not in (IGNORED, tokenizer.eos_token_id), "cut before its end"


def test_preview_and_summary(tokenizer):
    rows = dataset([COLOR, ADD], tokenizer)
    assert preview(rows, tokenizer, rows=1) == [[(NO_INPUT, False), ("Red." + EOT, True)]]
    assert len(preview(rows, tokenizer, rows=9)) == 2
    packed = dataset([ADD, COLOR], tokenizer, pack=True)
    texts = [(WITH_INPUT, False), ("3" + EOT, True), (NO_INPUT, False), ("Red." + EOT, True)]
    assert preview(packed, tokenizer, rows=1) == [texts]
    counts = summary(rows)
    supervised = len(encode(tokenizer, "Red.3")) + 2
    assert counts["records"] == counts["rows"] == 2 and counts["supervised_tokens"] == supervised
    assert counts["supervised_share"] == supervised / counts["tokens"]
    assert counts["padding_efficiency"] == counts["tokens"] / (2 * counts["length"])
    assert (counts["truncated"], counts["dropped_at"]) == (0, ())


# ---- refusals


def refused(message, records, tokenizer, **arguments):
    with pytest.raises(ValueError, match=message):
        dataset(records, tokenizer, **arguments)


def test_what_templates_refuse(tokenizer):
    refused(r"`template` must be one of alpaca, chat, chatml, .*; got 'odd'", [COLOR], tokenizer, template="odd")
    refused(r"f:1: the alpaca template needs .*got 'messages'. Use the template `chat`", [TALK], tokenizer)
    refused(r"f:1: training needs the column `output`; got 'instruction'", [{"instruction": "a"}], tokenizer)
    refused(r"f:1: training needs a turn of the assistant", [{"instruction": "a"}], tokenizer, template="chat")
    refused(r"f:2: the chat template needs `messages`, or .*got 'q'", [TALK, {"q": ""}], tokenizer, template="chat")
    refused(r"closes a response with .* Set `tokenizer.eos_token`", [COLOR], make_tokenizer(eos=False))
    no_template = make_tokenizer(chat=None)
    refused(r"`chat` needs a tokenizer with a chat template; .* `alpaca`", [TALK], no_template, template="chat")
    strict = make_tokenizer(chat="{{ raise_exception('no system turns') }}")
    message = r"f:1: the tokenizer's chat template refuses .* turns system, user.*TemplateError: no system turns"
    refused(message, [TALK], strict, template="chat")


def test_what_instruct_data_set_refuses(tokenizer):
    refused(r"`max_length` must be >= 2.*got 1", [COLOR], tokenizer, max_length=1)
    refused(r"at least one record; got none", [], tokenizer)
    n = len(encode(tokenizer, NO_INPUT))
    message = rf"of 2 records, from f:1 on, none has one within max_length=9 \(the first response starts at token {n}\)"
    refused(message, [COLOR, ADD], tokenizer, max_length=9)
    with pytest.raises(IndexError, match=r"`index` must be in 0\.\.0; got 1"):
        dataset([COLOR], tokenizer).row(1)


# ---- load_data


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(COLOR | {"output": f"answer {i}"}) + "\n" for i in range(20)))
    return path


def test_load_data_of_records(tmp_path, file, tokenizer):
    def loaded(seed=0, **changes):
        arguments = {"max_length": 256, "seed": seed, "directory": tmp_path / "unused"} | changes
        parts = load_data(file, tokenizer, **arguments)
        return [
            [text for row in preview(part, tokenizer, rows=99) for text, flag in row if flag] for part in parts if part
        ]

    train, held_out = loaded()
    everything = [f"answer {i}{EOT}" for i in range(20)]
    assert len(held_out) == 2 and sorted(train + held_out) == sorted(everything)
    assert train == [text for text in everything if text in train], "in the order of the file"
    assert loaded() == [train, held_out] != loaded(seed=1)
    assert len(loaded(eval_fraction=0.01)[1]) == 1
    assert loaded(eval_fraction=0) == [everything] and loaded(eval_data=file) == [everything] * 2
    assert loaded(eval_data=file, eval_fraction=0) == [everything] * 2
    assert not (tmp_path / "unused").exists()
    text = tmp_path / "eval.txt"
    text.write_text("some text " * 30)
    _, evaluation = load_data(file, tokenizer, eval_data=text, max_length=256, seed=0, directory=tmp_path / "d")
    assert evaluation.length == 256 and (tmp_path / "d" / "evaluation" / "meta.json").is_file()


def test_what_load_data_refuses(tmp_path, file, tokenizer):
    def refused(error, message, data=file, **changes):
        arguments = {"max_length": 256, "seed": 0, "directory": tmp_path / "d"} | changes
        with pytest.raises(error, match=message):
            load_data(data, tokenizer, **arguments)

    message = r"either a file or a share of the data; got eval_data='.*data\.jsonl' and eval_fraction=0\.1\. Leave one"
    refused(ValueError, message, eval_data=file, eval_fraction=0.1)
    refused(ValueError, r"`eval_fraction` must be in \[0, 1\); got 1", eval_fraction=1)
    refused(ValueError, r"`seed` must be >= 0; got -1", seed=-1)
    refused(FileNotFoundError, "no such data file: gone.txt", data="gone.txt")
    refused(FileNotFoundError, "no such data file: gone.jsonl", eval_data="gone.jsonl")
    with pytest.raises(ValueError, match=r"training needs at least one record; eval_fraction=0.1 holds out 1 of 1"):
        split_records([("f:1", COLOR)], eval_fraction=0.1, seed=0)


def test_alpaca_prompt_is_exported_as_a_format():
    assert ALPACA_WITH_INPUT.format(instruction="Add {x}.", input="1 2") == WITH_INPUT
