"""Commands on a run's adapter take the run's settings, and say so on standard error."""

import json
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import peft
import pytest
import tiny
import transformers

import jlora
from jlora.files.hf import AdapterBeside
from jlora.files.run_settings import FILE, RunSettings
from jlora.storage.checkpoint_files import base_fingerprint

pytestmark = pytest.mark.usefixtures("quick_compilation")

OTHER = {"template": "chat", "seed": 3, "eval_fraction": 0.25, "quantize": "nf4", "max_length": 48, "pack": True}
SETTINGS = RunSettings(
    template="chat", data="d.jsonl", eval_data=None, eval_fraction=0.1, seed=3, max_length=48, pack=False, quantize=None
)


def train(model, data, output, **changes):
    config = {"steps": 3, "batch_size": 4, "rank": 4, "learning_rate": 1e-2, "quiet": True, **changes}
    return jlora.finetune(jlora.FinetuneConfig(model=model, data=data, output=str(output), **config))


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, llama_dir, records_file):
    """A run in which nothing has its default: (directory, result)."""
    output = tmp_path_factory.mktemp("runs") / "chat"
    return output, train(llama_dir, records_file, output, **OTHER)


def loss(said):
    return json.loads(said.out)["eval_loss"]


@pytest.mark.slow
def test_the_file(chat_run, records_file, llama_dir):
    output, _ = chat_run
    fields = json.loads((output / "adapter" / FILE).read_text())
    base = base_fingerprint(Path(llama_dir))
    assert fields == {"version": 1, "data": records_file, "eval_data": None, "base": base, **OTHER}
    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(llama_dir), output / "adapter")


@pytest.mark.slow
def test_of_raw_text(tmp_path, gpt2_dir, text_file, call):
    result = train(gpt2_dir, text_file, tmp_path / "r", eval_fraction=0.3)
    settings = RunSettings.read(result.adapter_dir)
    assert settings == RunSettings(
        template=None,
        data=text_file,
        eval_data=None,
        eval_fraction=0.3,
        seed=0,
        max_length=64,
        pack=False,
        quantize=None,
        base=base_fingerprint(Path(gpt2_dir)),
    )
    said = call("evaluate", "--adapter", result.adapter_dir)
    assert loss(said) == pytest.approx(result.eval_loss, rel=1e-6)
    said = call("generate", "--adapter", result.adapter_dir, "--prompts", "The keeper", "--max-new-tokens", 2)
    assert "The keeper" in said.out and "template" not in said.err


@pytest.mark.slow
def test_evaluate_gives_the_runs_own_figure(chat_run, records_file, call):
    output, result = chat_run
    bare = call("evaluate", "--adapter", output / "adapter")
    assert loss(bare) == pytest.approx(result.eval_loss, rel=1e-6)
    assert bare.err == (
        f"note: as in the run that trained this ({FILE}): data {records_file}, eval_fraction 0.25, template chat, "
        "max_length 48, seed 3, quantize nf4\n"
    )
    with_data = call("evaluate", "--adapter", output / "adapter", "--data", records_file)
    assert loss(with_data) == loss(bare) and "seed 3" in with_data.err
    told = call(
        *("evaluate", "--adapter", output / "adapter", "--data", records_file, "--template", "chat", "--seed", 3),
        *("--quantize", "nf4", "--eval-fraction", 0.25, "--max-length", 48),
    )
    assert (loss(told), told.err) == (loss(bare), "")


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--seed", 0),
            "seed 0 (it was 3); the figures do not compare with the run's, and records of this validation split",
        ),
        (
            ("--eval-fraction", 0.5),
            "eval_fraction 0.5 (it was 0.25); the figures do not compare with the run's, and records",
        ),
        (("--template", "alpaca"), "template alpaca (it was chat); the figures do not compare with the run's\n"),
        (("--quantize", "none"), "quantize none (it was nf4); the figures do not compare with the run's\n"),
        (("--max-length", 26), "max_length 26 (it was 48); the figures do not compare with the run's\n"),
    ],
)
def test_flags_win_and_what_differs_is_said(flags, says, chat_run, records_file, call):
    output, result = chat_run
    said = call("evaluate", "--adapter", output / "adapter", "--data", records_file, *flags)
    assert f"note: other than in the run that trained this: {says}" in said.err
    assert loss(said) != pytest.approx(result.eval_loss, rel=1e-6)


