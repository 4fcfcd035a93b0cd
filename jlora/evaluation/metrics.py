"""The metrics by name: what each needs, how it scores, and which way is better."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from jlora.evaluation import words
from jlora.evaluation.code import Sandbox, pass_at
from jlora.evaluation.embedding import Embedder, cosine
from jlora.evaluation.example import Answers, Counts, Example, averaged, best
from jlora.evaluation.fields import json_fields, json_valid
from jlora.evaluation.labels import accuracy, macro_f1
from jlora.evaluation.libraries import bleu, chrf, error_rate, needs, rouge
from jlora.evaluation.refusals import refusal
from jlora.tree.modules import nearest

Need: TypeAlias = Literal["references", "tests", "embedder"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """What some metrics need besides answers."""

    embedder: Embedder | None = None
    sandbox: Sandbox = dataclasses.field(default_factory=Sandbox)


Score: TypeAlias = Callable[[Sequence[Example], Answers, Tools], Counts]


class Metric(NamedTuple):
    says: str
    """What it is, in a few words."""
    score: Score
    better: Literal["higher", "lower", "neither"] = "higher"
    need: Need | None = "references"
    package: str | None = None
    """That computes it, where it comes with the extra `metrics`."""
    answers: int = 1
    """It needs so many of each example."""
    digits: int = 3
    """Behind the point, where it is shown."""


def _corpus(score: Callable[[Sequence[Example], Answers], Counts]) -> Score:
    return lambda examples, answers, tools: score(examples, answers)


def _each(score: Callable[[Example, str], float]) -> Score:
    return _corpus(functools.partial(averaged, score))


def _nearest_reference(score: Callable[[str, str], float]) -> Score:
    return _each(lambda example, answer: best(score, example, answer))


def _cosine(examples: Sequence[Example], answers: Answers, tools: Tools) -> Counts:
    assert tools.embedder is not None
    return cosine(tools.embedder, examples, answers)


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric("the answer is a reference, as SQuAD compares them", _nearest_reference(words.exact_match)),
    "f1": Metric("F1 of tokens, SQuAD's", _nearest_reference(words.token_f1)),
    "accuracy": Metric("the answer is the reference's label", _corpus(accuracy)),
    "macro_f1": Metric("F1 of labels, the mean of the classes", _corpus(macro_f1)),
    "wer": Metric("word errors a word", _corpus(error_rate("process_words")), "lower", package="jiwer"),
    "cer": Metric("character errors a character", _corpus(error_rate("process_characters")), "lower", package="jiwer"),
    "bleu": Metric("sacrebleu's BLEU, of 100", _corpus(bleu), package="sacrebleu", digits=1),
    "chrf": Metric("sacrebleu's chrF2, of 100", _corpus(chrf), package="sacrebleu", digits=1),
    **{
        kind: Metric(f"rouge-score's {kind}, F-measure", _corpus(rouge(kind)), package="rouge_score")
        for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    },
    "json_valid": Metric("the answer is JSON", _each(json_valid), need=None),
    "json_fields": Metric("fields of the JSON that agree", _each(json_fields)),
    "refusal": Metric(
        "the answer declines, in English", _each(lambda _, answer: refusal(answer)), "neither", need=None
    ),
    "embedding": Metric("cosine of mean hidden states", _cosine, need="embedder"),
}
GROUPS: Mapping[str, tuple[str, ...]] = {"rouge": ("rouge1", "rouge2", "rougeL")}
"""Names for several."""
_PASS = re.compile(r"pass@([1-9]\d{0,3})")


def metrics_named(names: Iterable[str]) -> dict[str, Metric]:
    """Name -> metric, in the order given. `pass@k` is one for every k.

    Raises:
        ValueError: there is no such metric.
        ImportError: a metric's package is not installed.
    """
    found: dict[str, Metric] = {}
    for given in names:
        for name in GROUPS.get(given, (given,)):
            passing = _PASS.fullmatch(name)
            if passing is None and name not in METRICS:
                known = (*METRICS, *GROUPS, "pass@1")
                raise ValueError(
                    f"There is no metric {name!r}; there are {', '.join(known)} (and pass@k of any other k).{nearest(name, known)}"
                )
            found[name] = METRICS[name] if passing is None else _pass_metric(int(passing[1]))
    for metric in found.values():
        if metric.package is not None:
            needs(metric.package)
    return found


def _pass_metric(k: int) -> Metric:
    def score(examples: Sequence[Example], answers: Answers, tools: Tools) -> Counts:
        return pass_at(k, tools.sandbox, examples, answers)

    return Metric(f"one of {k} answers passes its tests", score, need="tests", answers=k)
