"""`load_tokenizer` against `tokenizers` itself, whatever class transformers has for a checkpoint; and what cannot be read."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers

import jlora

TEXTS = (
    "It was 1984, and 12 ships   came",
    " it's 19\n\n84 Ships\tcame",
    "",
    "<|endoftext|>ships<|im_end|> 1984",
    "Ünïcode ﬁ e\u0301 ①",
    "mitochondria ships",
)
FAMILIES = ("gpt2", "llama", "qwen2", "mistral")
CLASSES = (
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    None,
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WHOLE_BYTES = BYTES | {"use_regex": False}
# As the published tokenizer.json files of the models have them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}, "decoder": BYTES}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
FORMS = {
    "GPT-2's": {"pre_tokenizer": BYTES, "decoder": BYTES},
    "with a prefix space": {"pre_tokenizer": BYTES | {"add_prefix_space": True}, "decoder": BYTES},
    "SmolLM2's, digits apart": sequence({"type": "Digits", "individual_digits": True}, BYTES),
    "Llama 3's": sequence(split(LLAMA3), WHOLE_BYTES),
    "Qwen2's": sequence(split(QWEN2), WHOLE_BYTES) | {"normalizer": {"type": "NFC"}},
    "Metaspace": {"pre_tokenizer": METASPACE, "decoder": METASPACE},
    "Llama 2's normalizer": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": METASPACE,
    },
    "begins with its bos": {
        "pre_tokenizer": BYTES,
        "decoder": BYTES,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        },
    },
    "saved while it cut and padded": {
        "pre_tokenizer": BYTES,
        "decoder": BYTES,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        },
    },
}  # fmt: skip


def state(form):
    """A small tokenizer.json whose merges reach across what the pre-tokenizers split."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [
        "1 9", "8 4", "19 84", "1 2", "s h", "i p", "sh ip", "ship s", "c a", "m e", "ca me", "Ġ ship", "▁ ship", "Ġ 19", "t '",
        "Ġ Ġ", "▁ ▁", ", Ġ", "i t", "m it",
    ]  # fmt: skip
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "▁", *(merge.replace(" ", "") for merge in merges)]
    words += ["Ġships", "▁ships"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": word, **flags, "special": True} for i, word in enumerate(special)]
    added.append({"id": len(vocabulary), "content": "mitochondria", **flags, "special": False})
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges,
    }  # fmt: skip
    steps = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **steps, "added_tokens": added, "model": model, **form}


def write(directory, form=FORMS["GPT-2's"], *, family="llama", **settings):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(state(form)))
    settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"} | settings
    (directory / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )
    if family is not None:
        (directory / "config.json").write_text(json.dumps({"model_type": family}))
    return directory


