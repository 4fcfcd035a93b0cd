"""Plain measures of text: a smoothed trigram baseline, n-gram overlap, and a unigram classifier.

The trigram model is the yardstick for the embedded tiny models.  A weak yardstick would prove nothing, so it is an
interpolated modified Kneser-Ney model (Chen and Goodman, 1998), with the discounts estimated from the counts.  Only
numpy and the standard library are used.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"\w+(?:'\w+)*")


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation."""
    return _WORD.findall(text.lower())


# ---------------------------------------------------------------------------------------------------------------------
# The trigram model.


@dataclass(frozen=True)
class _Order:
    """One order of the model: discounted counts by n-gram, and the interpolation weight by context."""

    keys: np.ndarray  # sorted codes of the seen n-grams
    probs: np.ndarray  # (count - discount) / total of the context, the same order
    contexts: np.ndarray  # sorted codes of the seen contexts
    weights: np.ndarray  # the mass that a context leaves to the next lower order

    @classmethod
    def fit(cls, keys: np.ndarray, counts: np.ndarray, vocab: int) -> "_Order":
        contexts, first = np.unique(keys // vocab, return_index=True)
        discount = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, first)
        removed = np.add.reduceat(discount, first)
        per_key = np.repeat(totals, np.diff(np.append(first, len(keys))))
        return cls(keys, (counts - discount) / per_key, contexts, removed / totals)

    def interpolate(self, keys: np.ndarray, lower: np.ndarray, vocab: int) -> np.ndarray:
        """The probability of the n-grams, given their probability at the lower order."""
        # A context that was never seen leaves everything to the lower order.
        return (
            _lookup(self.keys, self.probs, keys, 0.0) + _lookup(self.contexts, self.weights, keys // vocab, 1.0) * lower
        )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """The discounts of counts 0, 1, 2 and 3 or more."""
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        # Too little text for the estimate; 0.75 is the usual absolute discount (and a count of 1 keeps a quarter).
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.array([0.0, *(min(max(d, 0.05), k - 0.05) for k, d in enumerate(raw, start=1))])


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], default)


class TrigramModel:
    """An interpolated modified Kneser-Ney trigram model over token ids."""

    def __init__(self) -> None:
        self.vocab = 0
        self._orders: list[_Order] = []  # unigram, bigram, trigram

    def fit(self, ids: Sequence[int] | np.ndarray, vocab: int) -> "TrigramModel":
        ids = np.asarray(ids, dtype=np.int64)
        if ids.ndim != 1 or len(ids) < 3:
            raise ValueError(f"fit needs a flat sequence of at least 3 ids, got shape {ids.shape}")
        if vocab > 2_000_000:
            raise ValueError(f"a vocabulary of {vocab} overflows the 64-bit trigram codes")
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"ids must lie in [0, {vocab}), got [{ids.min()}, {ids.max()}]")
        self.vocab = vocab
        trigrams, counts = np.unique((ids[:-2] * vocab + ids[1:-1]) * vocab + ids[2:], return_counts=True)
        # Kneser-Ney: a lower order counts in how many different contexts an n-gram was seen, not how often.
        bigrams, spread = np.unique(trigrams % vocab**2, return_counts=True)
        unigrams, wide = np.unique(bigrams % vocab, return_counts=True)
        self._orders = [
            _Order.fit(unigrams, wide, vocab),
            _Order.fit(bigrams, spread, vocab),
            _Order.fit(trigrams, counts, vocab),
        ]
        return self

    def _probs(self, *columns: np.ndarray) -> np.ndarray:
        """p(last column | the columns before it), for one, two or three columns of ids."""
        vocab = self.vocab
        probs = np.full(len(columns[-1]), 1.0 / vocab)
        code, scale = np.zeros(len(columns[-1]), dtype=np.int64), 1
        for order, column in zip(self._orders, reversed(columns), strict=False):
            code, scale = code + column * scale, scale * vocab
            probs = order.interpolate(code, probs, vocab)
        return probs

    def log_probs(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The natural log-probability of each id given the (at most two) ids before it."""
        if not self._orders:
            raise ValueError("fit the model first")
        ids = np.asarray(ids, dtype=np.int64)
        probs = np.concatenate(
            [self._probs(ids[:1]), self._probs(ids[:1], ids[1:2]), self._probs(ids[:-2], ids[1:-1], ids[2:])]
        )
        return np.log(probs[: len(ids)])

    def distribution(self, *context: int) -> np.ndarray:
        """The probabilities of all ids after a context of at most two ids."""
        candidates = np.arange(self.vocab, dtype=np.int64)
        return self._probs(*(np.full_like(candidates, c) for c in context), candidates)

    def perplexity(self, ids: Sequence[int] | np.ndarray) -> float:
        return float(np.exp(-np.mean(self.log_probs(ids))))


# ---------------------------------------------------------------------------------------------------------------------
# Overlap and classification.


def _ngrams(tokens: list[str], n: int) -> list[str]:
    return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def ngram_overlap(samples: list[str], training_text: str, n: int = 8) -> float:
    """The share of the samples' word n-grams that occur in the training text (0.0 when there are none)."""
    wanted = Counter(gram for sample in samples for gram in _ngrams(words(sample), n))
    total = wanted.total()
    if total == 0:
        return 0.0
    # Only the samples' n-grams are kept in memory; the training text may have millions.
    tokens = words(training_text)
    seen = {gram for i in range(len(tokens) - n + 1) if (gram := " ".join(tokens[i : i + n])) in wanted}
    return sum(wanted[gram] for gram in seen) / total


def unigram_classifier_accuracy(a_train: list[str], b_train: list[str], a_test: list[str], b_test: list[str]) -> float:
    """The accuracy of naive Bayes over lower-cased words, fitted on the two train lists, on the two test lists."""
    if not a_test and not b_test:
        raise ValueError("there is nothing to classify: both test lists are empty")
    counts = [Counter(word for text in texts for word in words(text)) for texts in (a_train, b_train)]
    known = set(counts[0]) | set(counts[1])
    totals = [count.total() + len(known) for count in counts]
    prior = math.log((len(a_train) + 1) / (len(b_train) + 1))

    def says_a(text: str) -> bool:
        score = prior
        for word in words(text):
            if word in known:
                score += math.log((counts[0][word] + 1) / totals[0]) - math.log((counts[1][word] + 1) / totals[1])
        return score > 0

    right = sum(says_a(text) for text in a_test) + sum(not says_a(text) for text in b_test)
    return right / (len(a_test) + len(b_test))
