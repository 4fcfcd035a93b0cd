"""The flags of data in whole runs, and in the commands that find a run's data again."""

import json

import pytest
import tiny

import jlora
from jlora.cli.as_trained import FILE
from jlora.cli.chat.options import Chat
from jlora.cli.chat.voices import trained_system
from jlora.files import load_tokenizer
from jlora.files.run_settings import RunSettings
from jlora.publish.card import RunRecord

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHAT = [{"from": "human", "value": "Who lit the lamp?"}, {"from": "gpt", "value": "the keeper lit a lamp"}]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(conversations, with two bad lines; questions)."""
    place = tmp_path_factory.mktemp("sources")
    chats = tiny.write_records(place / "chats.jsonl", [{"conversations": CHAT}] * 6)
    with open(chats, "a") as lines:
        lines.write("{oops\n" + json.dumps({"conversations": CHAT[:1]}) + "\n")
    rows = [{"question": row["instruction"], "answer": row["output"]} for row in tiny.records(6)]
    return chats, tiny.write_records(place / "questions.jsonl", rows)


FLAGS = {
    "template": "chatml", "system": "Be brief.", "supervise": "last", "skip_bad_records": True, "streaming": True, "seed": 3,
    "eval_fraction": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, gpt2_dir, sources):
    output = tmp_path_factory.mktemp("runs") / "r"
    config = jlora.FinetuneConfig(
        model=gpt2_dir, data=sources[0], output=str(output), steps=2, batch_size=4, rank=2, quiet=True, **FLAGS
    )
    return output, jlora.finetune(config)


@pytest.mark.slow
def test_a_run_tells_what_it_took_its_records_for(run, sources, capsys):
    output, result = run
    bad = [json.loads(line) for line in (output / "bad_records.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in bad] == [f"{sources[0]}:7", f"{sources[0]}:8"]
    settings = RunSettings.read(result.adapter_dir)
    assert (settings.template, settings.system, settings.supervise) == ("chatml", "Be brief.", "last")
    assert settings.skip_bad_records and "format" not in json.loads((result.adapter_dir / FILE).read_text())
    assert json.loads((output / "data" / "meta.json").read_text())["tokens"]["validation"] > 0
    assert trained_system(Chat(adapter=(str(result.adapter_dir),))) == "Be brief."
    tokenizer = load_tokenizer(result.adapter_dir)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert rendered == "<|im_start|>user\na<|im_end|>\n"


@pytest.mark.slow
def test_evaluate_finds_the_split_again(run, call):
    _, result = run
    said = call("evaluate", "--adapter", result.adapter_dir)
    assert json.loads(said.out)["eval_loss"] == pytest.approx(result.eval_loss, rel=1e-6)
    assert "template chatml" in said.err and "system Be brief., supervise last" in said.err
    assert "2 bad records left out" in said.err
    told = call("evaluate", "--adapter", result.adapter_dir, "--supervise", "all", "--system", "Say.")
    assert (
        "other than in the run that trained this: system Say. (it was Be brief.), supervise all (it was last)"
        in told.err
    )
    assert json.loads(told.out)["eval_loss"] != pytest.approx(result.eval_loss, rel=1e-6)


@pytest.mark.slow
def test_generate_asks_as_in_training(run, call):
    _, result = run
    flags = (
        "--adapter",
        result.adapter_dir,
        "--prompts",
        "Who lit the lamp?",
        "--max-new-tokens",
        3,
        "--temperature",
        0,
    )
    asked = call("generate", *flags)
    assert "template chatml" in asked.err and "system Be brief." in asked.err
    said = call("generate", *flags, "--template", "chatml", "--system", "Be brief.")
    other = call("generate", *flags, "--system", "the keeper lit a lamp and wrote of wind rain gulls tide")
    assert asked.out == said.out and "it was Be brief." in other.err


@pytest.mark.slow
def test_several_sources_of_different_columns(sources, gpt2_dir, tmp_path, capsys, call):
    chats, questions = sources
    flags = (
        *("finetune", "--model", gpt2_dir, "--output", tmp_path / "r", "--steps", 2, "--batch-size", 4, "--rank", 2),
        *("--data", chats, questions, "--data-weights", 1, 3, "--max-examples", 4, "--skip-bad-records"),
        *("--template", "chatml", "--eval-fraction", 0),
    )
    said = call(*flags)
    said = " ".join(said.out.split())
    assert "4 of format sharegpt, 4 of format question-answer; template chatml; supervised: assistant" in said
    assert "2 of 4; " in said and "6 of 4, each 1.5 times" in said
    settings = RunSettings.read(tmp_path / "r" / "adapter")
    assert settings.data == (chats, questions) and settings.data_weights == (1.0, 3.0) and settings.max_examples == 4
    assert "as in the run" in call("inspect", "--adapter", tmp_path / "r" / "adapter", "--data", chats, questions).err


@pytest.mark.slow
def test_the_template_that_auto_took_is_saved(sources, gpt2_dir, tmp_path):
    """Not so `alpaca`, the default: what a run without the flag saves is what it was."""
    for template, saved in (("auto", True), ("alpaca", False)):
        config = {"model": gpt2_dir, "data": sources[1], "output": str(tmp_path / template), "steps": 1, "quiet": True}
        result = jlora.finetune(jlora.FinetuneConfig(**config, template=template, rank=2))
        assert bool(load_tokenizer(result.adapter_dir).chat_template) == saved
        assert RunSettings.read(result.adapter_dir).template == "alpaca"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"system": "Be brief."}, "`system` needs a template with a place for it, and alpaca's has none"),
        ({"system": " ", "template": "chat"}, "`system` must say something"),
        ({"data": ()}, "`data` must name at least one file"),
        ({"columns": "instruction"}, "`columns` must be MEANING=COLUMN"),
        ({"data_weights": [1, -1]}, "must be positive; got -1"),
        ({"data_temperature": 0.0}, "must be positive; got 0.0"),
        ({"max_examples": 0}, "`max_examples` must be at least 1; got 0"),
    ],
)
def test_flags_that_a_run_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        jlora.FinetuneConfig(**{"model": "m", "data": "d.jsonl", "output": "o"} | changes)


def test_one_of_several_data_is_that_data():
    config = jlora.FinetuneConfig(model="m", data=["d.jsonl"], output="o")
    assert config.data == "d.jsonl" and config == jlora.FinetuneConfig(model="m", data="d.jsonl", output="o")


def test_records_are_prepared_as_a_run_prepares_them(sources, gpt2_dir, tmp_path, call):
    flags = ("--model", gpt2_dir, "--data", sources[1], "--output", tmp_path / "d", "--template", "chatml")
    said = call("prepare", *flags, "--eval-fraction", 0.5)
    assert "train tokens" in said.out and "validation tokens" in said.out
    assert {path.name for path in (tmp_path / "d").iterdir()} >= {
        "meta.json",
        "train-00000.npy",
        "validation-00000.npy",
    }


def test_a_card_names_the_hub_data_sets_of_a_run(tmp_path):
    def named(*data):
        return RunRecord(tmp_path, {"data": list(data)}, []).data_sets

    assert named("org/a:main:train[:9]", "org/b", "org/a") == ["org/a", "org/b"]
    assert named("org/a", "mine.jsonl") == [], "what is of this machine is not told"
