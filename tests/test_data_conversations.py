"""What a record says: rendered, obeyed, refused with its line, or named as left out."""

import json

import pytest
from tokenizer_kinds import CHATML, make

from jlora.data import InstructDataset, prompt_ids, read_records, render, summary
from jlora.data.conversations import conversation_of

TEXT = "user assistant system tool Paris Rome hi be brief because get_weather city\n" * 20
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
FULL = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}{% if m.name %} name={{ m.name }}{% endif %}{{ '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Paris"}


@pytest.fixture(scope="module")
def tokenizer():
    return make("gpt2", TEXT)


def read(tmp_path, record):
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    return read_records(tmp_path / "r.jsonl")


def rendered(tmp_path, tokenizer, record, chat=FULL):
    """(the text, its supervised parts)."""
    tokenizer.chat_template = chat
    pieces = render(read(tmp_path, record)[0][1], tokenizer, template="chat")
    return "".join(text for text, _ in pieces), [text for text, flag in pieces if flag]


def dataset(tmp_path, tokenizer, record, chat=FULL, template="chat"):
    tokenizer.chat_template = chat
    return InstructDataset(read(tmp_path, record), tokenizer, template=template, max_length=512)


# ---- rendered


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [USER, ANSWER], "tools": TOOLS}, '"name": "get_weather"'),
        ({"messages": [USER, ANSWER], "tools": json.dumps(TOOLS)}, '"name": "get_weather"'),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Paris"}],
                "system": "be brief",
            },
            "be brief",
        ),
        ({"instruction": "hi", "output": "Paris", "system": "be brief"}, "<|im_start|>system\nbe brief<|im_end|>"),
        ({"instruction": "hi", "output": "Paris", "system_prompt": "be brief"}, "be brief"),
        (
            {"instruction": "hi", "output": "Paris", "history": [["a b", "c d"]]},
            "user\na b<|im_end|>\n<|im_start|>assistant\nc d",
        ),
        ({"messages": [USER, ANSWER | {"reasoning_content": "because"}]}, "<think>because</think>Paris"),
        ({"messages": [USER, ANSWER | {"thinking": "because"}]}, "<think>because</think>Paris"),
        ({"messages": [USER, ANSWER | {"reasoning": "because"}]}, "<think>because</think>Paris"),
        ({"messages": [USER | {"name": "Ann"}, ANSWER]}, "user name=Ann\nhi"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            '"arguments": {"city": "Paris"}',
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "rain"},
                    ANSWER,
                ]
            },
            "tool\nrain",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris"}]},
                ]
            },
            "\nParis<",
        ),
        ({"messages": [{"role": "developer", "content": "be brief"}, USER, ANSWER]}, "developer\nbe brief"),
        ({"messages": [USER, ANSWER | {"content": "a\r\nb"}]}, "a\r\nb<|im_end|>"),
        ({"messages": [USER, ANSWER | {"content": ""}]}, "assistant\n<|im_end|>"),
        ({"messages": [USER, ANSWER | {"tool_calls": [], "weight": 1, "name": None}]}, "assistant\nParis<|im_end|>"),
    ],
)
def test_what_a_record_says_is_rendered_as_transformers_does(tmp_path, tokenizer, record, expected):
    text, supervised = rendered(tmp_path, tokenizer, record)
    assert expected in text and supervised and supervised[-1].endswith("<|im_end|>")
    messages, _, tools, _ = conversation_of(read(tmp_path, record)[0][1])
    assert text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def test_variables_of_the_template(tmp_path, tokenizer):
    chat = "{% if shout %}LOUD {% endif %}" + FULL
    record = {"messages": [USER, ANSWER], "chat_template_kwargs": {"shout": True}}
    text, _ = rendered(tmp_path, tokenizer, record, chat)
    assert text == tokenizer.apply_chat_template([USER, ANSWER], tokenize=False, shout=True) and text.startswith(
        "LOUD "
    )


# ---- obeyed


@pytest.mark.parametrize(
    "flag", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"loss": False}, {"training": 0}, {"trainable": False}]
)
def test_a_turn_that_is_not_to_be_trained_is_context(tmp_path, tokenizer, flag):
    record = {"messages": [USER, ANSWER | {"content": "Rome"} | flag, USER, ANSWER]}
    text, supervised = rendered(tmp_path, tokenizer, record)
    assert supervised == ["Paris<|im_end|>"] and "Rome" in text and str(flag) not in text
    assert dataset(tmp_path, tokenizer, record).stats.left_out == ()
    on = {"messages": [USER, ANSWER | {next(iter(flag)): 1}, USER | flag, ANSWER]}
    assert rendered(tmp_path, tokenizer, on)[1] == ["Paris<|im_end|>"] * 2


