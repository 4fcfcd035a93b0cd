"""Several models' answers to the same examples, scored and set side by side."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jlora._typing import JsonObject
from jlora.evaluation.bootstrap import Estimate, difference, estimate
from jlora.evaluation.example import Answers, Counts, Example
from jlora.evaluation.metrics import Metric, Tools


class Results(NamedTuple):
    """By model and metric, in the order in which they were given."""

    metrics: Mapping[str, Metric]
    counts: Mapping[str, Mapping[str, Counts]]
    estimates: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[tuple[str, str], Mapping[str, Estimate]]
    """(later model, earlier model) -> by how much the later one is above, on the examples that both score."""

    def unscored(self, model: str, metric: str, examples: Sequence[Example]) -> list[JsonObject]:
        """Why examples have no score, how many, and where the first is; the most frequent reason first."""
        return reasons({examples[i].where: why for i, why in self.counts[model][metric].unscored.items()})


def scored(
    examples: Sequence[Example],
    answers: Mapping[str, Answers],
    metrics: Mapping[str, Metric],
    tools: Tools,
    *,
    resamples: int,
    seed: int,
) -> Results:
    """
    Args:
        answers: model -> its answers to each example.
        resamples, seed: of the bootstrap.
    """
    counts = {
        model: {name: metric.score(examples, given, tools) for name, metric in metrics.items()}
        for model, given in answers.items()
    }
    drawn = {"resamples": resamples, "seed": seed}
    return Results(
        metrics,
        counts,
        {model: {name: estimate(found, **drawn) for name, found in of.items()} for model, of in counts.items()},
        {
            (later, earlier): {
                name: difference(counts[later][name], counts[earlier][name], **drawn) for name in metrics
            }
            for earlier, later in itertools.combinations(answers, 2)
        },
    )


def reasons(places: Mapping[str, str]) -> list[JsonObject]:
    """Of place -> reason: each reason, how many have it, and the first of them."""
    first: dict[str, str] = {}
    for where, why in places.items():
        first.setdefault(why, where)
    return [{"why": why, "count": n, "first": first[why]} for why, n in Counter(places.values()).most_common()]