@pytest.mark.slow
def test_the_data_of_a_run_elsewhere(chat_run, records_file, tmp_path, call):
    """An adapter that was copied, data that moved, and other data, whose split is nobody's."""
    output, result = chat_run
    shutil.copytree(output / "adapter", tmp_path / "copied")
    assert loss(call("evaluate", "--adapter", tmp_path / "copied", "--data", records_file)) == pytest.approx(
        result.eval_loss
    )
    settings = RunSettings.read(output / "adapter")
    moved = tmp_path / "tasks.jsonl"
    shutil.copy(records_file, moved)
    (tmp_path / "copied" / FILE).unlink()
    RunSettings(**vars(settings) | {"data": "/nowhere/tasks.jsonl"}).write(tmp_path / "copied")
    assert loss(call("evaluate", "--adapter", tmp_path / "copied", "--data", moved)) == pytest.approx(result.eval_loss)
    other = tiny.write_records(tmp_path / "other.jsonl", tiny.records(seed=5))
    said = call("evaluate", "--adapter", tmp_path / "copied", "--data", other)
    assert "seed" not in said.err and "template chat" in said.err


@pytest.mark.slow
def test_a_file_to_evaluate_on(llama_dir, records_file, tmp_path, call):
    held_out = tiny.write_records(tmp_path / "held_out.jsonl", tiny.records(count=6, seed=9))
    result = train(llama_dir, records_file, tmp_path / "r", eval_data=held_out)
    expected = pytest.approx(result.eval_loss, rel=1e-6)
    assert loss(call("evaluate", "--adapter", result.adapter_dir)) == expected
    assert loss(call("evaluate", "--adapter", result.adapter_dir, "--data", records_file)) == expected
    assert loss(call("evaluate", "--adapter", result.adapter_dir, "--data", held_out)) == expected


@pytest.mark.slow
def test_a_run_that_held_nothing_out(llama_dir, records_file, tmp_path, fails):
    result = train(llama_dir, records_file, tmp_path / "r", eval_fraction=0.0)
    assert "all of the data were trained on" in fails("evaluate", "--adapter", result.adapter_dir)


@pytest.mark.slow
def test_compare_and_generate(chat_run, records_file, tmp_path, call):
    output, result = chat_run
    flags = ("--adapter", output / "adapter", "--prompts", "Write salt.", "--max-new-tokens", 3)
    said = call("compare", *flags, "--data", records_file, "--seed", 11, "--output", tmp_path / "c")
    found = json.loads((tmp_path / "c/compare.json").read_text())
    assert found["held_out"]["adapted"]["loss"] == pytest.approx(result.eval_loss, rel=1e-6)
    assert "template chat" in said.err and "quantize nf4" in said.err
    raw = call("compare", *flags, "--data", records_file, "--template", "none", "--output", tmp_path / "n")
    of_raw = json.loads((tmp_path / "n/compare.json").read_text())
    assert of_raw["held_out"] == found["held_out"], "--template none is about the prompts"
    assert of_raw["prompts"] != found["prompts"] and "template none (it was chat)" in raw.err
    bare, told = (
        call("generate", *flags, "--temperature", 0, *more)
        for more in ((), ("--template", "chat", "--quantize", "nf4"))
    )
    assert bare.out == told.out and told.err == "" and "template chat, quantize nf4" in bare.err


@pytest.mark.slow
def test_merging_a_packed_run(chat_run, llama_dir, records_file, tmp_path, call):
    """The merged checkpoint is the model that was trained, and says for itself how it is evaluated."""
    output, result = chat_run
    said = call("merge", "--adapter", output / "adapter", "--output", tmp_path / "m")
    assert "quantize nf4" in said.err
    assert loss(call("evaluate", "--model", tmp_path / "m")) == pytest.approx(result.eval_loss, rel=1e-5)
    call("merge", "--adapter", output / "adapter", "--output", tmp_path / "dense", "--quantize", "none")
    assert loss(call("evaluate", "--model", tmp_path / "dense")) != pytest.approx(result.eval_loss, rel=1e-5)
    call("export", "--adapter", output / "adapter", "--to", "transformers", "--output", tmp_path / "e")
    exported, merged = (jlora.load(tmp_path / name, dtype=jnp.float32)[1] for name in "em")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), exported, merged)))


