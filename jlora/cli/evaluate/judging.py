"""A model as the judge of the answers of each adapter."""

from collections.abc import Mapping
from typing import NamedTuple

from jlora._typing import JsonObject
from jlora.cli.evaluate.answers import Answered, Asked, with_bar
from jlora.cli.evaluate.options import Evaluate
from jlora.cli.models import BASE
from jlora.evaluation import Endpoint, Estimate, Judgement, Pair, estimate, judged, reasons, win_rate

REFERENCE = "reference"


class Verdicts(NamedTuple):
    """Of pairs of answers to the same examples."""

    of: str
    against: str
    judgements: list[Judgement]
    rate: Estimate
    """Wins and half of the ties, of what was judged."""
    unscored: list[JsonObject]

    def to_json(self) -> JsonObject:
        scores = [judgement.score for judgement in self.judgements]
        return {
            "of": self.of,
            "against": self.against,
            "win_rate": self.rate.value,
            "low": self.rate.low,
            "high": self.rate.high,
            "examples": self.rate.examples,
            "wins": scores.count(1.0),
            "ties": scores.count(0.5),
            "losses": scores.count(0.0),
            "followed_the_order": sum(judgement.follows_order for judgement in self.judgements),
            "unscored": self.unscored,
        }


def judge_models(
    options: Evaluate, endpoint: Endpoint, asked: Asked, answers: Mapping[str, Answered]
) -> list[Verdicts]:
    """Each model's (first) answers against the base's, where that was asked too, or else against the first reference."""
    against = BASE if BASE in answers and len(answers) > 1 else REFERENCE
    found = []
    for name, answered in answers.items():
        if name == against:
            continue
        places, pairs = [], []
        for i, example in enumerate(asked.examples):
            other = answers[BASE].texts[i][0] if against == BASE else next(iter(example.references), None)
            if other is not None:
                right = next(iter(example.references), None) if against == BASE else None
                places.append(i)
                pairs.append(Pair(example.prompt, answered.texts[i][0], other, right))
        given = dict(zip(places, with_bar(judged(endpoint.ask, pairs), len(pairs), f"{name} is judged"), strict=True))
        none = Judgement(None, None, "it has no reference to be held against")
        judgements = [given.get(i, none) for i in range(len(asked.examples))]
        counts = win_rate(judgements)
        rate = estimate(counts, resamples=options.bootstrap, seed=options.sampling_seed)
        unscored = reasons({asked.examples[i].where: why for i, why in counts.unscored.items()})
        found.append(Verdicts(name, against, judgements, rate, unscored))
    return found
