"""Rows of every kind of tokenizer: the ids of the whole text, the prompt that generation feeds, text in its context."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import CHATML, KINDS, MARKS, make
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jlora.data import IGNORED, InstructDataset, decode_continuation, preview, prompt_ids, require_text, summary
from jlora.data.encoding import _cuts, _plan, encode_pieces
from jlora.data.templates import ALPACA_WITHOUT_INPUT
from jlora.data.tokens import encode
from jlora.storage.pre_tokenizers import WORDS_APART

TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName the capital of France, please.\n\n### Response:Paris is it (so they say): hé, 12!\n"
    "user\nassistant\nsystem\nRome, then?  Two  spaces and the hat of the cat.\r\n"
) * 4
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% else %}<<SYS>>{{ m.content }}<</SYS>>{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "plain": PLAIN}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make(kind, TEXT) for kind in KINDS}


def rows(records, tokenizer, template, **arguments):
    named = [(f"f:{i}", record) for i, record in enumerate(records, 1)]
    return InstructDataset(named, tokenizer, template=template, max_length=4096, **arguments)


def talk(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def random_talks(count, seed=0):
    draw = random.Random(seed)
    words = "Paris Rome hé, (so) 12! the  cat\n\nhat : ) response\r\n".split(" ")
    return [
        talk(*(" ".join(draw.choices(words, k=draw.randrange(1, 9))) for _ in range(2 * draw.randrange(1, 4))))
        for _ in range(count)
    ]


def supervised(row, tokenizer):
    return tokenizer.decode(row.input_ids[row.labels != IGNORED].tolist(), skip_special_tokens=False)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_the_whole_conversation(tokenizers, kind, name):
    """transformers renders and encodes it at once."""
    tokenizer, records = tokenizers[kind], random_talks(40)
    tokenizer.chat_template = TEMPLATES[name]
    data = rows(records, tokenizer, "chat")
    straddled = set(data.stats.straddled_at)
    compared = 0
    for i, record in enumerate(records):
        row, prompt = data.row(i), prompt_ids(record, tokenizer, template="chat")
        assert row.input_ids[: len(prompt)].tolist() == prompt, "what generation feeds"
        assert row.labels[len(prompt)] != IGNORED and row.labels[len(prompt) - 1] == IGNORED
        if f"f:{i + 1}" not in straddled:
            text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
            if name == "plain":
                text += tokenizer.eos_token
            assert row.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            compared += 1
    assert compared > 0
    if name == "chatml":
        assert compared == len(records), "white space ends the prompts"


@pytest.mark.parametrize("kind", KINDS)
def test_alpaca_prompts_are_the_same_at_generation(tokenizers, kind):
    outputs = ["Paris", " Paris", "\nParis", ": Paris", "", "(so)", ") 12", "response"]
    records = [{"instruction": "Name it.", "input": "", "output": output} for output in outputs]
    tokenizer = tokenizers[kind]
    data = rows(records, tokenizer, "alpaca")
    for i, record in enumerate(records):
        row, prompt = data.row(i), prompt_ids(record, tokenizer, template="alpaca")
        assert prompt == encode(tokenizer, ALPACA_WITHOUT_INPUT.format(instruction="Name it."))
        assert row.input_ids[: len(prompt)].tolist() == prompt and row.labels[-1] == tokenizer.eos_token_id
        whole = ALPACA_WITHOUT_INPUT.format(instruction="Name it.") + record["output"] + tokenizer.eos_token
        show = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        assert tokenizer.decode(row.input_ids, **show) == tokenizer.decode(encode(tokenizer, whole), **show)
        if f"f:{i + 1}" not in data.stats.straddled_at:
            assert row.input_ids.tolist() == encode(tokenizer, whole)


def straddling(kind):
    """A tokenizer to which ":)" is one token."""
    vocabulary = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"Response:)▁Ġ o", "▁R", ":)", "ĠR"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    backend = Tokenizer(
        models.BPE(vocabulary, [("▁", "R"), (":", ")"), ("Ġ", "R")], unk_token="<unk>", byte_fallback=True)
    )
    if kind == "gpt2":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        scheme = {"metaspace": "first", "always": "always"}[kind]
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=scheme)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% endif %}{% endfor %}"
    return made


@pytest.mark.parametrize("kind", ["gpt2", "metaspace", "always"])
def test_a_token_across_the_border_is_parted_without_a_space(kind):
    tokenizer = straddling(kind)
    record = talk("Response", ") Ro", "Re", ")")
    data = rows([record, talk("R", "o")], tokenizer, "chat")
    row, prompt = data.row(0), prompt_ids(record, tokenizer, template="chat")
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids.tolist())
    assert ":)" not in tokens and tokens.count(":") == tokens.count(")") == 2 and "▁)" not in tokens
    assert tokenizer.decode(row.input_ids) == "Response:) RoRe:)</s>"
    assert row.input_ids[: len(prompt)].tolist() == prompt and tokens[len(prompt)] == ")"
    first = prompt_ids(talk("Response"), tokenizer, template="chat")
    assert row.input_ids[: len(first)].tolist() == first and row.labels[len(first)] != IGNORED
    assert (data.stats.straddled, data.stats.straddled_at) == (1, ("f:1",))
    assert summary(data)["straddled"] == 1 and summary(data)["straddled_at"] == ("f:1",)
    assert "".join(text for text, _ in preview(data, tokenizer, rows=1)[0]) == "Response:) RoRe:)</s>"


def test_a_slow_tokenizer_is_checked_the_same_way():
    class Slow:
        """Greedy over a vocabulary, with a space of its own before every text; no backend, no offsets."""

        vocabulary = ["_", "a", "b", ":", ")", ":)", "</s>", "_a"]
        eos_token, eos_token_id, bos_token_id, pad_token_id = "</s>", 6, None, None

        def __call__(self, texts, **_):
            single = isinstance(texts, str)
            ids = [self._one(text) for text in ([texts] if single else texts)]
            return {"input_ids": ids[0] if single else ids}

        def _one(self, text):
            text, ids = "_" + text if text else text, []
            while text:
                token = max((t for t in self.vocabulary if text.startswith(t)), key=len)
                ids.append(self.vocabulary.index(token))
                text = text[len(token) :]
            return ids

        def decode(self, ids, **_):
            return "".join(self.vocabulary[i] for i in ids).removeprefix("_")

    (row,) = encode_pieces(Slow(), [[("a:", False), (")b</s>", True)]], bos=None)
    assert [Slow.vocabulary[i] for i in row.ids] == ["_a", ":", ")", "b", "</s>"]
    assert row.spans == [(2, 5)] and row.straddled == 1
    (row,) = encode_pieces(Slow(), [[("a:", False), ("b</s>", True)]], bos=None)
    assert row == ([7, 3, 2, 6], [(2, 4)], 0)


def test_a_border_that_cannot_be_parted_is_refused_with_its_place():
    vocabulary = {"<unk>": 0, "</s>": 1, "ab": 2, "a": 3}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        ValueError, match=r"f:2: a response must begin with a token of its own; 'b</s>' shares one .*'a'"
    ):
        rows([talk("a ", "a"), talk("a", "b")], tokenizer, "chat")


@pytest.mark.few(12)
@pytest.mark.parametrize(
    "change",
    [
        AddedToken("mitochondria"),
        AddedToken("<|im_start|>user", special=True, normalized=False),
        AddedToken("<|pad|>", special=True, normalized=False, lstrip=True),
        AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
        AddedToken("cat", normalized=False, single_word=True),
        AddedToken("Paris<|im_end|>", normalized=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "metaspace", "wordpiece"])
def test_added_tokens_of_every_kind_in_the_text(kind, change):
    """Where a text may be cut before it is encoded depends on them."""
    tokenizer = make(kind, TEXT)
    tokenizer.add_tokens([change], special_tokens=change.special)
    texts = [
        "the mitochondria",
        f"a {change.content} b",
        f"{change.content}",
        f"x  {change.content}  <|im_end|> y",
        "Paris",
    ]
    for record in (talk(a, b, b, a) for a in texts for b in texts):
        data = rows([record], tokenizer, "chat")
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        if not data.stats.straddled:
            assert data.row(0).input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = prompt_ids(record, tokenizer, template="chat")
        assert data.row(0).input_ids[: len(prompt)].tolist() == prompt


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([" ", "a", "\n", ":", ")", "é", *MARKS, "</s>", "Paris"]), min_size=1, max_size=6),
        min_size=2,
        max_size=6,
    )
)
def test_any_pieces(tokenizers, parts):
    texts = ["".join(part) for part in parts]
    for kind in ("gpt2", "llama2", "metaspace", "unigram"):
        tokenizer = tokenizers[kind]
        try:
            (row,) = encode_pieces(tokenizer, [[(text, i % 2 == 1) for i, text in enumerate(texts)]], bos=None)
        except ValueError as error:
            assert "token of its own" in str(error)
            continue
        whole = encode(tokenizer, "".join(texts))
        assert row.straddled or row.ids == whole
        show = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        # This one's normalizer makes one space of several, and none of an answer that is white space alone.
        same = (lambda text: " ".join(text.split())) if kind == "unigram" else str
        assert same(tokenizer.decode(row.ids, **show)) in (same(tokenizer.decode(whole, **show)), same("".join(texts)))
        if len(row.spans) == len(texts) // 2:
            assert row.ids[: row.spans[0][0]] == encode(tokenizer, texts[0])
        assert all(0 <= start < stop <= len(row.ids) for start, stop in row.spans)


def pre_tokenizer(steps):
    """The field of tokenizer.json."""
    kinds = {
        "ByteLevel": lambda prefix, regex: {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex},
        "Digits": lambda individual: {"individual_digits": individual},
        "Split": lambda regex, behavior, invert: {
            "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert},
    }  # fmt: skip
    return {"type": "Sequence", "pretokenizers": [{"type": kind, **kinds[kind](*rest)} for kind, *rest in steps]}


@pytest.mark.few(4)
@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}], ids=["plain", "NFC"])
@pytest.mark.parametrize("steps", sorted(WORDS_APART), ids=lambda steps: steps[0][0] + str(len(steps[0][1:])))
def test_a_text_cut_between_words_has_the_ids_of_the_whole(steps, normalizer):
    fields = json.loads(make("gpt2", TEXT).backend_tokenizer.to_str())
    fields |= {"pre_tokenizer": pre_tokenizer(steps), "normalizer": normalizer}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(fields)), eos_token="</s>")
    draw = random.Random(0)
    words = [
        "the",
        "hat",
        "it's",
        " ",
        "  ",
        " cat",
        "\n",
        ":",
        ")",
        "e\u0301",
        "12",
        " 345",
        "a b c",
        "<|im_end|>",
        "N",
    ]
    cut = 0
    for _ in range(300):
        pieces = [("".join(draw.choices(words, k=draw.randrange(1, 12))), flag) for flag in (False, True, False, True)]
        (row,) = encode_pieces(tokenizer, [pieces], bos=None)
        whole = encode(tokenizer, "".join(text for text, _ in pieces))
        assert row.straddled or row.ids == whole
        assert row.ids[: row.spans[0][0]] == encode(tokenizer, pieces[0][0])
        cut += len(_plan(pieces, _cuts(tokenizer))) > 1 + pieces[0][0].count("<|im_end|>")
    assert cut > 50


@pytest.mark.parametrize(
    "change",
    [
        {"content": "hat cat"},
        {"content": "hat", "rstrip": True},
        {"content": "cat", "lstrip": True},
        {"content": "cat", "single_word": True},
    ],
    ids=str,
)
def test_no_cut_between_words_where_an_added_token_may_reach_across(change):
    tokenizer = make("gpt2", TEXT)
    assert _cuts(tokenizer).words
    for kind in ("add_prefix_space", "llama2", "metaspace", "unigram", "wordpiece"):
        assert not _cuts(make(kind, TEXT)).words
    tokenizer.add_tokens([AddedToken(**change)])
    assert not _cuts(tokenizer).words


def test_what_a_call_of_somebody_else_left_behind(tokenizers):
    tokenizer = tokenizers["gpt2"]
    before = encode(tokenizer, TEXT)
    tokenizer(TEXT, truncation=True, max_length=3)
    assert encode(tokenizer, TEXT) == before and len(before) > 3


def test_the_largest_token_of_a_data_set(tokenizers):
    tokenizer = tokenizers["gpt2"]
    data = rows([talk("hi", "Paris"), talk("hi", "Rome")], tokenizer, "chat", pack=True)
    assert data.largest_token == max(int(data.row(i).input_ids.max()) for i in range(len(data)))


# ---- text of ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
def test_a_continuation_is_what_it_adds(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = encode(tokenizer, "Name the capital of France, please.")
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for place in range(len(ids) + 1):
        before = tokenizer.decode(ids[:place], skip_special_tokens=True)
        assert before + decode_continuation(tokenizer, ids[:place], ids[place:]) == whole


def test_a_character_begun_in_the_prompt_is_whole_in_the_continuation(tokenizers):
    tokenizer = tokenizers["gpt2"]
    ids = encode(tokenizer, "a€")
    assert len(ids) > 2
    assert decode_continuation(tokenizer, ids[:-1], ids[-1:]) == "€"


def test_special_tokens_are_left_out_of_a_continuation(tokenizers):
    tokenizer = tokenizers["llama2"]
    prompt = encode(tokenizer, "<s>in")
    assert decode_continuation(tokenizer, prompt, [*encode(tokenizer, "Paris"), tokenizer.eos_token_id]) == " Paris"
    assert decode_continuation(tokenizer, prompt, []) == decode_continuation(tokenizer, [], []) == ""


def test_preview_shows_spaces_where_runs_meet(tokenizers):
    tokenizer = tokenizers["metaspace"]
    tokenizer.chat_template = LLAMA2
    data = rows([talk("hi", "Paris")], tokenizer, "chat")
    shown = preview(data, tokenizer, rows=1)[0]
    assert "".join(text for text, _ in shown) == tokenizer.decode(data.row(0).input_ids.tolist())


# ---- text that is none


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00", "a\ud83d b", "\ude00\ud83d"])
def test_half_of_a_surrogate_pair_is_refused(tokenizers, text):
    place = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    with pytest.raises(
        ValueError, match=rf"text must be Unicode; got U\+{ord(text[place]):04X}, .* at character {place} "
    ):
        require_text(text)
    with pytest.raises(ValueError, match="text must be Unicode"):
        encode(tokenizers["gpt2"], text)
    with pytest.raises(ValueError, match="text must be Unicode"):
        prompt_ids({"instruction": text}, tokenizers["gpt2"], template="alpaca")
    require_text("whole 😀 \ufffd é")


def test_an_expression_that_backtracks_without_end_is_a_refusal():
    tokenizer = make("gpt2", TEXT)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("(a+)+$"), "b")
    with pytest.raises(ValueError, match="the tokenizer failed on a text"):
        encode(tokenizer, "a" * 60 + "!")


def test_labels_are_the_ids_of_the_answers(tokenizers):
    for kind in ("gpt2", "llama2", "metaspace", "unigram"):
        tokenizer = tokenizers[kind]
        tokenizer.chat_template = CHATML
        row = rows([talk("hi", "Paris is it", "hi", "Rome")], tokenizer, "chat").row(0)
        assert supervised(row, tokenizer).replace(" ", "") == "Parisisit<|im_end|>Rome<|im_end|>"
        assert np.array_equal(row.labels[row.labels != IGNORED], row.input_ids[row.labels != IGNORED])
