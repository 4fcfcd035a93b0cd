"""Special tokens of the data that the base never trained are named, with what to do; trl#1668, unsloth's fix_untrained_tokens."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jlora
from jlora import cli
from jlora.files import find, load_tokenizer, read_config, untrained_tokens
from jlora.models import model_from_config

EOT, START, END = 0, 1, 2  # of tiny.tokenizer
EMBEDDING = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}
LEAF = {"gpt2": "transformer/wte/embedding", "llama": "model/embed_tokens/embedding"}
HEAD = "lm_head.weight"
CHATS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("lamp", "wind", "salt", "rope", "rain", "tide")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """gpt2: its head is its embedding; llama: it has a head of its own."""
    place = tmp_path_factory.mktemp("bases")
    return {
        family: Path(tiny.write_checkpoint(place / family, fields, chat=tiny.CHATML))
        for family, fields in (("gpt2", tiny.GPT2), ("llama", tiny.LLAMA))
    }


@pytest.fixture
def base(made, tmp_path):
    def write(family, **tables):
        """The checkpoint with other rows: `embedding` and `head` change a table in place."""
        directory = shutil.copytree(made[family], tmp_path / "base", dirs_exist_ok=True)
        tensors = load_file(directory / "model.safetensors")
        for name, change in tables.items():
            key = HEAD if name == "head" else EMBEDDING[family]
            tensors[key] = tensors[key].copy()
            change(tensors[key])
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return write


def said(directory, *, used=(EOT, START, END, 50), learned=(EOT, END, 50), trained=()):
    model = model_from_config(read_config(directory), dtype=jnp.float32)
    ids = {"used": set(used), "learned": set(learned), "trained": set(trained)}
    return untrained_tokens(directory, model, load_tokenizer(directory), **ids)


def set_rows(value, *rows):
    def change(table):
        table[list(rows)] = value(table) if callable(value) else value

    return change


def mean(table):
    return table.mean(0)


def short_mean(table):
    """As `nearly_mean`, of rows that point in all directions: a fiftieth of them, so that the noise is more of it."""
    short = 0.02 * np.linalg.norm(table, axis=1).mean() * table[3] / np.linalg.norm(table[3])
    return short + noise(table)


def nearly_mean(table):
    """As transformers' `resize_token_embeddings` draws new rows."""
    return table.mean(0) + noise(table)


def noise(table):
    return 3e-5 * table.std() * np.random.default_rng(0).normal(size=(2, table.shape[1]))


NEVER_TRAINED = {
    "zero": (set_rows(0.0, START, END), "'<|im_start|>' (zero), '<|im_end|>' (zero)", 2),
    "one": (set_rows(0.0, END), "'<|im_end|>' (zero)", 1),
    "tiny": (set_rows(1e-9, START, END), "of the usual norm", 2),
    "decayed": (set_rows(lambda t: 1e-3 * t[[START, END]], START, END), "of the usual norm", 2),
    "equal": (set_rows(mean, START, END), "'<|im_start|>' (as '<|im_end|>'), '<|im_end|>' (as '<|im_start|>')", 2),
    "nearly equal": (set_rows(nearly_mean, START, END), "'<|im_start|>' (as '<|im_end|>')", 2),
    "short": (set_rows(short_mean, START, END), "'<|im_start|>' (as '<|im_end|>')", 2),
    "as the end of text": (set_rows(lambda t: t[EOT], START), "'<|im_start|>' (as '<|endoftext|>')", 2),
    "end of text": (set_rows(0.0, EOT), "'<|endoftext|>' (zero)", 1),
}


@pytest.mark.parametrize("family", EMBEDDING)
@pytest.mark.parametrize("kind", NEVER_TRAINED)
def test_rows_that_were_never_trained(base, family, kind):
    change, listed, count = NEVER_TRAINED[kind]
    text = said(base(family, embedding=change))
    assert (
        f"no trained row of its own for {count} special token{'s' if count > 1 else ''} of the data" in text
        and listed in text
    )
    module = {"gpt2": "wte (to read them: the head, which is tied to it", "llama": "embed_tokens, or"}[family]
    assert f"--modules-to-save {module}" in text


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"used": (EOT, 50)}, None),  # not in the data
        ({"used": (START, 50), "learned": (50,)}, "'<|im_start|>' (zero)"),  # read, never to be said
        ({"used": (50, 60, 61)}, None),
        ({"trained": LEAF.values()}, None),
        ({"trained": ("transformer/wpe/embedding", "lm_head/kernel")}, "'<|im_end|>'"),
    ],
)
@pytest.mark.parametrize("family", EMBEDDING)
def test_only_what_the_data_has_and_the_run_does_not_train(base, family, ids, expected):
    text = said(base(family, embedding=set_rows(0.0, START, END)), **ids)
    assert text is None if expected is None else expected in text
    assert text is None or "tied" not in text or 50 not in ids.get("learned", ())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "lm_head"),
        ({"trained": ("model/embed_tokens/embedding",)}, "lm_head"),
        ({"trained": ("lm_head/kernel",)}, None),
        ({"learned": (50,)}, None),
        ({"learned": (EOT, 50)}, None),
    ],
)
def test_a_head_of_its_own(base, options, expected):
    text = said(base("llama", head=set_rows(0.0, START, END)), **options)
    assert text is None if expected is None else f"--modules-to-save {expected}, or" in text and "'<|im_end|>'" in text


