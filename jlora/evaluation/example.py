"""What is scored, and what scoring gives: rows of counts, which are added up."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from jlora._typing import Float, Json


class Example(NamedTuple):
    """A prompt that was answered, and what the answers are held against."""

    where: str
    """Its place, such as "tasks.jsonl:3"."""
    prompt: str
    """As people read it."""
    references: tuple[str, ...] = ()
    """Right answers, of which an answer needs to be like one."""
    tests: str | None = None
    """Python that runs behind an answer and fails where it is wrong."""


Answers: TypeAlias = Sequence[Sequence[str]]
"""Of each example, one or more."""

Total: TypeAlias = Callable[[Float[np.ndarray, "corpora counts"]], Float[np.ndarray, " corpora"]]
"""The value of a corpus from the sum of the rows of its examples."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """A row for each example; the value of a corpus is a function of the sum of its rows."""

    rows: Float[np.ndarray, "examples counts"]
    total: Total
    unscored: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Example -> why it has no score. Its row counts nothing."""
    notes: Mapping[int, Json] = dataclasses.field(default_factory=dict)
    """Example -> what else there is to say of it."""
    alone: Total | None = None
    """The value of one example, where that is not the value of a corpus of one."""
    said: str = ""
    """What there is to say of the whole."""

    def scored(self) -> list[int]:
        return [i for i in range(len(self.rows)) if i not in self.unscored]

    def value(self) -> float:
        """Of all that is scored; NaN where nothing is."""
        return self.value_of(self.scored())

    def value_of(self, examples: Sequence[int]) -> float:
        """Of some of the scored examples; NaN of none."""
        return float(self.total(self.rows[list(examples)].sum(axis=0, keepdims=True))[0]) if examples else float("nan")

    def each(self) -> list[float | None]:
        """The value of each example alone."""
        kept = self.scored()
        values = (self.alone or self.total)(self.rows[kept]) if kept else np.empty(0)
        found = dict(zip(kept, values.tolist(), strict=True))
        return [found.get(i) for i in range(len(self.rows))]


class Unscorable(Exception):
    """An example has no score, whatever was answered; its text is why."""


def mean(sums: Float[np.ndarray, "corpora counts"]) -> Float[np.ndarray, " corpora"]:
    """The total of rows (sum, number)."""
    return sums[..., 0] / sums[..., 1]


def rated(
    score: Callable[[Example, str], Sequence[float]],
    total: Total,
    width: int,
    examples: Sequence[Example],
    answers: Answers,
) -> Counts:
    """A row for each answer; several answers of an example add up.

    Args:
        score: the row of an answer, `width` long. Raises `Unscorable`.
    """
    rows, unscored = np.zeros((len(examples), width)), {}
    for i, (example, given) in enumerate(zip(examples, answers, strict=True)):
        try:
            rows[i] = np.sum([score(example, answer) for answer in given], axis=0)
        except Unscorable as why:
            unscored[i] = str(why)
    return Counts(rows, total, unscored)


def averaged(score: Callable[[Example, str], float], examples: Sequence[Example], answers: Answers) -> Counts:
    """`rated`, by a number for each answer, of which the mean is the corpus's."""
    return rated(lambda example, answer: (score(example, answer), 1.0), mean, 2, examples, answers)


def best(score: Callable[[str, str], float], example: Example, answer: str) -> float:
    """The score against the reference that an answer is most like."""
    return max(score(reference, answer) for reference in references(example))


def references(example: Example) -> tuple[str, ...]:
    """
    Raises:
        Unscorable: there is none.
    """
    if not example.references:
        raise Unscorable("it has no reference")
    return example.references