@pytest.mark.slow
def test_several_adapters(chat_run, llama_dir, records_file, tmp_path, call, fails):
    output, _ = chat_run
    for name in "ab":
        shutil.copytree(output / "adapter", tmp_path / "two" / name)
    flags = ("--adapter", tmp_path / "two", "--prompts", "Write salt.", "--max-new-tokens", 2)
    said = call("generate", *flags)
    assert "template chat, quantize nf4" in said.err and "a: " in said.out and "b: " in said.out
    settings = RunSettings.read(output / "adapter")
    RunSettings(**vars(settings) | {"template": "alpaca"}).write(tmp_path / "two" / "b")
    assert "different settings of `template` (a: chat, b: alpaca)" in fails("generate", *flags)
    call("generate", *flags, "--template", "alpaca")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:40], "is not valid JSON"),
        (lambda text: "[]", "must hold a JSON object"),
        (lambda text: text.replace('"seed": 3', '"seed": "3"'), "`seed` must be an integer from 0; got '3'"),
        (lambda text: text.replace('"chat"', "3"), "`template` must be a template's name or null; got 3"),
        (lambda text: text.replace('"pack"', '"packed"'), "`pack` is missing; `packed` is no setting"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "`version`"),
        (lambda text: text.replace("0.1", "1.0"), "`eval_fraction` must be in [0, 1); got 1.0"),
        (lambda text: text.replace("48", "true"), "`max_length` must be an integer from 2; got True"),
    ],
)
def test_a_damaged_file_is_refused_by_name(change, says, tmp_path):
    SETTINGS.write(tmp_path)
    (tmp_path / FILE).write_text(change((tmp_path / FILE).read_text()))
    with pytest.raises(ValueError) as error:
        RunSettings.read(tmp_path)
    assert FILE in str(error.value) and says in str(error.value)


def test_adapters_of_others_have_none(tmp_path):
    assert RunSettings.read(tmp_path) is None
    SETTINGS.write(tmp_path)
    assert RunSettings.read(tmp_path) == SETTINGS


def test_push_tells_no_paths(chat_run, tmp_path, call):
    output, _ = chat_run
    said = call("push", output, "user/name", "--dry-run")
    assert FILE in said.out
    from jlora.cli.push import Push, contents
    from jlora.publish.card import read_publication

    shared = json.loads(contents(Push(directory=str(output), repo="x"), read_publication(output), tmp_path)[FILE])
    base = RunSettings.read(output / "adapter").base
    assert shared == {"version": 1, "data": None, "eval_data": None, "base": base, **OTHER}


