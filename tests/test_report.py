"""`jlora report`: what the page says is what the files of the run hold; what they lack, it says too."""

import json
import math
import re
import statistics

import numpy as np
import pytest
from handmade_run import LOG, ORIGIN, SHAPES, factors, write_adapter, write_run
from parsed_page import parse
from safetensors.numpy import save_file

import jlora
from jlora.report.markdown import one_line
from jlora.report.norms import frobenius, update_norms
from jlora.report.run_files import RunFiles
from jlora.report.run_report import report_on, to_html, to_markdown, write_report
from jlora.weight import Inseparable

HOSTILE = "</table><script>alert(1)</script><img src=https://example.org/x> | `a` \x1b[2J"
SHOWN = HOSTILE.replace("\x1b", "\\x1b")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "letters")


def page_of(*runs):
    return parse(to_html(report_on(runs)))


def rows_of(page):
    """The rows of all tables, their cells apart by spaces."""
    return [" ".join(row) for table in page.all("table") for row in table.rows]


def test_the_page_is_one_file_and_whole(letters):
    page = page_of(letters)
    assert page.fetched == [] and page.title == "letters · jlora report"
    assert {"nav", "main", "article", "table", "figure", "svg"} - page.tags == {"nav"}, (
        "one run needs no table of contents"
    )
    names = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(names) == len(set(names))
    headings = [int(element.tag[1]) for element in page.elements if re.fullmatch(r"h[1-6]", element.tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False)), (
        "no level is left out"
    )


def test_figures_are_those_of_the_files(letters):
    page = page_of(letters)
    readings = dict(zip((e.text for e in page.all("dt")), (e.text for e in page.all("dd")), strict=True))
    assert readings == {
        "Evaluation loss": "2.50004.0000 before",
        "Perplexity": f"{math.exp(2.5):.2f}{math.exp(4):.2f} before",
        "Training loss": "2.75004.2500 at step 1",
        "Trained": "2.50%500 of 20,000 parameters",
        "Speed": f"{statistics.median([100, 300, 250, 200])}tokens a second, the median of the steps",
        "Memory of a step": "6.5 MiBmeasured; 7.0 MiB predicted, 6.0 MiB planned",
        "Time": "3 min 20 s",
    }
    expected = {
        "base model some/model", "family llama", "layers 2", "parameters 20,000",
        "stored as nf4 (4.13 bits a parameter) and bfloat16", "quantization nf4", "trained share 2.50% 500 of 20,000 parameters",
        "device a device", "data letters.jsonl", "template chat", "records 40", "tokens 1,234",
        "supervised tokens 567", "truncated 3", "dropped 1", "evaluation tokens 89", "max length 96",
        "padding efficiency 87.5% of the positions of a batch hold a token",
        "rank 2", "alpha 4.0", "targets q_proj, up_proj", "learning rate 0.0002", "seed 7", "steps 4",
        "memory of a step, planned by the compiler 6.0 MiB", "evaluation, this adapter 4 2.5000 12.18", "versions jax 0.10.2",
    }  # fmt: skip
    assert expected <= set(rows_of(page))
    assert "Finished after 4 steps." in [e.text for e in page.all("p")]
    files = {path.name for path in letters.iterdir()} - {"report.html", "report.md"}
    assert {e.text.rstrip("/") for e in page.all("code")} >= files


def test_curves_hold_the_values_of_the_log(letters):
    page = page_of(letters)
    drawn = [json.loads(e.text) for e in page.all("script", type="application/json")]
    lines = {line["name"]: line["points"] for chart in drawn for line in chart["series"]}

    def of(field):
        return [[entry["step"], entry[field]] for entry in LOG if field in entry]

    assert lines == {
        "training": of("loss"), "evaluation": of("eval_loss"), "Learning rate": of("learning_rate"),
        "Gradient norm": of("grad_norm"), "Speed": of("tokens_per_second"),
    }  # fmt: skip


def dense_norm(layer, module):
    a, b = (x.astype(np.float64) for x in factors(layer, module))
    return np.linalg.norm(4 / 2 * a @ b)


def test_the_map_of_what_was_learned(letters):
    learned = report_on([letters])[0].learned
    assert learned.modules == ["mlp.up_proj", "self_attn.q_proj"]
    table = {name: [cell[0] for cell in cells] for name, cells, _ in learned.rows}
    assert table == {str(layer): [f"{dense_norm(layer, m):.3f}" for m in learned.modules] for layer in range(2)}
    heats = [cell[1] for _, cells, _ in learned.rows for cell in cells]
    assert min(heats) == 0 and max(heats) == 9, "from the least to the most"
    every = [dense_norm(layer, module) for layer in range(2) for module in SHAPES]
    assert learned.totals[-1] == f"{math.sqrt(sum(norm**2 for norm in every)):.3f}"
    page = page_of(letters)
    (table,) = page.all("table", **{"class": "heat"})
    assert all(cell in table.text for _, cells, whole in learned.rows for cell in (*(c[0] for c in cells), whole))


