"""Answers as labels of classes: accuracy, and F1 of each class."""

import string
from collections.abc import Sequence

import numpy as np

from jlora._typing import Float
from jlora.evaluation.example import Answers, Counts, Example, Unscorable, averaged, references


def label_of(text: str) -> str:
    """A label as it is compared: lower case, one space between words, no punctuation around it.

    >>> label_of(" **Very  Positive**. ")
    'very positive'
    """
    return " ".join(text.split()).strip(string.punctuation + string.whitespace).casefold()


def _wanted(example: Example) -> str:
    first, *others = references(example)
    if others:
        raise Unscorable("it has several references, and a label is one")
    if not label_of(first):
        raise Unscorable("its reference says nothing")
    return label_of(first)


def accuracy(examples: Sequence[Example], answers: Answers) -> Counts:
    return averaged(lambda example, answer: float(_wanted(example) == label_of(answer)), examples, answers)


def macro_f1(examples: Sequence[Example], answers: Answers) -> Counts:
    """The mean of the classes' F1; the classes are the labels of the references. An answer that is none of them misses its own
    class and counts against no other."""
    wanted: dict[int, str] = {}
    unscored: dict[int, str] = {}
    for i, example in enumerate(examples):
        try:
            wanted[i] = _wanted(example)
        except Unscorable as why:
            unscored[i] = str(why)
    names = {name: place for place, name in enumerate(sorted(set(wanted.values())))}
    rows, none = np.zeros((len(examples), 3, len(names))), 0
    for i, name in wanted.items():
        for answer in map(label_of, answers[i]):
            rows[i, 0, names[name]] += answer == name
            rows[i, 1, names[name]] += 1
            none += answer not in names
            if answer in names:
                rows[i, 2, names[answer]] += 1
    said = f"{none:,} answers are none of the labels {', '.join(map(repr, names))}" if none else ""
    return Counts(rows.reshape(len(examples), -1), _mean_of_classes, unscored, said=said)


def _mean_of_classes(sums: Float[np.ndarray, "corpora counts"]) -> Float[np.ndarray, " corpora"]:
    """Of rows (hits, references, answers) for each class. A class that is in none of a resample is left out of its mean."""
    hits, wanted, given = sums.reshape(len(sums), 3, -1).swapaxes(0, 1)
    there = wanted + given > 0
    each = np.divide(2 * hits, wanted + given, out=np.zeros_like(hits), where=there)
    return each.sum(axis=-1) / there.sum(axis=-1)