def test_both_tables(base):
    zero = set_rows(0.0, START, END)
    assert "--modules-to-save embed_tokens lm_head, or" in said(base("llama", embedding=zero, head=zero))


@pytest.mark.parametrize(
    "change",
    [
        set_rows(0.0, 60, 61),  # words, not special tokens
        set_rows(lambda t: 0.3 * t[[START]], START),  # rare
        set_rows(lambda t: t[[START]] + 0.05 * t[[50]], END),  # alike, as the marks of the embedded models
    ],
)
@pytest.mark.parametrize("family", EMBEDDING)
def test_no_false_alarm(base, family, change):
    assert said(base(family, embedding=change)) is None


def test_padding_with_a_copy_of_the_end_of_text(base):
    """A common way to make a pad token; the end of text is trained."""
    directory = base("llama", embedding=set_rows(lambda t: t[EOT], START))
    tokenizer = load_tokenizer(directory)
    tokenizer.pad_token = "<|im_start|>"
    model = model_from_config(read_config(directory), dtype=jnp.float32)
    assert untrained_tokens(directory, model, tokenizer, used={EOT}, learned={EOT}, trained=set()) is None


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_the_embedded_models_know_their_marks(name):
    assert said(Path(__file__).parents[1] / "examples" / "assets" / name) is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokens_that_transformers_added(made, tmp_path, family):
    """Its own resizing, of both tables."""
    model = transformers.AutoModelForCausalLM.from_pretrained(made[family], dtype=torch.float32)
    tokenizer = load_tokenizer(made[family])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    ids = tokenizer.convert_tokens_to_ids(["<a>", "<b>"])
    assert "'<a>' (as '<b>'), '<b>' (as '<a>')" in said(tmp_path / "m", used=(START, *ids), learned=(END, *ids))
    assert said(tmp_path / "m") is None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_in_16_bits(base, dtype):
    directory = base("llama", embedding=set_rows(mean, START, END))
    tensors = {name: array.astype(dtype) for name, array in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "2 special tokens" in said(directory)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("family", "options", "warned"),
    [
        ("gpt2", {}, True),
        ("gpt2", {"pack": True}, True),
        ("gpt2", {"modules_to_save": ("wte",)}, False),
        ("gpt2", {"targets": ("c_attn", "wte")}, False),
        ("llama", {"quantize": "nf4", "form": "stacked"}, True),
        ("llama", {"modules_to_save": ("embed_tokens", "lm_head")}, False),
        ("llama", {"modules_to_save": ("embed_tokens",)}, False),  # its head is trained
        ("llama", {"template": "alpaca"}, False),
    ],
)
def test_finetune_says_it(base, tmp_path, capsys, family, options, warned):
    directory = base(family, embedding=set_rows(0.0, START, END))
    records = CHATS if options.get("template") != "alpaca" else tiny.records(6)
    data = tiny.write_records(tmp_path / "chats.jsonl", records)
    config = {"template": "chat", "steps": 1, "batch_size": 2, "rank": 2, "eval_fraction": 0, "quiet": True, **options}
    jlora.finetune(
        jlora.FinetuneConfig(model=str(directory), data=data, output=str(tmp_path / "run"), max_length=64, **config)
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "no trained row of its own for" in line]
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith("warning: the base has no trained row of its own for 2 special tokens")


def test_inspect_says_it(base, tmp_path, capsys):
    directory = base("gpt2", embedding=set_rows(0.0, START, END))
    data = tiny.write_records(tmp_path / "chats.jsonl", CHATS)
    text = tmp_path / "text.txt"
    text.write_text(tiny.text() + "<|im_end|>")
    model, params = jlora.load(directory, dtype=jnp.float32)
    for name, more in (("with", {"modules_to_save": ("wte",)}), ("without", {})):
        config = jlora.LoraConfig(rank=2, targets=("c_attn",), **more)
        adapted = jlora.add_lora(params, config, key=jax.random.key(0))
        jlora.save_adapter(tmp_path / name, adapted, config=config, base_model=str(directory))

    def err(*flags):
        capsys.readouterr()
        cli.main(["inspect", "--max-length", "64", *map(str, flags)])
        return capsys.readouterr().err

    chats = ("--data", data, "--template", "chat")
    assert "note: the base has no trained row of its own for 2 special tokens" in err("--model", directory, *chats)
    assert "no trained row of its own for 1 special token of the data: '<|im_end|>'" in err(
        "--model", directory, "--data", text
    )
    assert err("--model", find(directory), "--data", tiny.write_records(tmp_path / "a.jsonl", tiny.records(4))) == ""
    assert "no trained row of its own for" in err("--adapter", tmp_path / "without", *chats)
    assert "no trained row of its own for" not in err("--adapter", tmp_path / "with", *chats)
