"""Answers as words: exact match and F1 of tokens, as SQuAD's evaluation script has them."""

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and white space that says nothing.

    Reference: `normalize_answer` of https://rajpurkar.github.io/SQuAD-explorer (evaluation script 2.0).

    >>> normalized(" The  Cat, an  old one! ")
    'cat old one'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(reference: str, answer: str) -> float:
    return float(normalized(reference) == normalized(answer))


def token_f1(reference: str, answer: str) -> float:
    """Of the tokens that both have, with how often; where either has none, whether both have none."""
    wanted, given = normalized(reference).split(), normalized(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    both = (Counter(wanted) & Counter(given)).total()
    return 2 * both / (len(wanted) + len(given))
