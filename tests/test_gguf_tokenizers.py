"""The tokenizer of a GGUF file: the ids of the one that was written, and in `make slow` llama.cpp's of the real model."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf_files import ARRAY, BOOL, F32, I32, STRING, U32, RawFile, smollm2, value
from tokenizer_kinds import rebuilt, sentencepiece, texts_of
from tokenizers import processors

import jlora
from jlora.models import abstract_params, model_from_config
from jlora.storage.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_of, rules_of, steps_of
from jlora.storage.stops import SpecialTokens, generation_config, turn_end_ids


def written(path, tokenizer):
    """A file with the vocabulary of a tokenizer, and a few rows more."""
    model = model_from_config(tiny.LLAMA | {"vocab_size": len(tokenizer) + 3}, dtype=jnp.float32)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(model))
    jlora.save_gguf(path, model, params, tokenizer=tokenizer, dtype="f16")
    return path


def ids(tokenizer, texts):
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def texts():
    return texts_of(2000)


def assert_saved(tokenizer, directory, texts):
    tokenizer.save_pretrained(directory)
    again = jlora.load_tokenizer(directory)
    assert ids(again, texts) == ids(tokenizer, texts)
    assert (again.bos_token, again.eos_token, again.pad_token) == (
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
    )
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS.values()])
def test_byte_level_tokens_are_those_that_were_written(name, texts, tmp_path):
    original = rebuilt(name)
    original.chat_template = tiny.CHATML
    read = jlora.load_tokenizer(written(tmp_path / "m.gguf", original))
    expected = ids(original, texts)
    assert ids(read, texts) == expected
    assert [read.decode(row) for row in expected[:200]] == [original.decode(row) for row in expected[:200]]
    assert [read.decode(row, skip_special_tokens=True) for row in expected[:200]] == [
        original.decode(row, skip_special_tokens=True) for row in expected[:200]
    ]
    assert read.get_vocab() == original.get_vocab()
    assert (read.bos_token, read.eos_token, read.chat_template) == (tiny.EOT, tiny.EOT, tiny.CHATML)
    assert_saved(read, tmp_path / "saved", texts[:300])


@pytest.mark.parametrize("before", [False, True], ids=["gemma", "mistral"])
def test_sentencepiece_tokens_are_those_that_were_written(before, tmp_path):
    users = () if before else ("▁▁", "▁▁▁", "\n\n")
    original = sentencepiece(tiny.text() + "a,b.c-d e'f", before=before, users=users)
    texts = [tiny.text(60), *texts_of(1000, more=(*tiny.text(60).split(), " ", " the", "  ", "keeper"))]
    read = jlora.load_tokenizer(written(tmp_path / "m.gguf", original))
    expected = ids(original, texts)
    assert ids(read, texts) == expected
    assert [read.decode(row) for row in expected[:200]] == [original.decode(row) for row in expected[:200]]
    assert (read.bos_token, read.eos_token, read.unk_token, read.pad_token) == ("<s>", "</s>", "<unk>", "<pad>")
    assert_saved(read, tmp_path / "saved", texts[:300])


@pytest.mark.parametrize(
    "single", ["$A", f"{tiny.EOT} $A", f"{tiny.EOT} $A {tiny.EOT}"], ids=["bare", "bos", "bos eos"]
)
def test_a_text_begins_and_ends_as_it_did(single, tmp_path):
    original = rebuilt("llama-bpe")
    original.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(tiny.EOT, 0)]
    )
    read = jlora.load_tokenizer(written(tmp_path / "m.gguf", original))
    assert ids(read, ["The keeper's 3 lamps", ""]) == ids(original, ["The keeper's 3 lamps", ""])
    assert_saved(read, tmp_path / "saved", ["The keeper's 3 lamps"])


def test_rules_and_their_fields_are_inverse():
    for (steps, whole), name in PRE_TOKENIZERS.items():
        assert rules_of(name, where="f") == (steps, whole)
        assert tuple(steps_of(pre_tokenizer_of(steps))) == steps


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("file") / "m.gguf", rebuilt("llama-bpe"))


def test_what_llama_cpp_takes_for_absent_fields(file, tmp_path):
    """A bos token before each text with this pre-tokenizer, also under the other name that files have for it."""
    expected = ids(jlora.load_tokenizer(file), ["keeper"])
    raw = RawFile.read(file)
    del raw.fields["tokenizer.ggml.add_bos_token"]
    for name in ("llama-bpe", "llama3"):
        raw.fields["tokenizer.ggml.pre"] = value(STRING, name)
        assert ids(jlora.load_tokenizer(raw.write(tmp_path / "m.gguf")), ["keeper"]) == [[0, *expected[0]]]


def test_named_templates_and_several_stops(file, tmp_path):
    raw = RawFile.read(file)
    raw.fields["tokenizer.chat_template"] = value(STRING, tiny.CHATML)
    raw.fields["tokenizer.chat_template.tools"] = value(STRING, "tools")
    raw.fields["tokenizer.ggml.eot_token_id"] = value(U32, 2)
    raw.fields["tokenizer.ggml.padding_token_id"] = value(U32, 4294967295)  # -1: none
    path = raw.write(tmp_path / "m.gguf")
    tokenizer = jlora.load_tokenizer(path)
    assert tokenizer.chat_template == {"default": tiny.CHATML, "tools": "tools"}
    assert tokenizer.pad_token is None
    assert generation_config(path) == {"bos_token_id": 0, "eos_token_id": [0, 2]}
    assert jlora.load(path)[0].config.eos_token_id == (0, 2)
    special = SpecialTokens.of(path)
    assert (special.eos_token_id, turn_end_ids(special)) == (0, (2,))
    assert special.get_added_vocab() == {t: i for t, i in tokenizer.get_added_vocab().items()}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pre": None}, "does not say `tokenizer.ggml.pre`"),
        ({"pre": value(STRING, "tekken")}, "`tokenizer.ggml.pre` 'tekken', by which llama.cpp knows how to split text, and jlora"),
        ({"model": value(STRING, "rwkv")}, "`tokenizer.ggml.model` 'rwkv'; jlora reads 'gpt2' and 'llama'"),
        ({"model": value(STRING, "llama")}, "has no `tokenizer.ggml.scores`"),
        ({"tokens": None}, "`tokenizer.ggml.tokens` is missing"),
        ({"tokens": value(ARRAY, (U32, [1, 2]))}, "`tokenizer.ggml.tokens` must be a list that is not empty, each item text"),
        ({"token_type": value(ARRAY, (I32, [1, 2]))}, "`tokenizer.ggml.token_type` must be a list of a number for each of"),
        ({"scores": value(ARRAY, (F32, [1.0])), "model": value(STRING, "llama")}, "`tokenizer.ggml.scores` must be a list"),
        ({"merges": value(ARRAY, (STRING, ["never seen"]))}, "has a vocabulary that cannot be used: .*never"),
        ({"merges": value(ARRAY, (STRING, ["a"]))}, "has a vocabulary that cannot be used"),
        ({"add_bos_token": value(U32, 1)}, "`tokenizer.ggml.add_bos_token` must be true or false; got 1"),
        ({"bos_token_id": None, "add_bos_token": value(BOOL, True)}, "says that each text gets a bos token, and names none"),
        ({"bos_token_id": value(STRING, "0")}, "`tokenizer.ggml.bos_token_id` must be an integer"),
    ],
)  # fmt: skip
def test_vocabularies_that_are_refused(fields, says, file, tmp_path):
    raw = RawFile.read(file)
    for name, new in fields.items():
        if new is None:
            del raw.fields[f"tokenizer.ggml.{name}"]
        else:
            raw.fields[f"tokenizer.ggml.{name}"] = new
    with pytest.raises(ValueError, match=says) as error:
        jlora.load_tokenizer(raw.write(tmp_path / "m.gguf"))
    assert "m.gguf" in str(error.value)


def test_a_token_that_is_there_twice_is_refused(file, tmp_path):
    raw = RawFile.read(file)
    tokens = ["a", "b", "a"]
    raw.fields["tokenizer.ggml.tokens"] = value(ARRAY, (STRING, tokens))
    raw.fields["tokenizer.ggml.token_type"] = value(ARRAY, (I32, [1, 1, 1]))
    with pytest.raises(ValueError, match="the token 'a' is there twice"):
        jlora.load_tokenizer(raw.write(tmp_path / "m.gguf"))


@pytest.mark.slow
def test_the_real_one_splits_digits_and_is_saved(tmp_path):
    """transformers' own reader drops the rule of `smollm` that splits digits, and cannot save what it read."""
    tokenizer = jlora.load_tokenizer(smollm2())
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert tuple(steps_of(state["pre_tokenizer"])) == rules_of("smollm", where="f")[0]
    assert tokenizer.convert_ids_to_tokens(tokenizer("2024")["input_ids"]) == [*"2024"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49152
    assert_saved(tokenizer, tmp_path, ["In 1999 it was 12.5 °C", "<|im_start|>user\nHi<|im_end|>\n"])
    chat = [{"role": "user", "content": "Hi"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_tokens_of_the_real_one_are_those_of_llama_cpp():
    import llama_cpp

    code = [
        "for i in range(10):\n    x[i] += 3.14  # π\n",
        "a=b+c;",
        "0x1F",
        "{'k': [1,2,3]}",
        "http://x.y/z?q=1&r=2",
        "==",
        "->",
    ]
    texts = texts_of(
        2000, more=(*code, *map(str, range(7, 3000, 211)), "<|endoftext|>", "<file_sep>", "<gh_stars>"), seed=1
    )
    tokenizer = jlora.load_tokenizer(smollm2())
    with contextlib.closing(llama_cpp.Llama(str(smollm2()), vocab_only=True, verbose=False)) as theirs:
        for text in texts:
            expected = theirs.tokenize(text.encode(), add_bos=True, special=True)
            assert tokenizer(text)["input_ids"] == expected, text