# Which base


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """Another model of the same shapes and names, so that every adapter fits it."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("other") / "llama", tiny.LLAMA, chat=tiny.CHATML, seed=1)


def base_notes(said):
    return [line for line in said.err.splitlines() if line.startswith("note: the adapter ")]


@pytest.fixture
def moving_base(llama_dir, tmp_path):
    """(directory of a base of its own, an adapter of it without a run, the same with the settings of one)."""
    directory = shutil.copytree(llama_dir, tmp_path / "base")
    _, params = jlora.load(directory, dtype="float32")
    config = jlora.LoraConfig(rank=2, targets=("q_proj",))
    params = jlora.add_lora(params, config, key=jax.random.key(0))
    for name in ("peft", "run"):
        jlora.save_adapter(tmp_path / name, params, config=config, base_model=str(directory))
    RunSettings(**vars(SETTINGS) | {"base": base_fingerprint(directory)}).write(tmp_path / "run")
    return directory, tmp_path / "peft", tmp_path / "run"


PROMPT = ("--prompts", "Write salt.", "--max-new-tokens", 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", "run"])
def test_an_adapter_on_another_base(kind, moving_base, other_dir, tmp_path, call):
    """LlamaFactory#6105, peft#1932: it fits, and gives other answers."""
    directory, *adapters = moving_base
    adapter = adapters[kind == "run"]
    moved = shutil.copytree(directory, tmp_path / "moved")
    for model in (None, directory, f"{directory}/", moved, tmp_path / "peft" / ".." / "base"):
        said = call("generate", "--adapter", adapter, *PROMPT, *(("--model", model) if model else ()))
        assert base_notes(said) == [], model
    said = call("generate", "--adapter", adapter, *PROMPT, "--model", other_dir)
    expected = f"was trained on {str(directory)!r}, and {other_dir!r} has another config.json or other weights"
    assert base_notes(said) == [f"note: the adapter {expected}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "model", "noted"),
    [
        ("org/name", "base", True), ("/not/there", "base", True), ("", "base", False), ("base", "base", False),
    ],
)  # fmt: skip
def test_an_adapter_of_a_base_that_is_not_here(named, model, noted, moving_base, call):
    directory, adapter, _ = moving_base
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = str(directory) if named == "base" else named
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
    said = call("generate", "--adapter", adapter, *PROMPT, "--model", directory)
    assert base_notes(said) == noted * [
        f"note: the adapter says that it was trained on {named!r}, and nothing says that {str(directory)!r} is the same"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_base_that_changed_in_place(file, moving_base, other_dir, call):
    directory, without, adapter = moving_base
    if file == "config.json":
        (directory / file).write_text((directory / file).read_text().replace("1e-06", "1e-05") + " ")
    else:
        shutil.copy(f"{other_dir}/{file}", directory / file)
    (noted,) = base_notes(call("generate", "--adapter", adapter, *PROMPT))
    assert noted.endswith(
        f"trained on {str(directory)!r} as it was then; its config.json or its weights have changed since"
    )
    assert base_notes(call("generate", "--adapter", without, *PROMPT)) == [], "nothing is known of what it was"


@pytest.mark.slow
def test_every_command_says_it(chat_run, other_dir, records_file, tmp_path, call):
    output, _ = chat_run
    flags = ("--adapter", output / "adapter", "--model", other_dir)
    for command in (
        ("evaluate",),
        ("compare", *PROMPT),
        ("generate", *PROMPT),
        ("merge", "--output", tmp_path / "m"),
        ("export", "--to", "peft", "--output", tmp_path / "e"),
    ):
        assert len(base_notes(call(*command, *flags))) == 1, command
    assert RunSettings.read(tmp_path / "m").base is None
    assert base_notes(call("evaluate", "--model", tmp_path / "m")) == []


@pytest.mark.slow
def test_each_of_several_adapters_is_named(moving_base, other_dir, tmp_path, call):
    directory, *adapters = moving_base
    for name, adapter in zip("ab", adapters, strict=True):
        shutil.copytree(adapter, tmp_path / "two" / name)
    flags = ("generate", "--adapter", tmp_path / "two", *PROMPT, "--template", "none")
    assert base_notes(call(*flags)) == []
    noted = base_notes(call(*flags, "--model", other_dir))
    assert [line.partition(" was trained")[0] for line in noted] == ["note: the adapter 'a'", "note: the adapter 'b'"]


# A model and an adapter in one directory


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "index"]
)
@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_no_adapter_is_written_beside_a_model(weights, layout, llama_dir, tmp_path):
    """peft#1381: transformers reads both as the model with the adapter on, `jlora.load` the model alone."""
    model, params = jlora.load(llama_dir, dtype="float32")
    config = jlora.LoraConfig(rank=2, targets=("q_proj",))
    params = jlora.add_lora(params, config, key=jax.random.key(0))

    def save(directory):
        if layout == "peft":
            return jlora.save_adapter(directory, params, config=config, base_model=llama_dir)
        return jlora.save_mlx_adapter(directory, params, config=config, model=model, base_model=llama_dir)

    def make(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        return tmp_path / name

    weights = "model.safetensors.index.json" if weights == "index" else weights
    taken = make("taken", "config.json", weights)
    with pytest.raises(FileExistsError, match=r"taken' holds a model.*directory of its own"):
        save(taken)
    assert sorted(p.name for p in taken.iterdir()) == sorted(["config.json", weights])
    for number, files in enumerate(
        ([], ["config.json"], ["config.json", "tokenizer.json", "optimizer.pt", "training_args.bin"])
    ):
        directory = make(str(number), *files)
        save(directory)
        save(directory)


@pytest.mark.slow
def test_a_model_with_an_adapter_beside_it(llama_dir, tmp_path, call, fails, recwarn):
    both, alone = shutil.copytree(llama_dir, tmp_path / "both"), tmp_path / "alone"
    _, params = jlora.load(both, dtype="float32")
    assert not [w for w in recwarn if w.category is AdapterBeside]
    config = jlora.LoraConfig(rank=2, targets=("q_proj",))
    params = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(alone, params, config=config, base_model=str(both))
    for file in alone.iterdir():
        shutil.copy(file, both)
    with pytest.warns(
        AdapterBeside, match=r"both' holds a model and an adapter, which is not on: .*load_adapter.*--adapter"
    ):
        jlora.load(both, dtype="float32")
    with pytest.warns(AdapterBeside):
        call("generate", "--model", both, *PROMPT)
    recwarn.clear()
    assert base_notes(call("generate", "--adapter", both, *PROMPT)) == []
    call("generate", "--model", both, "--adapter", alone, *PROMPT)
    assert not [w for w in recwarn if w.category is AdapterBeside]
    assert "already" in fails("merge", "--adapter", alone, "--output", both)
    assert "exists" in fails("export", "--to", "peft", "--adapter", alone, "--output", both)


# How to sample


@pytest.mark.slow
def test_sampling_as_the_checkpoint_says(llama_dir, tmp_path, call):
    model = shutil.copytree(llama_dir, tmp_path / "m")
    flags = ("generate", "--model", model, "--prompts", "The keeper", "--max-new-tokens", 4)

    def says(**fields):
        (model / "generation_config.json").write_text(json.dumps(fields))
        return call(*flags)

    likeliest = call(*flags, "--temperature", 0).out
    said = says(do_sample=True, top_k=1, temperature=0.7, repetition_penalty=1.05)
    assert said.out == likeliest
    assert said.err == (
        "note: as generation_config.json says: temperature 0.7, top_k 1\n"
        "note: left out of generation_config.json: repetition_penalty 1.05\n"
    )
    assert "temperature" not in call(*flags, "--temperature", 0).err
    for fields in ({}, {"top_k": 1}, {"do_sample": False, "top_k": 1}, {"do_sample": True, "repetition_penalty": 1.0}):
        assert says(**fields).err == ""


# A tokenizer beside the adapter


@pytest.mark.slow
def test_an_adapters_own_tokenizer(gpt2_dir, tmp_path, call):
    """TRL gives a base model a chat template and saves it beside the adapter."""
    model, params = jlora.load(gpt2_dir, dtype=jnp.float32)
    config = jlora.LoraConfig(rank=2)
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(tmp_path / "a", adapted, config=config, base_model=gpt2_dir)
    tiny.tokenizer(tiny.CHATML).save_pretrained(tmp_path / "a")
    said = call("merge", "--adapter", tmp_path / "a", "--output", tmp_path / "m")
    assert f"the tokenizer is the one in {tmp_path / 'a'}, which differs from the base's" in said.err
    assert (tmp_path / "m/chat_template.jinja").read_text() == tiny.CHATML
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [0, 2]
    same = shutil.copytree(tmp_path / "a", tmp_path / "same")
    tiny.tokenizer().save_pretrained(same)
    (same / "chat_template.jinja").unlink()
    said = call("merge", "--adapter", same, "--output", tmp_path / "s")
    assert "tokenizer" not in said.err


@pytest.fixture
def grown(gpt2_dir, tmp_path):
    """An adapter whose tokenizer has tokens that were added, and no rows: the usual `<pad>`, and a word."""
    model, params = jlora.load(gpt2_dir, dtype=jnp.float32)
    config = jlora.LoraConfig(rank=2)
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(tmp_path / "a", adapted, config=config, base_model=gpt2_dir)
    tokenizer = jlora.load_tokenizer(gpt2_dir)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["lighthouse"])
    tokenizer.chat_template = tiny.CHATML
    tokenizer.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


