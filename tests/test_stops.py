"""What ends a generation: one set of tokens, wherever a checkpoint names them."""

import json
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import pytest
import tiny
import torch
import transformers

import jlora
from jlora.files.ollama import modelfile
from jlora.files.vocabulary import Vocabulary
from jlora.models import model_from_config
from jlora.storage.stops import generation_config, stop_ids, token_ids, turn_end_ids, with_stops

EOT, START, END = 0, 1, 2  # of tiny.tokenizer
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n\\n' + m.content | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}"
)


def template(after, *, last=""):
    """Turns that are closed by `after`, and a conversation by `last`."""
    return f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{after}{{% endfor %}}{last}"


TEMPLATES = {
    "chatml": (tiny.CHATML, (END,)),
    "trimmed content": (LLAMA3, (END,)),
    "end of text": (template("{{ eos_token }}"), (EOT,)),
    "new lines around": (template("\n<|im_end|>\n\n"), (END,)),
    "end of turn, then end of text": (template("<|im_end|>\n", last="<|endoftext|>"), (END, EOT)),
    "words": (template("\n### Instruction:\n"), ()),
    "a word that begins with an added one's text": (template("\n"), ()),
    "white space": (template("\n\n"), ()),
    "refuses the conversation": ("{{ raise_exception('one turn only') }}", ()),
    "no content": ("{% for m in messages %}<|im_end|>{% endfor %}", ()),
    "broken": ("{% for %}", ()),
    "none": (None, ()),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_end_of_a_turn_is_found_by_rendering(case):
    chat, ends = TEMPLATES[case]
    assert turn_end_ids(tiny.tokenizer(chat)) == ends


def test_an_answer_that_is_a_token_of_its_own_is_no_end_of_turn():
    tokenizer = tiny.tokenizer(template("\n"))
    tokenizer.add_tokens(["yes", "yes."])
    assert turn_end_ids(tokenizer) == ()


def test_named_templates():
    assert turn_end_ids(tiny.tokenizer({"default": tiny.CHATML, "tool_use": template("\n")})) == (END,)


def test_the_longer_of_two_tokens_closes():
    tokenizer = tiny.tokenizer(template("</s>tool"))
    tokenizer.add_tokens(["</s>", "</s>tool"], special_tokens=True)
    assert turn_end_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("</s>tool"),)


def test_stops_are_one_set_in_the_order_of_their_sources():
    tokenizer = tiny.tokenizer(tiny.CHATML)
    assert stop_ids((7, 5), tokenizer, vocab_size=100) == (7, 5, EOT, END)
    assert stop_ids((END, EOT), tokenizer, vocab_size=100) == (END, EOT)
    assert stop_ids((), None, vocab_size=100) == ()
    assert stop_ids((100, 2**31, -1, 99), None, vocab_size=100) == (99,)
    tokenizer.eos_token = None
    assert stop_ids((), tokenizer, vocab_size=100) == (END,)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (3, (3,)), ([3, 1], (3, 1)), ([], ()), ((4,), (4,))])
def test_eos_token_id(value, ids):
    assert token_ids(value, where="x") == ids


@pytest.mark.parametrize("value", [True, "2", [2, None], [[2]], 2.0, {"id": 2}])
def test_what_is_no_eos_token_id(value):
    with pytest.raises(ValueError, match="`eos_token_id` in generation_config.json must be null, a token id or a list"):
        token_ids(value, where="generation_config.json")


def test_stops_are_added_to_a_generation_config():
    fields = {"eos_token_id": 1, "pad_token_id": 0, "_from_model_config": True}
    assert with_stops(fields, (1,)) == fields
    assert with_stops(fields, (1, 5)) == {"eos_token_id": [1, 5], "pad_token_id": 0}
    assert with_stops({}, (5,)) == {"eos_token_id": 5}
    assert with_stops({"eos_token_id": [1, 5, 9]}, (5, 1)) == {"eos_token_id": [1, 5, 9]}


# A checkpoint


def checkpoint(directory, *, eos=EOT, generation=None, chat=None, fields=tiny.LLAMA):
    """A tiny checkpoint whose three files say what ends a generation."""
    directory = Path(tiny.write_checkpoint(directory, fields, chat=chat))
    (directory / "config.json").write_text(
        json.dumps(json.loads((directory / "config.json").read_text()) | {"eos_token_id": eos})
    )
    (directory / "generation_config.json").unlink()
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