@pytest.mark.parametrize("rank, d_in, d_out", [(1, 3, 5), (4, 64, 48), (16, 8, 8)])
def test_a_norm_is_that_of_the_product(rank, d_in, d_out):
    rng = np.random.default_rng(rank)
    a, b = rng.normal(size=(d_in, rank)), rng.normal(size=(rank, d_out))
    assert frobenius(a, b) == pytest.approx(np.linalg.norm(a @ b), rel=1e-12)


def test_kinds_with_two_factors_have_norms(tmp_path):
    write_adapter(tmp_path / "lora")
    rng = np.random.default_rng(0)
    draw = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {
        "hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}.items()}  # fmt: skip
    loha = tmp_path / "loha"
    write_adapter(loha)
    module = "base_model.model.model.layers.0.mlp.up_proj"
    save_file({f"{module}.{name}": array for name, array in draw.items()}, loha / "adapter_model.safetensors")
    fields = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["up_proj"]}
    (loha / "adapter_config.json").write_text(json.dumps(fields))
    (update,) = update_norms(loha)
    product = (draw["hada_w1_a"] @ draw["hada_w1_b"]) * (draw["hada_w2_a"] @ draw["hada_w2_b"])
    assert update.norm == pytest.approx(2 * np.linalg.norm(product), rel=1e-5)
    assert (update.layer, update.kind) == (0, "mlp.up_proj")

    miss = tmp_path / "miss"
    write_adapter(miss)
    save_file({f"{module}.miss_block": draw["hada_w1_b"]}, miss / "adapter_model.safetensors")
    (miss / "adapter_config.json").write_text(json.dumps({"peft_type": "MISS", "r": 2, "target_modules": ["up_proj"]}))
    with pytest.raises(Inseparable, match="MissWeight"):
        update_norms(miss)


def test_texts_of_others_stay_texts(tmp_path):
    hostile = write_run(
        tmp_path / "run",
        config={"run_name": HOSTILE, "model": HOSTILE, "data": [HOSTILE, "b.jsonl"]},
        samples=[{"step": 4, "prompt": HOSTILE, "text": HOSTILE}],
    )
    reports = report_on([hostile])
    page = parse(to_html(reports))
    assert page.fetched == [] and "img" not in page.tags and page.title.startswith(SHOWN)
    assert len([e for e in page.elements if e.tag == "script" and "alert(1)" in e.text]) == 0
    (caption,) = page.all("caption")
    assert caption.text == SHOWN
    markdown = to_markdown(reports)
    assert "<script" not in markdown and "\x1b" not in markdown
    assert all(line.startswith("#") or "|" not in line or line.count(" | ") >= 1 for line in markdown.splitlines())


def test_markdown_says_the_same(letters):
    markdown = to_markdown(report_on([letters]))
    for line in (
        "# letters", "Finished after 4 steps.", "| Evaluation loss | 2.5000 | 4.0000 before |",
        "| evaluation, this adapter | 4 | 2.5000 | 12.18 |", "| 4 | It. |",
        "| padding efficiency | 87.5% of the positions of a batch hold a token |",
        "## Where it learned", "## Files",
    ):  # fmt: skip
        assert line in markdown.splitlines(), line
    assert f"| {dense_norm(1, 'mlp.up_proj'):.3f} |" in markdown


def test_both_files_are_written_again(letters, tmp_path):
    for _ in range(2):
        html, markdown = write_report([letters], letters)
    assert html.read_text() == to_html(report_on([letters])) and markdown.read_text() == to_markdown(
        report_on([letters])
    )
    assert "report.html" not in markdown.read_text()


# Runs that are not whole


def wrong_of(run):
    reports = report_on([run])
    page = parse(to_html(reports))
    said = [item.text for item in page.all("li")]
    assert said == list(reports[0].run.wrong) and all(f"- {one_line(one)}" in to_markdown(reports) for one in said)
    return said, page


def test_an_unfinished_run_is_said_to_be_one(tmp_path):
    run = write_run(tmp_path / "run", log=LOG[:3], adapter=False)
    said, page = wrong_of(run)
    assert said == ["The run is not finished: its log ends with step 2 of 4, and there is no adapter yet."]
    assert "Not finished." in [e.text for e in page.all("p")] and len(page.all("figure")) == 4


