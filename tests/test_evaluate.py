"""`jlora evaluate`: base and adapters on one base, answers scored, what has no score named, as table, JSON and JSON lines."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
import tiny
from command import on_a_terminal, run

import jlora
from jlora import cli
from jlora._terminal import console
from jlora.data import prompt_ids
from jlora.evaluation import METRICS, Counts, Embedder, Example, Tools, metrics_named, scored
from jlora.evaluation.example import mean
from jlora.generation import generate_many
from jlora.report.evaluation import print_evaluation

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHORT = ("--max-length", 40, "--batch-size", 3, "--max-new-tokens", 4, "--bootstrap", 50)


def write_adapter(directory, base, seed, targets=("q_proj", "v_proj")):
    """One that says something, without training."""
    model, params = jlora.load(base)
    config = jlora.LoraConfig(rank=2, targets=targets)
    adapter, frozen = jlora.split(jlora.add_lora(params, config, key=jax.random.key(seed)))
    adapter = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), adapter)
    jlora.save_adapter(directory, jlora.combine(adapter, frozen), config=config, base_model=base)
    return str(directory)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, llama_dir):
    place = tmp_path_factory.mktemp("adapters")
    return [write_adapter(place / name / "adapter", llama_dir, seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six records, of which one has no answer to be held against, one too long a prompt."""
    rows = [*tiny.records(4), {"instruction": "Say.", "output": "the lamp", "right": []}]
    rows.append({"instruction": "Tell of " + "wind " * 60, "output": "x"})
    return tiny.write_records(
        tmp_path_factory.mktemp("records") / "tasks.jsonl", [{"right": [row["output"], "rain"], **row} for row in rows]
    )


@pytest.fixture(scope="module")
def both(adapters, data, llama_dir, tmp_path_factory):
    """(the report, the lines of the examples) of base and two adapters."""
    place = tmp_path_factory.mktemp("report")
    flags = [
        "--adapter",
        adapters[0],
        "--adapter",
        adapters[1],
        "--base",
        "--data",
        data,
        "--split",
        "all",
        "--references",
        "right",
    ]
    flags += ["--template", "chat", *SHORT, "--metrics", "exact_match", "bleu", "rouge", "--output", place / "o.json"]
    cli.main(list(map(str, ["evaluate", *flags, "--examples", place / "examples.jsonl"])))
    lines = (place / "examples.jsonl").read_text().splitlines()
    return json.loads((place / "o.json").read_text()), list(map(json.loads, lines))


@pytest.mark.slow
def test_base_and_adapters_on_one_base(both, adapters, llama_dir):
    report, _ = both
    assert report["model"] == llama_dir and report["adapter"] == adapters
    assert list(report["models"]) == ["base", "one", "two"]
    assert len({of["eval_loss"] for of in report["models"].values()}) == 3
    assert [(d["of"], d["minus"]) for d in report["differences"]] == [("one", "base"), ("two", "base"), ("two", "one")]


@pytest.mark.slow
def test_the_figures_of_one_are_those_of_it_alone(both, adapters, data, call):
    report, _ = both
    flags = ["--data", data, "--split", "all", "--template", "chat", *SHORT]
    alone = json.loads(
        call("evaluate", "--adapter", adapters[1], *flags, "--references", "right", "--metrics", "bleu").out
    )
    among = report["models"]["two"]
    assert alone["eval_loss"] == pytest.approx(among["eval_loss"], rel=1e-6)
    assert alone["metrics"]["bleu"] == among["metrics"]["bleu"]
    assert {"models", "differences"}.isdisjoint(alone) and alone["adapter"] == adapters[1]


@pytest.mark.slow
def test_answers_are_those_of_generate_and_scores_those_of_the_libraries(both, adapters, llama_dir):
    report, lines = both
    model, params = jlora.load(llama_dir)
    tokenizer = jlora.load_tokenizer(llama_dir)
    params = jlora.load_adapter(adapters[0], params)
    asked = [line for line in lines if "answers" in line]
    for line in asked[:2]:
        ids = prompt_ids({"instruction": line["prompt"]}, tokenizer, template="chat")
        (new,) = jlora.generate(model, params, [ids], max_new_tokens=4, temperature=0)
        assert line["answers"]["one"] == [tokenizer.decode(new, skip_special_tokens=True)]
    scored = [line for line in asked if line["references"]]
    answers = [line["answers"]["one"][0] for line in scored]
    expected = sacrebleu.corpus_bleu(answers, list(zip(*[line["references"] for line in scored], strict=True))).score
    assert report["models"]["one"]["metrics"]["bleu"]["value"] == pytest.approx(expected)