def assert_same(tokenizer, directory):
    """The ids are those of the directory's tokenizer.json, with special tokens and without; they decode alike."""
    right = Tokenizer.from_file(str(directory / "tokenizer.json"))
    right.no_truncation()
    right.no_padding()
    for text in TEXTS:
        for special in (False, True):
            ids = right.encode(text, add_special_tokens=special).ids
            assert tokenizer(text, add_special_tokens=special)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == right.decode(ids, skip_special_tokens=False)
    assert [i.ids for i in tokenizer.backend_tokenizer.encode_batch(list(TEXTS))] == [
        i.ids for i in right.encode_batch(list(TEXTS))
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_file(family, form, tmp_path):
    for name in CLASSES:
        directory = write(tmp_path / str(name), FORMS[form], family=family, tokenizer_class=name)
        tokenizer = jlora.load_tokenizer(directory)
        assert_same(tokenizer, directory)
        assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == "{{ messages }}"


def test_transformers_itself_would_have_taken_others(tmp_path):
    """Else these tests could not fail."""
    form = FORMS["SmolLM2's, digits apart"]
    for family, name in (("llama", "GPT2Tokenizer"), ("gpt2", "GPT2Tokenizer"), ("qwen2", "PreTrainedTokenizerFast")):
        directory = write(tmp_path / family, form, family=family, tokenizer_class=name)
        with pytest.raises(AssertionError):
            assert_same(transformers.AutoTokenizer.from_pretrained(directory), directory)


@pytest.mark.parametrize("form", FORMS)
def test_saved_again_it_is_the_same(form, tmp_path):
    """In an adapter directory, which has no config.json, and in a merged checkpoint; here and in transformers."""
    for family in FAMILIES:
        source = write(tmp_path / family, FORMS[form], family=family, tokenizer_class="GPT2Tokenizer")
        tokenizer = jlora.load_tokenizer(source)
        adapter, merged = tmp_path / f"{family}-adapter", tmp_path / f"{family}-merged"
        for output in (adapter, merged):
            tokenizer.save_pretrained(output)
        (merged / "config.json").write_text((source / "config.json").read_text())
        for output in (adapter, merged):
            assert_same(jlora.load_tokenizer(output), source)
        assert_same(transformers.AutoTokenizer.from_pretrained(adapter), source)
        if family != "qwen2":  # transformers makes every qwen2 a Qwen2Tokenizer
            assert_same(transformers.AutoTokenizer.from_pretrained(merged), source)


def test_embedded_models(tmp_path):
    for name in ("tiny-llama", "tiny-gpt2"):
        directory = f"examples/assets/{name}"
        tokenizer, theirs = jlora.load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
        assert tokenizer.special_tokens_map == theirs.special_tokens_map
        assert tokenizer.chat_template == theirs.chat_template
        assert tokenizer.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(
    "family, settings, eos",
    [
        ("gpt2", {}, "<|endoftext|>"),  # GPT-2 as published: {"model_max_length": 1024} and nothing else
        ("qwen2", {}, "<|endoftext|>"),
        ("llama", {"tokenizer_class": "GPT2Tokenizer"}, "<|endoftext|>"),
        ("llama", {}, None),  # its class has </s>, which is not in the vocabulary
        ("mistral", {"tokenizer_class": "LlamaTokenizerFast"}, None),
        ("llama", {"tokenizer_class": "pipeline"}, None),
        ("gpt2", {"tokenizer_class": "PreTrainedTokenizerFast"}, None),
        ("gpt2", {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        ("gpt2", {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}}, "<|im_end|>"),
    ],
)
def test_special_tokens_that_only_the_class_names(family, settings, eos, tmp_path):
    directory = write(tmp_path, family=family, **{"eos_token": None, "model_max_length": 1024} | settings)
    tokenizer = jlora.load_tokenizer(directory)
    assert tokenizer.eos_token == eos
    assert_same(tokenizer, directory)


def test_tokens_beyond_the_file_are_added(tmp_path):
    directory = write(tmp_path, pad_token="<pad>", additional_special_tokens=["<tool>"])
    tokenizer, size = (
        jlora.load_tokenizer(directory),
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size(),
    )
    assert sorted([tokenizer.pad_token_id, *tokenizer("<tool>")["input_ids"]]) == [size, size + 1]
    assert_same(tokenizer, directory)


def test_the_files_own_tokens_keep_its_flags(tmp_path):
    token = {"content": "mitochondria", "lstrip": True, "rstrip": True, "normalized": True, "special": True}
    directory = write(tmp_path, added_tokens_decoder={"300": token, "999": token | {"content": "<new>"}})
    tokenizer = jlora.load_tokenizer(directory)
    assert_same(tokenizer, directory)
    assert len(tokenizer("<new>")["input_ids"]) == 1


def test_special_tokens_map(tmp_path):
    """Of older checkpoints; and a template in a file of its own."""
    directory = write(tmp_path, eos_token=None, chat_template=None)
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    )
    (directory / "chat_template.jinja").write_text("{{ 1 }}")
    tokenizer = jlora.load_tokenizer(directory)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", "{{ 1 }}")
    assert_same(tokenizer, directory)


def test_vocabulary_and_merges_alone(tmp_path):
    """The files before tokenizer.json; transformers' class decides."""
    model = state(FORMS["GPT-2's"])["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = jlora.load_tokenizer(tmp_path)
    assert (
        tokenizer("ships 1984")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(tmp_path)("ships 1984")["input_ids"]
    )


NFC = {"type": "NFC"}


def replace(content, n=1, **pattern):
    part = {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [part] * n}}


FILE = {
    "empty": "",
    "a list": "[]",
    "binary": b"\x80\x04\x95\xff",
    "cut": json.dumps(state({}))[:-40],
    "deep": "[" * 100_000,
    "an integer of many digits": '{"model": ' + "9" * 10_000 + "}",
    "an object": "{}",
    **{
        name: json.dumps(state(form))
        for name, form in {
            "a normalizer that is true": {"normalizer": True},
            "a normalizer of a later version": {"normalizer": {"type": "Later"}},
            "a model of a later version": {"model": {"type": "Later", "vocab": {}}},
            "a model that is a list": {"model": []},
            "a vocabulary of floats": {"model": {"type": "BPE", "vocab": {"a": 0.5}, "merges": []}},
            "negative ids": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
            "a merge that is not in the vocabulary": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
            "a unigram without entries": {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
            "an unknown token that is not there": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
            "added tokens that are numbers": {"added_tokens": [1]},
            "added tokens without content": {"added_tokens": [{"id": 1}]},
            "an expression that does not compile": replace("x", Regex="("),
            "a text of gigabytes": replace("a" * 10, 11),
            "a prefix of gigabytes": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
            "a character map that ends too early": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
            "a character map that is text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "ß"}},
            "chunks of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
            "a template of unknown tokens": {
                "post_processor": {
                    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}], "pair": [],
                    "special_tokens": {},
                }
            },
            "a decoder that strips far": {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}},
            "dropout": {"model": state({})["model"] | {"dropout": 0.1}},
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", FILE)
def test_files_that_cannot_be_read_are_one_error(case, tmp_path):
    write(tmp_path)
    content = FILE[case]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"tokenizer\.json") as error:
        jlora.load_tokenizer(tmp_path)
    assert type(error.value) is ValueError and len(str(error.value)) < 2000


SETTINGS = {
    "a list": [],
    "eos is a number": {"eos_token": 7},
    "eos is an empty object": {"eos_token": {"__type": "AddedToken"}},
    "added tokens as a list": {"added_tokens_decoder": [1]},
    "added tokens without content": {"added_tokens_decoder": {"1": {"special": True}}},
    "added tokens by name": {"added_tokens_decoder": {"x": {"content": "<y>"}}},
    "a template that is a number": {"chat_template": 3},
    "a class that is a list": {"tokenizer_class": []},
    "padding side": {"padding_side": "up"},
    "extra tokens as text": {"extra_special_tokens": "<x>"},
    "length as text": {"model_max_length": "long"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_read_are_one_error(case, tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[case]))
    with pytest.raises(ValueError, match=r"tokenizer(_config)?\.json"):
        jlora.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "files, error, says",
    [
        ({}, FileNotFoundError, "no tokenizer"),
        ({"tokenizer_config.json": "{}"}, FileNotFoundError, "no tokenizer"),
        ({"tokenizer.json": None}, ValueError, "cannot be read"),
        ({"tokenizer.model": b"\x00\x01"}, ValueError, "tokenizer"),
        ({"vocab.json": "{}", "config.json": '{"model_type": "gpt2"}'}, ValueError, "tokenizer"),
        ({"vocab.json": "[", "merges.txt": "a b", "config.json": '{"model_type": "gpt2"}'}, ValueError, "tokenizer"),
        ({"vocab.json": "{}", "merges.txt": "", "config.json": '{"model_type": "mamba"}'}, ValueError, "mamba"),
    ],
)
def test_directories_without_tokenizer_json(files, error, says, tmp_path):
    for name, content in files.items():
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=says) as caught:
        jlora.load_tokenizer(tmp_path)
    assert type(caught.value) is error