NO_ROW = "a text that holds '<pad>' is refused, for which the embedding has no row (nor for 1 more of its tokens)"


@pytest.mark.slow
def test_a_tokenizer_with_tokens_that_no_text_holds_is_taken(grown, text_file, tmp_path, call):
    for command in (
        ("generate", "--prompts", "The keeper", "--max-new-tokens", 2),
        ("generate", "--prompts", "hi", "--template", "chat", "--max-new-tokens", 2),
        ("evaluate", "--data", text_file, "--split", "all"),
        ("merge", "--output", tmp_path / "m"),
    ):
        assert NO_ROW in call(*command, "--adapter", grown).err
    assert (tmp_path / "m/chat_template.jinja").read_text() == tiny.CHATML
    assert "<pad>" in (tmp_path / "m/tokenizer.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["lighthouse", "<pad>"])
def test_one_that_a_text_holds_is_refused(grown, word, tmp_path, fails):
    (tmp_path / "x.txt").write_text(f"the keeper of the {word} wrote\n" * 40)
    for command in (
        ("generate", "--prompts", f"the {word}", "--max-new-tokens", 2),
        ("evaluate", "--data", tmp_path / "x.txt", "--split", "all"),
    ):
        said = fails(*command, "--adapter", grown)
        assert said.startswith("Token id") and ("own tokenizer?" in said or repr(word) in said.splitlines()[-1])


@pytest.mark.slow
def test_a_gguf_model_is_without_a_pad_that_has_no_row(grown, gpt2_dir, tmp_path, call, fails):
    said = fails("export", "--adapter", grown, "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert "'lighthouse'" in said and "the embedding has" in said
    tokenizer = jlora.load_tokenizer(gpt2_dir)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(grown)
    call("export", "--adapter", grown, "--to", "gguf", "--output", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    rows = json.loads((Path(gpt2_dir) / "config.json").read_text())["vocab_size"]
    assert len(fields["tokenizer.ggml.tokens"].data) == rows
    assert "tokenizer.ggml.padding_token_id" not in fields