# ---- refused


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [USER | {"train": True}, ANSWER]},
            r"only turns of the assistant are trained; got 'train': True in turn 0",
        ),
        (
            {"messages": [USER, ANSWER | {"train": "false"}]},
            r"'train' of turn 1 must be true, false, 1 or 0; got 'false'",
        ),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, r"'weight' of turn 1 must be .* got 0.5"),
        ({"messages": [USER, ANSWER | {"weight": 0, "train": True}]}, r"turn 1 is trained or not; got"),
        ({"messages": [USER, ANSWER | {"train": False}]}, r"all of them are not to be trained"),
        (
            {"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]},
            r"turn 1 .* got 'function_call'.*Write it as `tool_calls`",
        ),
        ({"messages": [USER, ANSWER | {"mask": True}]}, r"turn 1 .* got 'mask'.*Say it with `train`"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"turn 1 must be an object with strings 'role' and 'content'",
        ),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, r"turn 1 must be an object with strings"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
            r"content of turn 0 must be text",
        ),
        (
            {"messages": [USER | {"tool_calls": [CALL]}, ANSWER]},
            r"`tool_calls` are the assistant's; got them in turn 0",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"id": 1}]}]},
            r"`tool_calls` of turn 1 must be a list of objects",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            r"'arguments' must be an object",
        ),
        ({"messages": [USER, ANSWER], "tools": "none"}, r"`tools` must be a list of objects"),
        (
            {"messages": [USER, ANSWER], "functions": [{"name": "f"}]},
            r"column 'functions' has no place .* Write them as `tools`",
        ),
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, r"column 'images' has no place"),
        ({"messages": [USER, ANSWER], "weight": 0.1}, r"every record counts alike; got 'weight': 0.1"),
        (
            {"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"},
            r"one system prompt; got 'system' and a turn",
        ),
        (
            {"instruction": "a", "output": "b", "history": ["x"]},
            r"`history` must be a list of \[question, answer\] pairs",
        ),
        ({"instruction": "a", "output": "b", "system": 3}, r"column 'system' must be a string; got int"),
        ({"instruction": "a", "output": "b", "thinking": "because"}, r"column 'thinking' has no place"),
        ({"instruction": "half \ud83d", "output": "b"}, r"text must be Unicode; got U\+D83D, .* at character 5"),
        ({"messages": [USER, ANSWER | {"content": "\ude00"}]}, r"text must be Unicode"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ude00"}]}, r"text must be Unicode"),
    ],
)
def test_what_has_no_place_is_refused_with_its_line(tmp_path, record, message):
    with pytest.raises(ValueError, match=r"r\.jsonl:1: .*" + message):
        read(tmp_path, record)


@pytest.mark.parametrize(
    ("chat", "record", "message"),
    [
        (
            NO_SYSTEM,
            {"messages": [{"role": "system", "content": "be brief"}, USER, ANSWER]},
            r"content of turn 0 \(system: 'be brief'\)",
        ),
        (NO_SYSTEM, {"instruction": "hi", "output": "Paris", "system": "be brief"}, r"content of turn 0 \(system"),
        (
            NO_SYSTEM,
            {"messages": [USER, ANSWER | {"content": "<think>why</think>Paris"}]},
            r"content of turn 1 \(assistant",
        ),
        (
            NO_SYSTEM,
            {"messages": [USER, ANSWER, {"role": "tool", "content": "rain"}, ANSWER]},
            r"content of turn 2 \(tool: 'rain'\)",
        ),
        (
            CHATML,
            {"messages": [USER, ANSWER | {"reasoning_content": "because"}]},
            r"leaves out the reasoning of turn 1 \('because'\)",
        ),
        (
            CHATML,
            {"messages": [USER, ANSWER | {"tool_calls": [CALL]}]},
            r"leaves out a tool call of turn 1 \('get_weather'\)",
        ),
        (CHATML, {"messages": [USER, ANSWER], "tools": TOOLS}, r"must render `tools`; .* leaves out 'get_weather'"),
        (
            CHATML.replace("m.content", "m.content | upper"),
            {"messages": [USER, ANSWER]},
            r"content of turn 0 \(user: 'hi'\)",
        ),
        (
            CHATML.replace("m.content", "m.content[:3]"),
            {"messages": [USER, ANSWER]},
            r"content of turn 1 \(assistant: 'Paris'\)",
        ),
        (
            GEMMA,
            {"messages": [{"role": "system", "content": "x"}, USER, ANSWER]},
            r"TemplateError: System role not supported",
        ),
        ("", {"messages": [USER, ANSWER]}, "chat template"),
        ("{# nothing #}", {"messages": [USER, ANSWER]}, r"must render a conversation to some text"),
        ("{{ bos_token", {"messages": [USER, ANSWER]}, r"TemplateSyntaxError"),
    ],
)
def test_what_a_template_leaves_out_is_refused_with_its_line(tmp_path, tokenizer, chat, record, message):
    with pytest.raises(ValueError, match=r"r\.jsonl:1: .*" + message):
        dataset(tmp_path, tokenizer, record, chat)


