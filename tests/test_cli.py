"""The `jlora` command: its flags and help, each command on a tiny run, and what it says when something is wrong."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
import yaml
from command import run

import jlora
from jlora import cli
from jlora.cli.config_file import joined, positional, with_config_file
from jlora.cli.evaluate import Evaluate
from jlora.runs import FinetuneConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

COMMANDS = "finetune evaluate compare generate chat merge export push quantize inspect memory prepare report".split()
PLACES = {
    "directory": "DIR",
    "repo": "REPO",
    "path": "PATH",
    "runs": "RUN",
}  # what is given without a flag, as help calls it
# As scripts give them; design.md promises these names.
FLAGS = (
    "--eval-fraction 0.2 --steps 6 --rank 4 --alpha 8 --dropout 0.1 --targets c_attn c_fc --learning-rate 1e-2 "
    "--batch-size 2 --accumulate 2 --max-length 32 --seed 3 --checkpoint-every 3 --eval-every 2"
).split()


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, gpt2_dir, text_file):
    """OUTPUT of a run by flags."""
    output = tmp_path_factory.mktemp("cli") / "run"
    assert run("finetune", "--model", gpt2_dir, "--data", text_file, "--output", output, *FLAGS) == 0
    return output


# Help and usage


def test_overview(call, capsys):
    said = call("--help").out
    assert all(f"jlora {name} " in said for name in COMMANDS)
    assert run() == cli.USAGE_ERROR
    assert capsys.readouterr().out == said


def test_version(call):
    assert call("--version").out == f"jlora {jlora.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_flag(name, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    said = call(name, "--help").out
    options, _ = cli._commands()[name]
    assert options.__doc__.split("\n")[0] in said
    assert "--config FILE.yaml" in said
    # A flag and its values, then the explanation, then the default.
    lines = [line.strip("│| ") for line in said.splitlines()]
    places = {field: metavar for field, metavar in PLACES.items() if field in positional(options)}
    begins = ("--", *(f"{metavar} " for metavar in places.values()))
    starts = [i for i, line in enumerate(lines) if line.startswith(begins) and not line.startswith("--config")]
    texts = {" ".join(lines[i:end]) for i, end in zip(starts, [*starts[1:], len(lines)], strict=True)}
    for field in dataclasses.fields(options):
        flag = places.get(field.name, f"--{field.name.replace('_', '-')}")
        (text,) = [text for text in texts if re.match(f"{flag}[ ,]", text)]
        explained, rest = re.split(r"\((?=default: |required)", text, maxsplit=1)
        words = re.findall(r"(?<![-\w{|,])[A-Za-z][a-z]+\b", explained.replace(f"--no-{flag[2:]}", ""))
        assert len(words) >= 2, text


def test_unknown_command(fails):
    assert fails("finetun", code=cli.USAGE_ERROR) == "no command 'finetun'; did you mean 'finetune'?\n"
    assert "finetune, evaluate, compare" in fails("xyz", code=cli.USAGE_ERROR)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("finetune --model m --data d.txt --output o --rnak 8", ["Unrecognized options: --rnak, 8", "Perhaps you meant: --rank"]),
        ("finetune --model m --data d.txt --output o --rank eight", ["Error parsing --rank", "'eight'"]),
        ("finetune --model m", ["Missing from jlora finetune: --data STR", "--output STR"]),
        ("inspect --model m --data d.txt --split test", ["invalid choice 'test' for argument '--split'", "'validation'"]),
    ],
    ids=["unknown flag", "not a number", "missing flags", "not a choice"],
)  # fmt: skip
def test_wrong_usage(flags, says, capsys):
    assert run(*flags.split()) == cli.USAGE_ERROR
    said = capsys.readouterr()
    shown = " ".join(re.sub("-{5,}", "", said.err).split())
    assert [words for words in says if words not in shown] == [] and said.out == ""


def test_repeated_flags_are_one_list():
    flags = ["--adapter", "a", "b", "--base", "--metrics=f1", "--data", "x", "--adapter", "c", "--metrics", "wer"]
    expected = ["--base", "--adapter", "a", "b", "c", "--metrics", "f1", "wer", "--data", "x"]
    assert joined(Evaluate, flags) == expected
    two = ["--data", "a.jsonl", "--targets=q_proj", "--data", "b.jsonl", "--no-pack", "--targets", "v_proj"]
    assert joined(FinetuneConfig, two) == ["--no-pack", "--data", "a.jsonl", "b.jsonl", "--targets", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("finetune --rank 8 --output o --rank=16", "--rank is given twice, as 8 and as 16. Leave one of them."),
        ("finetune --pack --no-pack --output o", "--pack is given twice, as --pack and as --no-pack."),
        ("finetune --batch-size 2 --batch_size 4", "--batch-size is given twice, as 2 and as 4."),
        ("generate --adapter a --adapter b", "--adapter is given twice, as a and as b."),
    ],
)
def test_flags_of_one_value_given_two(flags, says, fails):
    assert says in fails(*flags.split())


def test_flags_given_twice_alike():
    flags = ["--rank", "8", "--pack", "--rank=8", "--pack", "--dtype", "float32"]
    assert joined(FinetuneConfig, flags) == flags


def test_out_of_range_flag(capsys):
    assert run("finetune", "--model", "m", "--data", "d.txt", "--output", "o", "--batch-size", 0) == cli.USAGE_ERROR
    assert "`batch_size` must be at least 1; got 0" in capsys.readouterr().err


# Fine-tuning


def test_finetune(finetuned, gpt2_dir):
    log = tiny.read_log(finetuned)
    assert [entry["step"] for entry in log] == list(range(7))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 2, 4, 6]
    written = json.loads((finetuned / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == gpt2_dir
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 8, 0.1)
    assert sorted(written["target_modules"]) == ["c_attn", "c_fc"]


@pytest.mark.slow
def test_the_config_of_a_run_is_a_config_file(finetuned, tmp_path, call):
    """Flags win over it, wherever they stand, and `--config=` reads like `--config `."""
    again = tmp_path / "again"
    said = call("finetune", "--output", again, "--config", finetuned / "config.yaml").out
    assert "before training" in said
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (finetuned / "adapter" / name).read_bytes()
    said = call("finetune", f"--config={finetuned / 'config.yaml'}", "--resume", "--output", again).out
    assert "resuming after step 6 of 6" in said
    assert call("finetune", "--config", finetuned / "config.yaml", "--resume", "--output", again, "--quiet").out == ""


def test_config_file_becomes_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: d.txt\nlearning-rate: 1e-4\nbatch_size: 2\ntargets: [q_proj, v_proj]\nexclude: []\npack: true\n"
        "resume: false\neval_data: null\n"
    )
    flags = with_config_file(jlora.FinetuneConfig, ["--config", str(path), "--batch-size", "4"])
    assert flags == (
        "--model m --data d.txt --learning-rate 1e-4 --batch-size 2 --targets q_proj v_proj --pack --no-resume "
        "--batch-size 4"
    ).split()  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rte: 1e-4\n", "sets 'learning_rte', which is no flag; did you mean 'learning_rate'?"),
        ("zzz: 1\n", "sets 'zzz', which is no flag."),
        ("- model\n- data\n", "must map names to values; got a list."),
        ("", "must map names to values; got nothing."),
        ("model: [\n", "is not valid YAML"),
        (None, "There is no config file"),
    ],
    ids=["misspelt", "unknown", "list", "empty", "broken", "missing"],
)
def test_wrong_config_file(text, says, tmp_path, fails):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    assert says in fails("finetune", "--config", path)


def test_config_without_a_file(fails):
    assert "--config run.yaml" in fails("finetune", "--config")


# The other commands, on what the run left


def evaluate_flags(text_file):
    return ["--data", text_file, "--eval-fraction", 0.2, "--max-length", 32, "--batch-size", 2, "--seed", 3]


def test_evaluate(finetuned, text_file, tmp_path, call):
    path = tmp_path / "new" / "report.json"
    flags = evaluate_flags(text_file)
    said = call("evaluate", "--adapter", finetuned / "adapter", *flags, "--output", path).out
    report = json.loads(said)
    assert json.loads(path.read_text()) == report
    assert list(report) == [
        "model", "adapter", "data", "split", "eval_loss", "perplexity", "batches", "supervised_tokens", "batch_size",
        "max_length", "rows", "widths", "efficiency", "truncated", "dropped",
    ]  # fmt: skip
    log = tiny.read_log(finetuned)
    assert report["eval_loss"] == pytest.approx(log[-1]["eval_loss"], rel=1e-6)
    assert report["perplexity"] == pytest.approx(np.exp(report["eval_loss"]))
    assert (report["split"], report["batch_size"], report["max_length"]) == ("validation", 2, 32)
    base = json.loads(call("evaluate", "--model", report["model"], *flags).out)
    assert base["adapter"] is None
    assert base["eval_loss"] == pytest.approx(log[0]["eval_loss"], rel=1e-6)
    assert base["supervised_tokens"] == report["supervised_tokens"] > 0


@pytest.mark.slow
def test_compare(finetuned, text_file, tmp_path, call):
    flags = ["--prompts", "The keeper", "Wind [and] rain", "--max-new-tokens", 5, "--output", tmp_path / "new"]
    said = call("compare", "--adapter", finetuned / "adapter", *evaluate_flags(text_file), *flags).out
    assert "The keeper" in said and "Wind [and] rain" in said and "perplexity" in said
    report = json.loads((tmp_path / "new" / "compare.json").read_text())
    log = tiny.read_log(finetuned)
    assert report["held_out"]["base"]["loss"] == pytest.approx(log[0]["eval_loss"], rel=1e-6)
    assert report["held_out"]["adapted"]["loss"] == pytest.approx(log[-1]["eval_loss"], rel=1e-6)
    assert [prompt["prompt"] for prompt in report["prompts"]] == ["The keeper", "Wind [and] rain"]
    assert all(prompt["kl"] > 0 and prompt["l2"] > 0 for prompt in report["prompts"])
    markdown = (tmp_path / "new" / "compare.md").read_text()
    assert "## The keeper" in markdown and "| base | adapted |" in markdown
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {"compare.json", "compare.md", "compare.html", "preference.html"}


@pytest.mark.slow
def test_compare_several_adapters(finetuned, tmp_path, call):
    shutil.copytree(finetuned / "adapter", tmp_path / "other")
    flags = ["--prompts", "The keeper", "--max-new-tokens", 4, "--temperature", 0, "--output", tmp_path / "out"]
    call("compare", "--adapter", finetuned / "adapter", "--adapter", tmp_path / "other", *flags)
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert report["adapters"] == ["run", "other"]
    base, first, second = report["prompts"][0]["models"]
    assert (base["name"], first["name"], second["name"]) == ("base", "run", "other")
    assert {**first, "name": ""} == {**second, "name": ""}, "one is the other's copy"
    assert first["kl"][0] > 0 and len(first["kl"]) == len(first["tokens"]) == 4
    assert "| base | run | other |" in (tmp_path / "out" / "compare.md").read_text()


def test_generate(finetuned, tmp_path, call):
    flags = ["--adapter", finetuned / "adapter", "--max-new-tokens", 6]
    greedy = call("generate", *flags, "--prompts", "The keeper", "--temperature", 0).out
    assert greedy.startswith("The keeper") and len(greedy) > len("The keeper\n\n")
    assert call("generate", *flags, "--prompts", "The keeper", "--temperature", 0, "--seed", 7).out == greedy
    (tmp_path / "prompts.txt").write_text("The tide\n\nOld [bold]rope[/bold]\n")
    said = call("generate", *flags, "--prompts-file", tmp_path / "prompts.txt").out
    assert "The tide" in said and "Old [bold]rope[/bold]" in said


@pytest.mark.slow
def test_several_adapters(finetuned, gpt2_dir, tmp_path, call, fails):
    """A directory of adapters: each continues each prompt as it does alone; other commands ask which one."""
    _, params = jlora.load(gpt2_dir)
    for name, seed in (("gull", 1), ("tide", 2)):
        config = jlora.LoraConfig(rank=2 * seed, targets=["c_attn"])
        adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(seed)))
        tree = jlora.combine(
            jax.tree.map(lambda x: x + 0.3 * np.sin(np.arange(x.size).reshape(x.shape)), adapter), base
        )
        jlora.save_adapter(tmp_path / "voices" / name, tree, config=config, base_model=gpt2_dir)
    flags = ["--prompts", "The keeper", "--temperature", 0, "--max-new-tokens", 6]
    together = call("generate", "--adapter", tmp_path / "voices", *flags).out
    alone = {name: call("generate", "--adapter", tmp_path / "voices" / name, *flags).out for name in ("gull", "tide")}
    assert together == "".join(f"{name}: {said}" for name, said in alone.items())
    assert alone["gull"] != alone["tide"]
    assert call("inspect", "--adapter", tmp_path / "voices").out.count("(PEFT): base") == 2
    said = fails("merge", "--adapter", tmp_path / "voices", "--output", tmp_path / "merged")
    assert "one of the adapters in it" in said and "gull" in said and "tide" in said
    config = json.loads((tmp_path / "voices" / "tide" / "adapter_config.json").read_text())
    (tmp_path / "voices" / "tide" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "another"})
    )
    said = fails("generate", "--adapter", tmp_path / "voices", *flags)
    assert "name different base models" in said and "another" in said


def test_merge(finetuned, gpt2_dir, tmp_path, call, fails):
    output = tmp_path / "merged"
    shown = call("merge", "--adapter", finetuned / "adapter", "--output", output).out
    assert "merged checkpoint" in shown
    assert float(re.search(r"([\d.e+-]+)\s+nats", shown)[1]) < 1e-6
    base = transformers.AutoModelForCausalLM.from_pretrained(gpt2_dir)
    adapted = peft.PeftModel.from_pretrained(base, str(finetuned / "adapter")).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    ids = transformers.AutoTokenizer.from_pretrained(output)("The keeper wrote of wind", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        expected, logits = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - logits).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    assert "choose another directory" in fails("merge", "--adapter", finetuned / "adapter", "--output", output)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"targets": ["wte", "c_attn"]}, {"targets": ["c_fc"], "modules_to_save": ["wte"]}])
def test_merging_unties_a_head_and_says_so(fields, gpt2_dir, tmp_path, call, fails):
    config = jlora.LoraConfig(rank=4, alpha=8.0, **fields)
    model, params = jlora.load(gpt2_dir, dtype="float32")
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    params = jlora.combine(jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size).reshape(x.shape)), adapter), base)
    jlora.save_adapter(tmp_path / "adapter", params, config=config, base_model=gpt2_dir)
    ids = np.arange(2, 22)[None]
    expected = np.asarray(model.apply({"params": params}, ids))
    assert np.abs(np.asarray(model.apply({"params": jlora.remove_lora(params)}, ids)) - expected).max() > 1e-2

    said = call("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged").out
    assert "tensor of its own (tie_word_embeddings: false)" in " ".join(said.split())
    assert float(re.search(r"([\d.e+-]+)\s+nats", said)[1]) < 1e-6
    outputs = {to: tmp_path / to for to in ("transformers", "torch", "gguf", "ollama")}
    for to, path in outputs.items():
        said = call(
            "export", "--to", to, "--adapter", tmp_path / "adapter", "--output", path, "--gguf-dtype", "f32"
        ).out
        assert said.count("tensor of its own") == 1
    # An adapter alone is written beside the base as it is, so nothing is untied; mlx-lm's cannot say what this one does.
    adapter = ("--adapter", tmp_path / "adapter")
    assert "tensor of its own" not in call("export", "--to", "peft", *adapter, "--output", tmp_path / "peft").out
    said = fails("export", "--to", "mlx", *adapter, "--output", tmp_path / "mlx")
    assert "does not represent" in said and not (tmp_path / "mlx").exists()
    for directory in (tmp_path / "merged", outputs["transformers"]):
        again = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        np.testing.assert_allclose(again(torch.tensor(ids)).logits.detach(), expected, atol=1e-4)
    state = torch.load(outputs["torch"], weights_only=True)
    head, table = (state[name].numpy() for name in ("lm_head.weight", "transformer.wte.weight"))
    np.testing.assert_array_equal(head, jlora.remove_lora(params)["transformer"]["wte"]["embedding"])
    for path in (outputs["gguf"], outputs["ollama"] / "ollama.gguf"):
        written = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
        np.testing.assert_array_equal(written["output.weight"], head)
        np.testing.assert_array_equal(written["token_embd.weight"], table)
    assert np.abs(table - head).max() > 1e-2


def test_inspect_data(gpt2_dir, records_file, call):
    said = call("inspect", "--model", gpt2_dir, "--data", records_file, "--rows", 2).out
    first = json.loads(Path(records_file).read_text().splitlines()[0])
    assert "row 1 of 24" in said and "row 2 of 24" in said and "row 3" not in said
    assert first["instruction"] in said and first["output"] in said and tiny.EOT in said
    counts = dict(line.rsplit(None, 1) for line in said.splitlines() if line.startswith(("records", "supervised")))
    assert counts.keys() == {"records", "supervised tokens", "supervised share"}
    assert counts["records"] == "24"
    assert 0 < float(counts["supervised share"].rstrip("%")) < 50


def test_inspect_chats(llama_dir, records_file, call):
    said = call("inspect", "--model", llama_dir, "--data", records_file, "--template", "chat", "--rows", 1).out
    assert "<|im_start|>assistant" in said and "row 1 of 24" in said


def test_inspect_model_and_adapter(finetuned, gpt2_dir, llama_dir, call, fails):
    said = call("inspect", "--model", gpt2_dir).out
    for row in ("attn.c_attn  32 x 96", "mlp.c_proj   128 x 32"):
        assert row in said
    assert "self_attn.k_proj  32 x 16" in call("inspect", "--model", llama_dir).out
    said = call("inspect", finetuned / "adapter").out
    assert said == call("inspect", "--adapter", finetuned / "adapter").out
    assert call("inspect", gpt2_dir).out == call("inspect", "--model", gpt2_dir).out
    assert "Give one of them" in fails("inspect", gpt2_dir, "--model", gpt2_dir)
    rows = [line.split() for line in said.splitlines() if line.startswith("transformer.h.")]
    assert [row[:3] for row in rows] == [
        [f"transformer.h.{layer}.{module}", "4", "2"] for layer in (0, 1) for module in ("attn.c_attn", "mlp.c_fc")
    ]
    assert all(float(row[3]) > 0 for row in rows)


def test_prepare(gpt2_dir, text_file, tmp_path, call):
    said = call("prepare", "--model", gpt2_dir, "--data", text_file, "--output", tmp_path / "shards").out
    meta = json.loads((tmp_path / "shards" / "meta.json").read_text())
    assert f"{meta['tokens']['train']:,} train tokens" in said
    assert f"{meta['tokens']['validation']:,} validation tokens" in said


# Errors


def test_output_exists(finetuned, fails, text_file, gpt2_dir):
    said = fails("finetune", "--model", gpt2_dir, "--data", text_file, "--output", finetuned)
    assert "exists and is not empty" in said and "--resume" in said


def test_resume_with_other_flags(finetuned, fails):
    said = fails("finetune", "--config", finetuned / "config.yaml", "--resume", "--rank", 16)
    assert "rank: was 4, is 16" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("finetune --model ./nowhere --data {text} --output {out}", "'./nowhere' is not a directory"),
        ("finetune --model no-such-model --data {text} --output {out}", "neither a directory here nor"),
        ("finetune --model {gpt2} --data nowhere.txt --output {out}", "no such data file: nowhere.txt"),
        ("finetune --model {gpt2} --data {bad} --output {out}", "bad.jsonl:2: a record needs the columns"),
        ("finetune --model {gpt2} --data {text} --output {out} --targets q_proj", "q_proj"),
        ("finetune --model {gpt2} --data {bad} --output {out} --template chat", "bad.jsonl:2"),
        ("evaluate --model {gpt2}", "Give --data"),
        ("evaluate --data {text}", "Give --model, or an --adapter"),
        ("evaluate --model {llama} --adapter {adapter} --data {text}", "c_attn"),
        ("evaluate --adapter {gpt2} --data {text}", "there is no adapter_config.json"),
        ("generate --model {gpt2}", "Give at least one prompt"),
        ("generate --model {gpt2} --prompts-file nowhere", "There is no prompts file 'nowhere'"),
        ("compare --model {gpt2} --prompts a", "give --adapter"),
        ("merge --model {gpt2} --output {out}", "nothing to merge without --adapter"),
        ("inspect", "Give --model"),
        ("inspect --model {adapter}", "It holds an adapter"),
        (
            "inspect --model {gpt2} --data {text} --split validation --eval-fraction 0",
            "all of the data were trained on. Give other --data, and for all of it use --split all",
        ),
        ("prepare --model {gpt2} --data nowhere.txt --output {out}", "no such text file: nowhere.txt"),
    ],
)
def test_errors_say_what_is_wrong(flags, says, finetuned, gpt2_dir, llama_dir, text_file, tmp_path, fails):
    bad = tmp_path / "bad.jsonl"
    tiny.write_records(bad, [*tiny.records(1), {"question": "?", "reply": "!"}])
    paths = {
        "gpt2": gpt2_dir, "llama": llama_dir, "text": text_file, "bad": bad, "out": tmp_path / "out",
        "adapter": finetuned / "adapter",
    }  # fmt: skip
    said = fails(*flags.format(**paths).split())
    assert says in said
    assert "JLORA_TRACEBACK" not in said, "an error of the user's must not look like one of the program's"
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class Empty:
    """No flags."""


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("JLORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Give --model"):
        cli.main(["inspect"])


def test_errors_of_the_program_name_their_type(fails, monkeypatch):
    def broken(options):
        raise RuntimeError("no [such] device")

    monkeypatch.setattr(cli, "_commands", lambda: {"prepare": (Empty, broken)})
    assert fails("prepare") == "RuntimeError: no [such] device (set JLORA_TRACEBACK=1 to see where)\n"


def test_interrupted(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_commands", lambda: {"prepare": (Empty, interrupted)})
    assert run("prepare") == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nBuffer: ..."),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: TPU"),
    ],
    ids=["XLA", "host", "jax"],
)
def test_advice_when_memory_runs_out(error):
    said = cli._advice(error)
    assert said.startswith("out of memory (")
    remedies = (
        "--batch-size",
        "--accumulate",
        "--max-length",
        "--remat layer",
        "--dtype bfloat16",
        "--rank",
        "--targets",
    )
    places = [said.index(remedy) for remedy in remedies]
    assert places == sorted(places)


# As a program


def test_console_script(tmp_path):
    script = Path(sys.executable).with_name("jlora")
    flags = ["finetune", "--model", "./nowhere", "--data", "d.txt", "--output", "out"]
    said = subprocess.run([script, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert (said.returncode, said.stdout) == (cli.FAILURE, "")
    assert (
        said.stderr.startswith("error: './nowhere' is not a directory and no GGUF file.")
        and "Traceback" not in said.stderr
    )
    assert not os.listdir(tmp_path)


def test_config_yaml_is_plain(finetuned):
    fields = yaml.safe_load((finetuned / "config.yaml").read_text())
    assert (fields["learning_rate"], fields["targets"], fields["resume"]) == (0.01, ["c_attn", "c_fc"], False)


def test_warnings_are_lines_for_users(gpt2_dir, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("the keeper lit a lamp\n" * 60)
    (tmp_path / "data/b.md").write_text("x")
    command = ["prepare", "--model", str(gpt2_dir), "--data", "data", "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-c", "from jlora.cli import main; main()", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [
        line for line in done.stderr.splitlines() if line.startswith("warning: ") and line.endswith("left out: b.md")
    ]
    assert "UserWarning" not in done.stderr and ".py:" not in done.stderr


@pytest.mark.parametrize("tokenizer", [None, "{", '{"model": 7}'], ids=["none", "cut", "damaged"])
@pytest.mark.parametrize("command", ["finetune", "prepare", "inspect", "evaluate", "generate"])
def test_another_family_is_said_before_what_is_wrong_with_its_tokenizer(
    command, tokenizer, text_file, tmp_path, capsys
):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "mamba"}')
    if tokenizer is not None:
        (model / "tokenizer.json").write_text(tokenizer)
    data = ("--prompts", "x") if command == "generate" else ("--data", text_file)
    output = ("--output", tmp_path / "out") if command in ("finetune", "prepare") else ()
    assert run(command, "--model", model, *data, *output) == cli.FAILURE
    said = capsys.readouterr().err
    assert "`model_type` 'mamba'; jlora runs gpt2, llama" in said and not (tmp_path / "out").exists()
