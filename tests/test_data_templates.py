"""Chat templates by name and of tokenizers: which characters are learned, by a table written by hand, and by TRL's own masks."""

import functools
import re

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from jlora.data import (
    CHAT_TEMPLATES,
    IGNORED,
    NAMED,
    TEMPLATES,
    InstructDataset,
    TemplateName,
    prompt_ids,
    put_template,
    render,
)
from jlora.data.named_templates import template_text
from jlora.data.templates import ALPACA_WITHOUT_INPUT, renderings
from jlora.storage.stops import turn_end_ids

MARKS = sorted({mark for row in NAMED.values() for mark in row.marks} | {"<think>", "</think>"})
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def tokenizer_with(*marks, chat=None):
    made = tiny.tokenizer(chat)
    special = [AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>", *marks)]
    made.add_tokens(special, special_tokens=True)
    made.bos_token, made.eos_token = "<s>", "</s>"
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_all()


# What is learned stands between [[ and ]]; Qwen3's, of which the template drops earlier thoughts, in a row for each answer.
TABLE = {
    "chatml": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n[[That.<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[So.<|im_end|>]]\n"
    ],
    "llama3": [
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[That.<|eot_id|>]]<|start_header_id|>user"
        "<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[So.<|eot_id|>]]"
    ],
    "qwen3": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nThat.<|im_end|>]]\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nSo.<|im_end|>]]\n",
    ],
    "mistral": ["<s>[INST] Be brief.\n\nWhat?[/INST][[ That.</s>]][INST] Why?[/INST][[ So.</s>]]"],
    "gemma": [
        "<s><start_of_turn>user\nBe brief.\n\nWhat?<end_of_turn>\n<start_of_turn>model\n[[That.<end_of_turn>]]\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n[[So.<end_of_turn>]]\n"
    ],
    "vicuna": ["Be brief. USER: What? ASSISTANT:[[ That.</s>]]USER: Why? ASSISTANT:[[ So.</s>]]"],
    "plain": ["Be brief.What?[[That.</s>]]Why?[[So.</s>]]"],
}
TABLE["qwen2.5"] = TABLE["chatml"]


def marked(row, tokenizer):
    """A row as its text, with what is learned between [[ and ]]."""
    text, inside = "", False
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if (label != IGNORED) != inside:
            text, inside = text + ("]]" if inside else "[["), not inside
        text += tokenizer.decode([token])
    return text + "]]" * inside


def rows_of(messages, tokenizer, template, **changes):
    data = InstructDataset([("r:1", {"messages": messages})], tokenizer, template=template, max_length=4096, **changes)
    return [marked(data.row(index), tokenizer) for index in range(len(data))]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_is_learned_of_a_conversation(tokenizer, name):
    assert rows_of(CHAT, tokenizer, name) == TABLE[name]


def test_every_template_has_its_row():
    assert set(TABLE) == set(CHAT_TEMPLATES) == set(NAMED) - {"alpaca"}
    assert list(TEMPLATES) == list(TemplateName.__args__)


# The pieces of a turn, by role: (what stands in front, what of the turn is learned with its content, what follows).
PIECES = {
    "chatml": lambda role: (f"<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": lambda role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "vicuna": lambda role: {
        "system": ("", " ", ""),
        "user": ("USER: ", " ", ""),
        "assistant": ("ASSISTANT:", "</s>", ""),
    }[role],
    "plain": lambda role: ("", "</s>" if role == "assistant" else "", ""),
}
STARTS = {"llama3": "<s>"}
TEXTS = st.text(st.sampled_from("ab é灯.\n"), min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("name", PIECES)
@settings(max_examples=15, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=4), system=st.none() | TEXTS)
def test_what_is_learned_of_any_conversation(name, turns, system):
    """Turns that are not trained among them."""
    if not any(trained for *_, trained in turns):
        turns = [*turns[:-1], (*turns[-1][:2], True)]
    made = tokenizer_of_all()
    messages = [] if system is None else [{"role": "system", "content": system}]
    expected, learned = STARTS.get(name, ""), []
    if name == "vicuna" and system is None:
        expected += template_text("vicuna").split('"')[1]
    for asked, answered, trained in turns:
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered} | ({} if trained else {"train": False}),
        ]
    for message in messages:
        before, end, after = PIECES[name](message["role"])
        expected += before
        content = (" " if name == "vicuna" and message["role"] == "assistant" else "") + message["content"] + end
        if message["role"] == "assistant" and message.get("train", True):
            learned.append((len(expected), len(expected) + len(content)))
        expected += content + after
    found = render({"messages": messages}, made, template=name)
    assert "".join(text for text, _ in found) == expected
    characters = np.concatenate([np.full(len(text), flag) for text, flag in found])
    wanted = np.zeros(len(expected), bool)
    for start, stop in learned:
        wanted[start:stop] = True
    assert np.array_equal(characters, wanted)


@functools.cache
def tokenizer_of_all():
    """`tokenizer`, which hypothesis does not take as a fixture of a wider scope with parameters."""
    return tokenizer_with(*MARKS)


