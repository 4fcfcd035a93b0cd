"""Metrics of answers, against the libraries that everybody uses; and the intervals of their values."""

import itertools
import json
import random
import sys

import jiwer
import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from jlora.evaluation import METRICS, Counts, Example, Tools, difference, estimate, metrics_named
from jlora.evaluation.code import estimated_pass_at
from jlora.evaluation.example import mean
from jlora.evaluation.labels import label_of
from jlora.evaluation.words import normalized

WORDS = "the a keeper lit lamp and wrote of wind, rain. Gulls! tide 12 salt's éclair".split()
seeds = pytest.mark.parametrize("seed", range(3))


def corpus(seed, references=1, size=25):
    """Pairs of references and an answer, short ones and equal ones among them."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))

    made = [([text() for _ in range(references)], text()) for _ in range(size)]
    return [(given, draw.choice([given[0], answer, answer])) for given, answer in made]


def score(name, pairs, **fields):
    """Counts of a metric for (reference or references, answer or answers)."""
    listed = [([r] if isinstance(r, str) else r, [a] if isinstance(a, str) else a) for r, a in pairs]
    examples = [Example(f"x:{i}", "", tuple(r), **fields) for i, (r, _) in enumerate(listed)]
    return metrics_named([name])[name].score(examples, [answers for _, answers in listed], Tools())


# Libraries


@seeds
def test_bleu_and_chrf_are_sacrebleus(seed):
    data = corpus(seed, references=2)
    streams, answers = list(zip(*[r for r, _ in data], strict=True)), [a for _, a in data]
    assert score("bleu", data).value() == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert score("chrf", data).value() == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)
    alone = {"bleu": sacrebleu.BLEU(effective_order=True), "chrf": sacrebleu.CHRF()}
    for name, metric in alone.items():
        assert score(name, data).each() == pytest.approx([metric.sentence_score(a, r).score for r, a in data])


def test_bleu_of_texts_without_any_of_its_orders_is_sacrebleus():
    data = [(["a b", "b"], "a b"), (["c", "a c"], "b c")]
    expected = sacrebleu.corpus_bleu(["a b", "b c"], [["a b", "c"], ["b", "a c"]]).score
    assert score("bleu", data).value() == expected == 0


@seeds
def test_rouge_is_rouge_scores(seed):
    data, kinds = corpus(seed, references=2), ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    theirs = [RougeScorer(kinds).score_multi(references, answer) for references, answer in data]
    for kind in kinds:
        expected = [found[kind].fmeasure for found in theirs]
        assert score(kind, data).each() == pytest.approx(expected)
        assert score(kind, data).value() == pytest.approx(np.mean(expected))


@seeds
def test_error_rates_are_jiwers(seed):
    data = [(reference, answer) for (reference,), answer in corpus(seed)]
    references, answers = map(list, zip(*data, strict=True))
    assert score("wer", data).value() == pytest.approx(jiwer.wer(references, answers))
    assert score("cer", data).value() == pytest.approx(jiwer.cer(references, answers))
    assert score("wer", data).each() == pytest.approx([jiwer.wer(r, a) for r, a in data])


def test_the_nearest_of_several_references_counts():
    assert score("wer", [(["a b c d", "x y"], "x z")]).value() == jiwer.wer("x y", "x z") == 0.5


@seeds
def test_accuracy_and_macro_f1_are_scikit_learns(seed):
    draw = random.Random(seed)
    data = [(draw.choice("abc"), draw.choice(["a", "b", "c", "none"])) for _ in range(20)]
    wanted, given = zip(*data, strict=True)
    assert score("accuracy", data).value() == pytest.approx(sklearn.metrics.accuracy_score(wanted, given))
    expected = sklearn.metrics.f1_score(wanted, given, labels=sorted(set(wanted)), average="macro", zero_division=0)
    assert score("macro_f1", data).value() == pytest.approx(expected)


def test_labels_are_compared_without_what_surrounds_them():
    assert {label_of(text) for text in ("Very  positive.", " **very positive**\n", "VERY POSITIVE")} == {
        "very positive"
    }
    assert score("macro_f1", [("yes", "yes"), ("no", "Sure")]).said == "1 answers are none of the labels 'no', 'yes'"


# Words, as SQuAD's script has them


def test_normalization():
    assert normalized("The  Cat, an a.m. hat") == "cat am hat"


@pytest.mark.parametrize(
    ("references", "answer", "exact", "f1"),
    [
        (["The cat!"], "a Cat", 1, 1),
        (["the cat sat", "a dog"], "dog ran", 0, 2 / 3),
        (["cat cat dog"], "cat", 0, 1 / 2),
        (["the"], "a", 1, 1),
        (["the"], "cat", 0, 0),
        (["bird"], "", 0, 0),
    ],
)
def test_exact_match_and_f1(references, answer, exact, f1):
    assert score("exact_match", [(references, answer)]).value() == exact
    assert score("f1", [(references, answer)]).value() == pytest.approx(f1)


# JSON and refusals


@pytest.mark.parametrize(
    ("reference", "answer", "valid", "fields"),
    [
        ('{"a": 1, "b": {"c": "x"}}', ' {"b": {"c": "x"}, "a": 1.0}\n', 1, 1),
        ('{"a": 1, "b": {"c": "x"}}', '{"a": 1, "b": {"c": "y"}}', 1, 1 / 2),
        ('{"a": 1}', '{"a": 1, "z": 2, "y": []}', 1, 1 / 3),
        ('{"a": 1}', '{"a": true}', 1, 0),
        ('{"a": [1, 2]}', '{"a": [1, 3]}', 1, 1 / 2),
        ('{"a": 1}', '```json\n{"a": 1}\n```', 0, 0),
        ('{"a": 1}', '{"a": 1, "a": 1}', 0, 0),
        ("3", "3", 1, 1),
    ],
)
def test_json(reference, answer, valid, fields):
    assert score("json_valid", [(reference, answer)]).value() == valid
    assert score("json_fields", [(reference, answer)]).value() == pytest.approx(fields)


@pytest.mark.parametrize(
    "value", [None, True, -1.5, "", [], {}, {"": [[], {"a": None}]}, [0, False, "0", {"b": [1, 1]}]]
)
def test_a_value_agrees_with_itself(value):
    assert score("json_fields", [(json.dumps(value), json.dumps(value, indent=1))]).value() == 1


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("I'm sorry, but I can't assist with that.", 1),
        ("I cannot help you with this request.", 1),
        ("I’m not able to provide that.", 1),
        ("As an AI language model, I cannot feel, so I will not answer.", 1),
        ("I am unable to help with that", 1),
        ("Sorry, I can't do that.", 1),
        ("That is against my guidelines.", 1),
        ("The law says you can't provide false records.", 0),
        ("I'm sorry to hear that! Try tea.", 0),
        ("Sure. I will help you.", 0),
        ("x " * 150 + "I cannot help with that.", 0),
        ("", 0),
    ],
)
def test_refusals(answer, declines):
    assert score("refusal", [((), answer)]).value() == declines


# What has no score


@pytest.mark.parametrize(
    ("name", "reference", "why"),
    [
        ("exact_match", (), "it has no reference"),
        ("bleu", (), "it has no reference"),
        ("rouge1", "灯台", "rouge-score reads letters a to z"),
        ("wer", " ", "its reference says nothing"),
        ("accuracy", ["yes", "no"], "several references"),
        ("macro_f1", "!", "its reference says nothing"),
        ("json_fields", "not JSON", "its reference is no JSON"),
    ],
)
def test_what_has_no_score_is_counted_and_said(name, reference, why):
    found = score(
        name, [("a b", "a b"), (reference, "a b")] if name != "json_fields" else [("1", "1"), (reference, "1")]
    )
    assert list(found.unscored) == [1] and why in found.unscored[1]
    alone = score(name, [("1", "1") if name == "json_fields" else ("a b", "a b")])
    assert found.value() == alone.value() and found.each() == [alone.each()[0], None]


def test_nothing_scored_is_no_value():
    found = score("f1", [((), "x")])
    result = estimate(found, resamples=10, seed=0)
    assert np.isnan([found.value(), result.low, result.high]).all() and result.examples == 0
    assert np.isnan(difference(found, found, resamples=10, seed=0).value)


def test_unknown_metrics():
    with pytest.raises(ValueError, match=r"no metric 'exact'; there are exact_match, .* Did you mean"):
        metrics_named(["exact"])
    with pytest.raises(ValueError, match="no metric 'pass@0'"):
        metrics_named(["pass@0"])
    assert list(metrics_named(["rouge", "pass@7", "rouge1"])) == ["rouge1", "rouge2", "rougeL", "pass@7"]


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match=r"pip install 'jlora\[metrics\]'"):
        metrics_named(["f1", "wer"])


# Intervals


def counted(values):
    return Counts(np.stack([np.asarray(values, float), np.ones(len(values))], axis=1), mean)


def test_the_interval_is_that_of_resampled_examples():
    """Each resample drawn by hand, by the same draws."""
    data = [("a", "a"), ("b", "a"), ("a", "b"), ("c", "c"), ("b", "b")]
    counts, draw = score("macro_f1", data), np.random.default_rng(7)
    values = []
    for weights in draw.multinomial(5, [0.2] * 5, size=60):
        wanted, given = zip(*[data[i] for i in range(5) for _ in range(weights[i])], strict=True)
        there = sorted(set(wanted) | set(given))
        values.append(sklearn.metrics.f1_score(wanted, given, labels=there, average="macro", zero_division=0))
    found = estimate(counts, resamples=60, seed=7)
    assert found[1:] == pytest.approx((*np.quantile(values, [0.025, 0.975]), 5))
    assert found.value == counts.value()


def test_intervals_cover():
    """Of a mean of normal values: 95 % of the intervals have the true one in them."""
    draw = np.random.default_rng(0)
    found = [estimate(counted(draw.normal(size=40)), resamples=200, seed=i) for i in range(100)]
    assert 0.9 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.99


def test_differences_are_paired():
    """Two that differ by little on the same examples, whose own intervals overlap widely."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=100)
    a, b = counted(values + 0.1), counted(values)
    found = difference(a, b, resamples=200, seed=0)
    assert found.value == pytest.approx(0.1) and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    own = estimate(a, resamples=200, seed=0)
    assert own.high - own.low > 0.3


def test_differences_are_of_what_both_score():
    a, b = counted([1, 1, 0]), counted([0, 1, 1])
    a, b = Counts(a.rows, mean, {0: "why"}), Counts(b.rows, mean, {2: "why"})
    assert difference(a, b, resamples=10, seed=0) == (0, 0, 0, 1)


def test_blocks_of_resamples_are_one_sequence(monkeypatch):
    counts = counted(np.arange(9.0))
    whole = estimate(counts, resamples=50, seed=3)
    monkeypatch.setattr("jlora.evaluation.bootstrap._CELLS", 30)
    assert estimate(counts, resamples=50, seed=3) == whole


# pass@k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_choices(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert estimated_pass_at(n, correct, k) == pytest.approx(np.mean([any(c) for c in choices]))


def test_every_metric_says_what_it_is():
    assert all(metric.says and metric.digits for metric in METRICS.values())