@pytest.mark.slow
def test_what_has_no_score_is_counted_and_named(both, data):
    report, lines = both
    assert report["answers"]["examples"] == 5
    (left_out,) = report["answers"]["left_out"]
    assert left_out["count"] == 1 and left_out["first"] == f"{data}:6" and "no room for 4 tokens" in left_out["why"]
    assert lines[-1] == {"where": f"{data}:6", "left_out": left_out["why"]}
    for of in report["models"].values():
        for metric in of["metrics"].values():
            assert metric["examples"] == 4
            assert metric["unscored"] == [{"why": "it has no reference", "count": 1, "first": f"{data}:5"}]
    assert lines[4]["scores"]["base"]["bleu"] is None
    assert lines[4]["unscored"]["base"]["bleu"] == "it has no reference"


def test_a_table_on_a_terminal(llama_dir, records_file, call, monkeypatch):
    screen = on_a_terminal()
    monkeypatch.setattr("jlora.cli.evaluate.command.console", lambda: screen)
    flags = ["--model", llama_dir, "--data", records_file, "--template", "chat", *SHORT]
    assert call("evaluate", *flags, "--metrics", "f1", "refusal").out == ""
    head, loss, perplexity, f1, interval, refusal, _, note, *_ = screen.file.getvalue().splitlines()
    assert head.split() == ["base"]
    assert loss.split()[:2] == ["loss", "↓"] and perplexity.split()[:2] == ["perplexity", "↓"]
    assert f1.split()[:2] == ["f1", "↑"] and "…" in interval and refusal.split()[0] == "refusal"
    assert note.startswith(
        "2 records, 1 answer to each, greedy, at most 4 tokens; 95% intervals of 50 bootstrap resamples."
    )


def counted(values, **fields):
    return Counts(np.stack([np.asarray(values, float), np.ones(len(values))], axis=1), mean, **fields)


def test_the_table_marks_differences_that_are_sure():
    """Better, worse and neither, of a metric that is to be high and one that is to be low."""
    values = {"base": [0.2, 0.4, 0.3], "up": [0.5, 0.7, 0.6], "mixed": [0.9, 0.1, 0.3]}
    metrics = {n: METRICS[n]._replace(score=lambda e, a, t: counted([float(x) for (x,) in a])) for n in ("f1", "wer")}
    answers = {name: [[str(v)] for v in of] for name, of in values.items()}
    found = scored([Example(f"x:{i}", "") for i in range(3)], answers, metrics, Tools(), resamples=100, seed=0)
    assert found.differences["up", "base"]["f1"][:3] == pytest.approx((0.3, 0.3, 0.3))
    screen = console(file=io.StringIO(), force_terminal=True, color_system="standard", width=140)
    print_evaluation(screen, list(values), {}, found, lines=["a line"])
    said = screen.file.getvalue()
    green, red = "\x1b[1;32m* +0.300", "\x1b[1;31m* +0.300"
    assert said.count(green) == said.count(red) == 1 and said.index(green) < said.index(red)
    assert "+0.133\x1b" not in said and "+0.133" in said
    assert "a line" in said and "* The interval of the difference does not hold 0." in said


def test_held_out_records_are_those_of_the_loss(llama_dir, records_file, call, tmp_path):
    flags = [
        "--model",
        llama_dir,
        "--data",
        records_file,
        "--eval-fraction",
        0.2,
        "--seed",
        5,
        "--template",
        "chat",
        *SHORT,
    ]
    report = json.loads(call("evaluate", *flags, "--metrics", "f1", "--examples", tmp_path / "e").out)
    assert report["metrics"]["f1"]["examples"] + len(report["answers"]["left_out"]) == 5
    lines = list(map(json.loads, (tmp_path / "e").read_text().splitlines()))
    records = [(f"{records_file}:{i}", row) for i, row in enumerate(tiny.records(), 1)]
    _, held_out = jlora.data.split_records(records, eval_fraction=0.2, seed=5)
    assert [(line["where"], line["prompt"]) for line in lines] == [(w, r["instruction"]) for w, r in held_out]


@pytest.mark.slow
def test_records_without_answers(llama_dir, tmp_path, call):
    file = tiny.write_records(tmp_path / "ask.jsonl", [{"instruction": "Say lamp."}, {"instruction": "Say rope."}])
    flags = ["--model", llama_dir, "--data", file, "--split", "all", "--no-perplexity", "--template", "chat", *SHORT]
    report = json.loads(call("evaluate", *flags, "--metrics", "refusal").out)
    assert report["metrics"]["refusal"]["value"] == 0 and "eval_loss" not in report
    assert report["answers"]["examples"] == 2


@pytest.mark.slow
def test_several_sampled_answers_run_as_code(llama_dir, tmp_path, call):
    file = tiny.write_records(tmp_path / "code.jsonl", [{"instruction": "Code.", "output": "x", "check": ["pass"]}])
    flags = ["--model", llama_dir, "--data", file, "--split", "all", "--no-perplexity", "--template", "chat", *SHORT]
    flags += [
        "--metrics",
        "pass@2",
        "--tests",
        "check",
        "--allow-code",
        "--temperature",
        2.0,
        "--top-k",
        0,
        "--top-p",
        1.0,
    ]
    report = json.loads(call("evaluate", *flags, "--examples", tmp_path / "e.jsonl").out)
    assert report["answers"]["each"] == 2 and report["metrics"]["pass@2"]["examples"] == 1
    assert report["sandbox"]["network"] and report["sandbox"]["megabytes"] == 1024
    line = json.loads((tmp_path / "e.jsonl").read_text())
    assert len(set(line["answers"]["base"])) == 2 and len(line["notes"]["base"]["pass@2"]) == 2