# ---- beside TRL


@pytest.fixture(scope="module")
def trl_templates():
    import trl.chat_template_utils  # ten seconds of imports, for these tests alone

    return trl.chat_template_utils


def trl_marked(messages, tokenizer, training):
    found = tokenizer.apply_chat_template(
        messages, chat_template=training, return_assistant_tokens_mask=True, return_dict=True
    )
    labels = np.where(found["assistant_masks"], found["input_ids"], IGNORED)
    return marked(type("Row", (), {"input_ids": np.array(found["input_ids"]), "labels": labels}), tokenizer)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("qwen2.5", "qwen2_5"), ("qwen3", "qwen3"), ("gemma", "gemma3"), ("llama3", "llama3")],
)
def test_templates_are_those_of_the_checkpoints(ours, theirs, trl_templates):
    """As TRL keeps them, of the same name; Llama 3's is written shorter and says the same."""
    original = getattr(trl_templates, f"{theirs}_chat_template")
    if ours != "llama3":
        assert template_text(ours).rstrip("\n") == original.rstrip("\n")
    made = tokenizer_with(*MARKS, chat=original)
    assert rows_of(CHAT, made, "chat") == rows_of(CHAT, made, ours) == TABLE[ours]


BREAKS = {
    "llama3": (),
    "qwen2_5": (("<|im_end|>]]\n", "<|im_end|>\n]]"), ("assistant\n[[", "assistant[[\n")),
    "gemma3": (("<end_of_turn>]]\n", "<end_of_turn>\n]]"),),
}


@pytest.mark.parametrize("name", BREAKS)
def test_beside_the_masks_of_trl(name, trl_templates):
    """Equal on Llama 3's. On Qwen2.5's and Gemma 3's TRL also trains the line break behind the end of a turn, which the template
    writes and the model, that has stopped, is never to say; on Qwen2.5's the one behind "assistant" too, which the generation
    prompt has.
    """
    made = tokenizer_with(*MARKS, chat=getattr(trl_templates, f"{name}_chat_template"))
    (expected,) = rows_of(CHAT, made, "chat")
    for ours, theirs in BREAKS[name]:
        assert expected.count(ours) == 2
        expected = expected.replace(ours, theirs)
    assert trl_marked(CHAT, made, trl_templates.get_training_chat_template(made)) == expected


def test_trl_trains_qwen3_behind_thoughts_that_it_is_never_given(trl_templates):
    """TRL's template for training writes a think block into every turn. What Qwen3 is given when it answers again has none of
    earlier turns: so of TRL's one row, the second answer stands behind another text than at inference. Our rows are each the
    prompt of inference and the answer.
    """
    made = tokenizer_with(*MARKS, chat=trl_templates.qwen3_chat_template)
    theirs = trl_marked(CHAT, made, trl_templates.get_training_chat_template(made))
    given = made.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    first, second = rows_of(CHAT, made, "chat")
    assert second == given + "[[<think>\n\n</think>\n\nSo.<|im_end|>]]\n"
    assert not theirs.replace("[[", "").replace("]]", "").startswith(given)
    assert theirs.startswith(first.replace("]]\n", "\n]]")), "the first answer is the same, but for the line break"


THOUGHT = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That.", "reasoning_content": "Hm."},
    {"role": "user", "content": "Sum 1 and 2."},
    {"role": "assistant", "reasoning_content": "A tool.", "tool_calls": [{"name": "sum", "arguments": {"a": 1}}]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "Three.", "reasoning_content": "It says 3."},
]


def test_thoughts_and_calls_of_qwen3_are_each_learned_once(tokenizer):
    rows = rows_of(THOUGHT, tokenizer, "qwen3")
    learned = [row.partition("[[")[2].partition("]]")[0] for row in rows]
    call = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
    assert learned == [
        "<think>\nHm.\n</think>\n\nThat.<|im_end|>",
        f"<think>\nA tool.\n</think>\n\n{call}<|im_end|>",
        "<think>\nIt says 3.\n</think>\n\nThree.<|im_end|>",
    ]
    # Thoughts before the last turn of the user are forgotten, those since then are not.
    assert ["Hm." in row for row in rows] == [True, False, False]
    assert ["A tool." in row for row in rows] == [False, True, True]
    written = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}] * 2
    data = InstructDataset([("r:1", {"messages": written})], tokenizer, template="qwen3", max_length=512)
    assert data.stats.left_out == () and "b" not in tokenizer.decode(data.row(1).input_ids[:-12])
    with pytest.raises(ValueError, match="changes, at turn 1, what came before"):
        render({"messages": THOUGHT}, tokenizer, template="qwen3")


def test_what_a_row_of_its_own_leaves_out_is_still_refused(tokenizer):
    """The template drops thoughts; that it drops a turn is another matter."""
    deaf = template_text("qwen3").replace(
        "{{- content }}\n        {{- '\\n</tool_response>' }}", "{{- '\\n</tool_response>' }}"
    )
    assert deaf != template_text("qwen3")
    made = tokenizer_with(*MARKS, chat=deaf)
    with pytest.raises(ValueError, match=r"leaves out the content of turn 4 \(tool: '5'\)"):
        rows_of(THOUGHT, made, "chat")