@pytest.mark.few(2)
@pytest.mark.parametrize("command", ["finetune", "prepare", "inspect", "generate"])
def test_no_code_of_a_directory_runs(command, tmp_path):
    """Whatever standard input answers to transformers' question whether to trust it."""
    model, mark = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    code = f"open({str(mark)!r}, 'w').close()\nclass C: pass\n"
    (model / "evil_conf.py").write_text(code)
    (model / "evil_tok.py").write_text(code)
    (model / "vocab.json").write_text("{}")
    (model / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil_conf.C"}}))
    tokens = {"auto_map": {"AutoTokenizer": ["evil_tok.C", "evil_tok.C"]}, "tokenizer_class": "C"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokens))
    (tmp_path / "x.txt").write_text("the keeper lit a lamp\n" * 60)
    flags = {
        "finetune": ["--data", "x.txt", "--output", "out"],
        "prepare": ["--data", "x.txt", "--output", "out"],
        "inspect": ["--data", "x.txt"],
        "generate": ["--prompts", "a"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", "from jlora.cli import main; main()", command, "--model", "model", *flags],
        input="y\n" * 100, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(jlora.__path__[0]) + "/..", os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode != 0 and not mark.exists(), done.stdout
    assert "evil" in done.stderr and "Traceback" not in done.stderr
