"""docs/results.md is what benchmarks/study.py makes of its results, and its outcomes follow from the numbers."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import study_data  # noqa: E402
import study_page  # noqa: E402
import study_runs  # noqa: E402

import jlora.runs.loop  # noqa: E402


def _said(*turns):
    """Messages from "a: text" lines."""
    return [{"sender": turn[0], "text": turn[3:]} for turn in turns]


# ---- the page ---------------------------------------------------------------------------------------------------------


def _report():
    """A study whose runs all did the same but for what the tests change."""
    run = {
        "seconds": 60.0, "peak_rss_bytes": 2 * 10**9, "trained": 5_000_000, "base": 135_000_000, "base_bytes": 27 * 10**7,
        "step_bytes": 12 * 10**8, "passes": 0.25, "train_tokens": 80_000, "supervised_tokens": 20_000,
        "held_out_tokens": 2_500, "cut": 3, "base_loss": 4.0, "loss": 3.0, "evaluations": [[0, 4.0], [8, 3.2], [16, 3.0]],
        "train_losses": [4.0, 3.5, 3.0], "step_s": {"median": 2.0, "q25": 2.0, "q75": 2.0}, "file_bytes": 19_000_000,
    }  # fmt: skip
    runs = {name: copy.deepcopy(run) | {"trial": trial.record()} for name, trial in study.TRIALS.items()}
    runs["seed 1"]["loss"], runs["seed 2"]["loss"] = 3.01, 2.99
    answer = {"prompt": "Hi?", "base": "a | `b`\n\n[c](d)", "adapted": "<e> *f*", "kl": 0.3, "l2": 100.0}
    speed = {"median": 20.0, "q25": 20.0, "q75": 20.0}
    runs[study.USE] = {
        "trial": None, "seconds": 90.0, "peak_rss_bytes": 2 * 10**9, "answers": [answer] * 6,
        "model_bytes": {"file": 9 * 10**7, "float32": 54 * 10**7, "bfloat16": 27 * 10**7},
        "merged": {"logits": 30.0, "difference": 1e-5, "rows": 5, "equal_rows": 5},
        "leaks": {"base": 0, "adapted": 0}, "outside": {"base": 3.5, "adapted": 3.6},
        "decode_tokens_per_s": dict.fromkeys(("base", "adapter", "merged"), speed),
        "swap": {"compiled": 0, "equal": True}, "sampling": {"new_tokens": 48, "temperature": 0.7},
    }  # fmt: skip
    machine = {"cpu": "a CPU", "threads": 2, "isa": ["avx512f"], "versions": {"jax": "1", "flax": "2"}}
    settings = {"records": 1000, "held_out": 100, "steps": 16, "batch": 8}
    return {"machine": machine, "settings": settings, "runs": runs}


def _outcomes(report):
    return {claim: outcome for claim, _, outcome in study_page.claims(report["runs"])}


def test_the_page_is_what_the_script_writes():
    report = json.loads((ROOT / "benchmarks" / "results" / "study_cpu.json").read_text())
    assert study.missing(report["runs"]) == []
    assert (ROOT / "docs" / "results.md").read_text() == study_page.page_of(report)


def test_a_page_is_short_and_says_where_its_numbers_are_from():
    page = study_page.page_of(_report())
    assert len(page.splitlines()) <= 130
    assert "`benchmarks/study.py` from `benchmarks/results/study_cpu.json`" in page
    assert not re.search(r"\b(nan|inf)\b", page)


def test_what_a_model_wrote_stays_in_its_cell():
    page = study_page.page_of(_report())
    (row, *_) = [line for line in page.splitlines() if line.startswith("| Hi?")]
    assert row == "| Hi? | a &#124; &#96;b&#96;<br>&#91;c&#93;(d) | &lt;e> &#42;f&#42; |"


@pytest.mark.parametrize(
    "loss, outcome",
    [(2.9, "does not hold here"), (2.985, "within the noise"), (3.0, "within the noise"), (3.1, "holds")],
)
def test_an_outcome_is_that_of_the_numbers(loss, outcome):
    report = _report()
    report["runs"]["q and v"]["loss"] = loss
    assert _outcomes(report)["Adapt all linear layers"] == outcome


def test_rank_helps_where_it_gains_most():
    claim, report = "A higher rank helps most for its cost", _report()
    assert _outcomes(report)[claim] == "within the noise"
    report["runs"]["rank 64"]["loss"] = 2.9
    assert _outcomes(report)[claim] == "holds"
    report["runs"]["100 records"]["loss"] = 3.5
    assert _outcomes(report)[claim] == "does not hold here"


def test_a_run_that_diverged_is_one():
    claim, report = "5e-4 may diverge", _report()
    assert _outcomes(report)[claim] == "does not hold here"
    report["runs"]["rate 1e-3"] |= {"loss": None, "diverged": "Step 3 has loss nan"}
    assert _outcomes(report)[claim] == "at twice that it does"
    page = study_page.page_of(report)
    assert "diverged or worse than no training: 1e-3." in page
    assert not re.search(r"\bnan\b", page)


def test_a_study_goes_on_with_what_is_missing():
    runs = _report()["runs"]
    assert study.missing({}) == [*study.TRIALS, study.USE]
    del runs["DoRA"]
    runs["rank 8"]["trial"]["rank"] = 4
    assert study.missing(runs) == ["rank 8", "DoRA"]
    del runs["seed 1"]
    assert study.missing(runs) == ["seed 1", "rank 8", "DoRA", study.USE]


def test_a_study_with_other_settings_or_on_another_machine_is_refused(tmp_path):
    args = study.Args(output=tmp_path / "study.json")
    settings, machine = {"steps": 1}, {"cpu": "a CPU", "commit": "a"}
    assert study.begun(args, settings, machine) == {}
    args.output.write_text(json.dumps({"settings": settings, "machine": machine, "runs": {"default": {}}}))
    assert study.begun(args, settings, machine | {"commit": "b"}) == {"default": {}}
    for other in (({"steps": 2}, machine), (settings, machine | {"cpu": "another"})):
        with pytest.raises(SystemExit, match="is of another study"):
            study.begun(args, *other)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["adapter", "full", "diverged"])
def test_a_run_finds_what_the_page_needs(how, tmp_path, monkeypatch):
    for module, name in ((jlora.runs.steps, "planned"), (jlora.runs.loop, "predicted")):
        monkeypatch.setattr(module, name, getattr(module, name))  # taken back after the test
    lines = study.TEXT.read_text().splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    for name, text in zip(study_runs.FILES["text-350"], (lines[:2], lines[2:8]), strict=True):
        (tmp_path / "data" / name).write_text("".join(text))
    task = study_runs.Task(
        name="run", trial=None, model=str(ROOT / "examples" / "assets" / "tiny-gpt2"), place=str(tmp_path), steps=4, batch=2
    )  # fmt: skip
    rate = {"adapter": 5e-3, "full": 1e-3, "diverged": 1e30}[how]
    trial = study_runs.Trial(data="text-350", how="full" if how == "full" else "adapter", learning_rate=rate)
    found = (study_runs.train_full if how == "full" else study_runs.train_adapter)(task, trial)
    assert found["step_bytes"] > found["base_bytes"] and found["train_tokens"] > 50
    assert (found["base"] == 0) == (how == "full")
    if how == "diverged":
        assert found["loss"] is None and "diverged" in found["diverged"]
        return
    assert found["loss"] < found["base_loss"] and len(found["train_losses"]) == 4
    assert found["step_s"]["median"] > 0
    if how == "adapter":
        assert found["factors"] == found["trained"] and [step for step, _ in found["evaluations"]] == [0, 1, 2, 3, 4]


# ---- the data ---------------------------------------------------------------------------------------------------------


def test_messages_of_one_speaker_are_one_turn():
    record = study_data.record_of(_said("a: Hello ", "a:  there", "b: Hi\n you", "a: ", "b: Well?"))
    assert record == {
        "messages": [
            {"role": "user", "content": "Hello\nthere"},
            {"role": "assistant", "content": "Hi you\nWell?"},
        ]
    }


def test_a_record_ends_with_an_answer():
    record = study_data.record_of(_said("b: One", "a: Two", "b: Three"))
    assert record is not None and [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
    assert study_data.record_of(_said("a: One", "a: Two")) is None
    assert study_data.record_of(_said("a: One", "b: ")) is None
    assert study_data.record_of([]) is None


def test_a_record_is_an_opening():
    turns = _said("a: 12345", "b: 12345", "a: 12345", "b: 123456")
    counts = {n: study_data.record_of(turns, characters=n) for n in (9, 10, 20, 21)}
    assert {n: record and len(record["messages"]) for n, record in counts.items()} == {9: None, 10: 2, 20: 2, 21: 4}


def test_records_are_chosen_once_each_and_the_same_again():
    records = [{"messages": [{"role": "user", "content": str(i % 20)}]} for i in range(30)]
    chosen = study_data.choose(records, {"held-out": 5, "train": 15})
    texts = [record["messages"][0]["content"] for records in chosen.values() for record in records]
    assert len(texts) == len(set(texts)) == 20
    assert chosen == study_data.choose(records, {"held-out": 5, "train": 15})
    assert chosen["held-out"] == study_data.choose(records, {"held-out": 5, "train": 10})["held-out"]
    with pytest.raises(ValueError, match="21 records are asked for; there are 20"):
        study_data.choose(records, {"train": 21})


def test_a_text_is_cut_between_its_paragraphs():
    text = "one two\nthree\nfour five\nsix\n"
    assert study_data.cut_text(text, (1, 3), lambda text: len(text.split())) == (
        ["one two\n", "one two\nthree\n"],
        "four five\nsix\n",
    )