CHECKPOINTS = {
    "llama 3 instruct, three stops": ({"generation": {"eos_token_id": [5, 6, 7]}}, (5, 6, 7, 0)),
    "qwen2.5 base": ({"chat": tiny.CHATML, "generation": {"eos_token_id": 0}}, (0, 2)),
    "qwen2.5 instruct": ({"eos": 2, "chat": tiny.CHATML, "generation": {"eos_token_id": [2, 0]}}, (2, 0)),
    "gpt2, eos is bos": ({"fields": tiny.GPT2}, 0),
    "an empty list": ({"eos": None, "generation": {"eos_token_id": []}}, 0),
    "null": ({"generation": {"eos_token_id": None, "pad_token_id": 0}}, 0),
    "beyond the vocabulary": ({"eos": 50256, "generation": {"eos_token_id": [50256, 3]}}, (3, 0)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_loaded_model_knows_all_of_its_stops(case, tmp_path):
    files, stops = CHECKPOINTS[case]
    model, _ = jlora.load(checkpoint(tmp_path / "m", **files), dtype=jnp.float32)
    assert model.config.eos_token_id == stops


def test_without_a_tokenizer_the_files_count(checkpoints):
    directory, oracle = checkpoints["llama"]
    model, _ = jlora.load(directory, dtype=jnp.float32)
    assert model.config.eos_token_id == oracle.generation_config.eos_token_id == 1


@pytest.mark.parametrize("content", ["{", "[2]", '{"eos_token_id": true}', '{"eos_token_id": ["<|im_end|>"]}'])
def test_a_damaged_generation_config_is_refused_by_name(content, tmp_path):
    directory = checkpoint(tmp_path / "m")
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json"):
        jlora.load(directory, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", [1, 2**31]),
        ("eos_token_id", -2),
        ("pad_token_id", "0"),
        ("do_sample", "true"),
        ("temperature", "0.7"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 50.5),
        ("top_k", True),
        ("top_p", 95),
        ("repetition_penalty", [1.1]),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(name, value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"generation_config.json' cannot be used:\n  `{name}` must be .*; got"):
        generation_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"eos_token_id": -1, "pad_token_id": -1},
        {"eos_token_id": [128001, 128009], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "temperature": 0.0, "top_k": None, "top_p": 1},
        {"top_k": 0, "repetition_penalty": 1.05, "transformers_version": "4.37.0"},
        {"cache_implementation": "hybrid", "begin_suppress_tokens": [1]},
    ],
)
def test_fields_that_checkpoints_have(fields, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert generation_config(tmp_path) == fields


@pytest.mark.slow
def test_generation_stops_where_transformers_does(tmp_path):
    directory = checkpoint(tmp_path / "m")
    model, params = jlora.load(directory, dtype=jnp.float32)
    options = {"max_new_tokens": 12, "temperature": 0}
    (free,) = jlora.generate(model, params, [[5, 9, 11]], eos_token_id=[], **options)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [398, free[4]], "do_sample": False}))
    model, params = jlora.load(directory, dtype=jnp.float32)
    (stopped,) = jlora.generate(model, params, [[5, 9, 11]], **options)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = oracle.generate(torch.tensor([[5, 9, 11]]), max_new_tokens=12)
    assert stopped == ids[0, 3:].tolist() == free[: free.index(free[4]) + 1]


@pytest.mark.parametrize("eos", [400, -1, True, "2", [1, 2**31], [None], 1.5])
def test_stops_that_no_token_can_be_are_refused(eos, tmp_path):
    model = model_from_config(tiny.LLAMA | {"vocab_size": 400}, dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with pytest.raises(ValueError, match=r"`eos_token_id` must be token ids in 0\.\.399; got"):
        jlora.generate(model, params, [[1]], temperature=0, max_new_tokens=2, eos_token_id=eos)


# Other runtimes


def special_ids(tokenizer, eos):
    config = model_from_config(tiny.LLAMA | {"vocab_size": 400, "eos_token_id": eos}, dtype=jnp.float32).config
    return {k: v for k, v in Vocabulary.of(tokenizer, config).ids.items() if k.startswith("e")}


def test_gguf_names_every_stop(tmp_path):
    chat = tiny.tokenizer(tiny.CHATML)
    assert special_ids(chat, 0) == {"eos": 0, "eot": 2}
    assert special_ids(chat, [2, 0]) == {"eos": 0, "eot": 2}
    assert special_ids(tiny.tokenizer(), 0) == {"eos": 0}
    assert special_ids(tiny.tokenizer(), [5, 6]) == {"eos": 0, "eot": 5, "eom": 6}
    assert special_ids(chat, [50256]) == {"eos": 0, "eot": 2}
    with pytest.warns(UserWarning, match="names 3 tokens that end a generation, and this model has 4"):
        assert special_ids(chat, [5, 6]) == {"eos": 0, "eot": 2, "eom": 5}
    directory = checkpoint(tmp_path / "m", chat=tiny.CHATML)
    model, params = jlora.load(directory, dtype=jnp.float32)
    jlora.save_gguf(tmp_path / "m.gguf", model, params, tokenizer=chat, dtype="f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")] == [0, 2]


def test_a_modelfile_stops_at_each():
    def stops(tokenizer, eos):
        config = model_from_config(tiny.LLAMA | {"vocab_size": 410, "eos_token_id": eos}, dtype=jnp.float32).config
        return [line for line in modelfile("m.gguf", tokenizer, config).splitlines() if line.startswith("PARAMETER")]

    end, text = 'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"'
    assert stops(tiny.tokenizer(tiny.CHATML), None) == [text, end]
    assert stops(tiny.tokenizer(), [2, 0]) == [text, end]
    assert stops(tiny.tokenizer(LLAMA3), 0) == [text, end]
    assert stops(tiny.tokenizer(), [0, 405]) == [text], "no token, no text"
    assert stops(tiny.tokenizer(template("\n### Instruction:\n")), 0) == [text]
    odd = tiny.tokenizer()
    odd.add_special_tokens({"eos_token": '<"|>\n'})
    assert modelfile("m.gguf", odd, model_from_config(
        tiny.LLAMA | {"vocab_size": 410, "eos_token_id": None}, dtype=jnp.float32).config
    ) == 'FROM ./m.gguf\nPARAMETER stop """<"|>\n"""\n'  # fmt: skip


def test_an_adapters_stops_are_in_what_is_merged(tmp_path):
    """transformers runs the merged model of a base whose end of text is not its template's end of turn."""
    directory = checkpoint(
        tmp_path / "m", chat=tiny.CHATML, generation={"eos_token_id": 0, "top_p": 0.5, "pad_token_id": 0}
    )
    model, params = jlora.load(directory, dtype=jnp.float32)
    jlora.save_pretrained(tmp_path / "out", model, params, base=directory)
    merged = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (merged.eos_token_id, merged.top_p, merged.pad_token_id) == ([0, 2], 0.5, 0)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 0
    shutil.rmtree(tmp_path / "out")
    jlora.save_pretrained(tmp_path / "out", model, params, tokenizer=tiny.tokenizer(tiny.CHATML))
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [0, 2]