@pytest.mark.parametrize(
    "extra", [{"system": "be brief"}, {"history": [["a", "b"]]}, {"tools": TOOLS}, {"chat_template_kwargs": {"a": 1}}]
)
def test_the_alpaca_template_has_no_place_for_it(tmp_path, tokenizer, extra):
    record = {"instruction": "hi", "output": "Paris"} | extra
    with pytest.raises(
        ValueError, match=rf"r\.jsonl:1: the alpaca template has places for .* got '{next(iter(extra))}' too"
    ):
        dataset(tmp_path, tokenizer, record, template="alpaca")
    with pytest.raises(ValueError, match="the alpaca template has places for"):
        prompt_ids(read(tmp_path, record)[0][1], tokenizer, template="alpaca")


# ---- named


def test_what_is_left_out_is_named_and_counted(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    lines = [
        {"messages": [USER | {"name": "Ann"}, ANSWER], "id": 7, "source": "web", "text": ""},
        {"messages": [USER | {"name": "Bob"}, ANSWER | {"content": " Paris\n"}], "id": 8, "text": None},
        {"instruction": "hi", "output": "Paris", "input": "", "id": 9},
    ]
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = InstructDataset(read_records(file), tokenizer, template="chat", max_length=512)
    assert dict(data.stats.left_out) == {"id": 3, "source": 1, "messages.name": 2}
    assert summary(data)["left_out"][:2] == ("id (3 records)", "messages.name (2 records)")
    assert data.stats.odd() == ["not in the text: id (3 records), messages.name (2 records), source (1 record)"]
    trimmed = CHATML.replace("m.content", "m.content | trim")
    tokenizer.chat_template = trimmed
    data = InstructDataset(read_records(file), tokenizer, template="chat", max_length=512)
    assert dict(data.stats.left_out)["white space around or within content"] == 1


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "rain"},
                    ANSWER,
                ]
            },
            "messages.tool_calls.id",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "rain", "tool_call_id": "c"},
                    ANSWER,
                ]
            },
            "messages.tool_call_id",
        ),
        ({"messages": [USER | {"timestamp": 12}, ANSWER]}, "messages.timestamp"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}},
            "chat_template_kwargs.enable_thinking",
        ),
        ({"messages": [USER, ANSWER], "prompt": "hi"}, "prompt"),
        ({"messages": [USER, ANSWER], "label": False}, "label"),
    ],
)
def test_labels_that_a_template_does_not_show_are_named(tmp_path, tokenizer, record, name):
    assert (name, 1) in dataset(tmp_path, tokenizer, record).stats.left_out


# ---- the end of a turn


@pytest.mark.parametrize("text", ["cells", "the mitochondria", "write <|im_end|>", "</s>", "s", "", "a <|im_start|>"])
def test_content_that_ends_in_a_token_of_its_own_does_not_close_the_turn(text):
    tokenizer = make("gpt2", TEXT, chat="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokenizer.add_tokens(["mitochondria"])
    record = {"messages": [USER, ANSWER | {"content": text}]}
    assert render(record, tokenizer, template="chat")[-1] == (f"assistant: {text}\n</s>", True)
    tokenizer.chat_template = CHATML
    assert render(record, tokenizer, template="chat")[1:] == [(f"{text}<|im_end|>", True), ("\n", False)]


def test_a_column_of_a_hub_data_set_that_is_null_says_nothing(tmp_path):
    record = {
        "messages": [USER | {"name": None, "tool_calls": None, "weight": None}, ANSWER],
        "tools": None,
        "images": [],
        "system": "",
    }
    ((_, found),) = read(tmp_path, record)
    assert found == {"messages": [USER, ANSWER]} and found.left_out == ()