# ---- what is supervised

AGENT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
    {"role": "tool", "content": "e"},
    {"role": "assistant", "content": "f"},
]


@pytest.mark.parametrize(
    ("supervise", "learned"),
    [("assistant", "bdf"), ("response", "df"), ("last", "f"), ("all", "abcdef")],
)
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_what_the_loss_is_on(tokenizer, supervise, learned, template):
    rows = rows_of(AGENT, tokenizer, template, supervise=supervise)
    assert len(rows) == (len(learned) if template == "qwen3" and supervise != "all" else 1)
    inside = "".join(part.partition("]]")[0] for row in rows for part in row.split("[[")[1:])
    said = [
        letter for letter in "abcdef" if f"\n{letter}" in inside or inside.startswith(letter) or f">{letter}<" in inside
    ]
    assert "".join(said) == learned


def test_what_the_loss_is_on_of_instructions(tokenizer):
    record = {"instruction": "Why?", "output": "So."}
    for supervise in ("assistant", "response", "last"):
        assert [flag for _, flag in render(record, tokenizer, template="alpaca", supervise=supervise)] == [False, True]
    assert [flag for _, flag in render(record, tokenizer, template="alpaca", supervise="all")] == [True, True]


def test_a_turn_that_is_not_to_be_trained_never_is(tokenizer):
    messages = [AGENT[0], AGENT[1] | {"train": False}, *AGENT[2:]]
    (row,) = rows_of(messages, tokenizer, "chatml", supervise="all")
    assert row.count("[[") == 2 and "]]b<|im_end|>[[" in row
    with pytest.raises(
        ValueError, match="r:1: with `supervise` 'last' there is no turn of the assistant to learn from"
    ):
        rows_of([*AGENT[:-1], AGENT[-1] | {"train": False}], tokenizer, "chatml", supervise="last")


# ---- the tokenizer


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_is_put_into_the_tokenizer(name, tmp_path):
    """What is saved renders the prompts of training, and says where an answer ends."""
    made = tokenizer_with(*MARKS)
    assert put_template(made, name) is None and put_template(made, name) is None
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    if name == "alpaca":
        record = {"instruction": "What?", "output": "That."}
        asked = [{"role": "user", "content": "What?"}]
    else:
        record, asked = {"messages": CHAT}, CHAT[:-1]
    ids = again.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert ids == prompt_ids(record, made, template=name)
    # Answers that are closed by the end of text stop there anyway.
    ends = [made.convert_ids_to_tokens(i) for i in turn_end_ids(again)]
    closing = renderings(record, made, template=name)[-1].pieces[1][0]
    assert any(closing.endswith(end) for end in ends)


def test_alpaca_for_several_turns():
    made = tokenizer_with()
    put_template(made, "alpaca")
    first = PREAMBLE + "### Instruction:\nWhat?\n\n### Response:"
    assert first == ALPACA_WITHOUT_INPUT.format(instruction="What?")
    expected = f"{first}[[That.</s>]]\n\n### Instruction:\nWhy?\n\n### Response:[[So.</s>]]"
    assert rows_of(CHAT[1:], made, "chat") == [expected]
    assert rows_of(CHAT, made, "chat") == [expected.replace(PREAMBLE, "Be brief.\n\n")]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma"])
def test_a_tokenizer_without_the_marks_of_a_template_is_refused(name):
    """Spelled in pieces they would be ordinary text, at which no generation ends."""
    message = rf"no {re.escape(', '.join(NAMED[name].marks))}, and would spell them in pieces.*such as vicuna, plain"
    with pytest.raises(ValueError, match=message):
        put_template(tokenizer_with(), name)
    with pytest.raises(ValueError, match=message):
        rows_of(CHAT, tokenizer_with(), name)


@pytest.mark.parametrize("name", [name for name, row in NAMED.items() if row.closes])
def test_a_tokenizer_without_an_end_of_text_is_refused(name):
    made = tokenizer_with(*MARKS)
    made.eos_token = None
    with pytest.raises(ValueError, match=f"{name!r} closes an answer with the tokenizer's end-of-text token"):
        put_template(made, name)


def test_another_template_of_the_tokenizers_own_is_said():
    made = tokenizer_with(*MARKS, chat=tiny.CHATML)
    assert "has a chat template of its own; it is trained and saved with the template 'llama3'" in put_template(
        made, "llama3"
    )
    assert made.chat_template == template_text("llama3")


def test_a_template_with_no_place_for_a_system_prompt_refuses_it(trl_templates, tokenizer):
    gemma = tokenizer_with(*MARKS, chat=trl_templates.gemma_chat_template)
    with pytest.raises(ValueError, match="r:1: .*System role not supported"):
        rows_of(CHAT, gemma, "chat")