def test_a_run_that_a_rule_ended_is_finished(tmp_path):
    run = write_run(tmp_path / "run", log=LOG[:4], origin={"ended_after": 3, "ended_by": "the loss no longer falls"})
    assert report_on([run])[0].status == "finished after 3 of 4 steps: the loss no longer falls"
    assert not report_on([run])[0].run.wrong


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("config.yaml", None, "There is no file '.*config.yaml'"),
        ("config.yaml", "model: [", "config.yaml' is not valid YAML"),
        ("run.json", None, "There is no file '.*run.json'"),
        ("run.json", "{", "run.json' is not valid JSON"),
        ("metrics.jsonl", None, "There is no file '.*metrics.jsonl'"),
        ("metrics.jsonl", json.dumps(LOG[1]) + '\n{"step": 2, "lo\n{"loss": 3}\n', "metrics.jsonl line 2 is not valid JSON"),
        ("samples.jsonl", '{"step": 4}\n', "samples.jsonl line 1 is no sample"),
        ("adapter/adapter_config.json", None, "there is no adapter_config.json"),
        ("adapter/adapter_model.safetensors", b"\x00" * 10, "adapter_model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_and_the_rest_is_told(tmp_path, name, content, says):
    run = write_run(tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said, page = wrong_of(run)
    assert any(re.search(says, one) for one in said), said
    assert page.all("table") and len(page.all("h1")) == 1


def test_many_damaged_lines_are_counted(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as log:
        log.write("x\n" * 50)
    said, page = wrong_of(run)
    assert len(said) == 4 and said[-1] == "So are 47 more of its lines."
    assert len(page.all("figure")) == 4, "the entries that are whole are drawn"


def test_steps_that_float16_left_out_leave_gaps(tmp_path):
    skipped = LOG[1] | {"step": 3, "loss": None, "grad_norm": None, "loss_scale": 1024.0, "skipped": 1}
    run = write_run(tmp_path / "run", log=[*LOG[:3], skipped, LOG[4]])
    reports = report_on([run])
    assert not reports[0].run.wrong
    assert to_html(reports).count("1 value is not finite and not drawn.") == 2, "of the loss, and of the gradient"
    assert "2.7500" in to_markdown(reports)


def test_a_run_of_an_older_version_says_what_it_has_not_recorded(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps({name: ORIGIN[name] for name in ("origin", "versions", "id")}))
    (report,) = report_on([run])
    assert not report.run.wrong
    facts = {fact.name: fact.value for _, facts in report.sections for fact in facts}
    assert facts["family"] == facts["trained share"] == facts["memory of a step, predicted"] == "not recorded"
    assert [fact.name for fact in report.readings] == ["Evaluation loss", "Perplexity", "Training loss", "Speed"]


def test_the_best_is_told_where_the_best_is_saved(tmp_path):
    log = [*LOG[:4], LOG[4] | {"eval_loss": 3.5}]
    run = write_run(tmp_path / "run", log=log, config={"save": "best"})
    assert report_on([run])[0].readings[0] == ("Evaluation loss", "3.0000", "4.0000 before")


@pytest.mark.parametrize("made", [[], ["notes.txt"]])
def test_what_is_no_run_is_refused(tmp_path, made):
    for name in made:
        (tmp_path / name).write_text("")
    with pytest.raises(
        FileNotFoundError, match="is no run of `jlora finetune`: there is neither config.yaml nor metrics.jsonl"
    ):
        RunFiles.look(tmp_path)


# Several runs


def test_runs_beside_each_other(letters, tmp_path):
    other = write_run(
        tmp_path / "letters",
        config={"rank": 8, "learning_rate": 1e-3},
        log=LOG[:3],
        origin={"seconds": 59.6},
        adapter=False,
    )
    reports = report_on([letters, other])
    page = parse(to_html(reports))
    assert page.title == "2 runs · jlora report" and page.fetched == []
    names = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(names) == len(set(names))
    head = next(line for line in to_markdown(reports).splitlines() if line.startswith("| run |"))
    assert head == (
        "| run | rank | learning rate | steps | training loss | evaluation loss | perplexity | before | trained | tokens/s | "
        "memory of a step | time |"
    ), "of the settings those that differ"
    row = [
        str(other),
        "8",
        "0.001",
        "2 (not finished)",
        "3.5000",
        "3.0000",
        "20.09",
        "54.60",
        "2.50%",
        "200.0",
        "6.5 MiB",
    ]
    assert f"| {' | '.join(row)} | 1 min 0 s |" in to_markdown(reports)
    overlaid = json.loads(page.all("script", type="application/json")[0].text)
    assert [line["name"] for line in overlaid["series"]] == [str(letters), str(other)], "one name is two runs' here"
    assert overlaid["series"][1]["points"] == [[1, 4.25], [2, 3.5]]
    assert {e.attributes["href"] for e in page.all("a")} >= {"#table", "#run-1", "#run-2"}


def test_the_command(letters, tmp_path, call, fails):
    said = call("report", letters, "--output", tmp_path / "new").out
    assert said == f"{tmp_path / 'new' / 'report.html'} and report.md\n"
    assert (tmp_path / "new" / "report.html").read_text() == to_html(report_on([str(letters)]))
    first, second = write_run(tmp_path / "runs" / "a"), write_run(tmp_path / "runs" / "b", config={"rank": 4})
    call("report", first, second)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"a", "b", "report.html", "report.md"}
    assert "neither config.yaml nor metrics.jsonl" in fails("report", tmp_path)
    assert "Give at least one run" in fails("report")


def test_old_names_stay():
    from jlora.publish.card import RunRecord

    assert RunRecord is jlora.report.record.RunRecord