@pytest.mark.slow
def test_a_judge_of_adapter_against_base(adapters, data, call, monkeypatch):
    monkeypatch.setattr("jlora.evaluation.judge.Endpoint.ask", lambda self, messages: "It is. [[A]]")
    flags = [
        "--adapter",
        adapters[0],
        "--base",
        "--data",
        data,
        "--split",
        "all",
        "--no-perplexity",
        "--template",
        "chat",
        *SHORT,
    ]
    report = json.loads(call("evaluate", *flags, "--judge", "http://localhost:1/v1", "--judge-model", "j").out)
    (pair,) = report["judge"]["pairs"]
    assert (pair["of"], pair["against"], pair["win_rate"], pair["ties"]) == ("one", "base", 0.5, 5)
    assert 0 < pair["followed_the_order"] <= 5


@pytest.mark.slow
def test_the_cosine_is_that_of_mean_hidden_states(llama_dir):
    model, params = jlora.load(llama_dir, dtype=jnp.float32)
    tokenizer = jlora.load_tokenizer(llama_dir)
    embedder = Embedder(model, params, lambda text: tokenizer(text)["input_ids"], batch_size=2)
    texts = ["the keeper lit a lamp", "rain", "wind and rain and rope"]

    def vector(text):
        return np.mean(
            model.apply({"params": params}, jnp.asarray([tokenizer(text)["input_ids"]]), head=False)[0], axis=0
        )

    vectors = [vector(text) for text in texts]
    expected = float(vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]))
    references = [texts[0], texts[2], texts[0], "w " * 99]
    examples = [Example(f"x:{i}", "", (text,)) for i, text in enumerate(references)]
    (metric,) = metrics_named(["embedding"]).values()
    found = metric.score(examples, [[texts[1]], [texts[2]], [" "], ["x"]], Tools(embedder=embedder))
    assert found.each()[:3] == pytest.approx([expected, 1, 0], abs=1e-5)
    assert "more tokens than the embedding model's 64 positions" in found.unscored[3]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--metrics exakt_match", "There is no metric 'exakt_match'; there are exact_match"),
        ("--metrics pass@1", "pass@k needs --tests COLUMN"),
        ("--metrics pass@1 --tests t", "Say --allow-code, best in a container."),
        ("--metrics pass@3 --tests t --allow-code", "3 answers of temperature 0 are one and the same"),
        (
            "--metrics pass@3 --tests t --allow-code --samples 2 --temperature 1",
            "`samples` must be at least the 3 of pass@3; got 2",
        ),
        ("--metrics f1 --tests t", "--tests are for pass@k"),
        ("--metrics embedding", "needs --embedding-model"),
        ("--metrics f1 --embedding-model m", "is for the metric embedding"),
        ("--judge http://x/v1", "give --judge URL and --judge-model NAME"),
        ("--no-perplexity", "There is nothing to evaluate"),
        ("--examples f.jsonl", "give --metrics"),
        ("--metrics f1 --bootstrap 0", "`bootstrap` must be at least 1; got 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, says, capsys):
    assert run("evaluate", "--model", "m", "--data", "d.jsonl", *flags.split()) == cli.USAGE_ERROR
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_text_has_nothing_to_answer(llama_dir, text_file, fails):
    assert "is raw text. Leave --metrics out" in fails(
        "evaluate", "--model", llama_dir, "--data", text_file, "--metrics", "f1"
    )


def test_adapters_with_the_same_name(adapters, data, fails):
    assert "Two adapters are called 'one'" in fails(
        "evaluate", "--adapter", adapters[0], "--adapter", adapters[0], "--data", data
    )


# Any number of prompts


@pytest.mark.slow
def test_batches_of_any_prompts_are_generate(llama_dir):
    model, params = jlora.load(llama_dir)
    prompts = [[5, 6, 7], [9], [8, 8], [4] * 20, [3, 4, 5, 6]]
    sampling = {"max_new_tokens": 20, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "key": None}
    found = dict(generate_many(model, params, prompts, batch_size=2, **sampling))
    assert [found[i] for i in range(5)] == jlora.generate(model, params, prompts, max_new_tokens=20, temperature=0)
    asked = []
    early = dict(
        generate_many(model, params, prompts, batch_size=2, ended=lambda i, new: asked.append(i) or True, **sampling)
    )
    assert {i: new[:16] for i, new in found.items()} == early and set(asked) == set(range(5))
