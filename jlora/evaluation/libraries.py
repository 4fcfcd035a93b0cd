"""What well-kept libraries compute: sacrebleu's BLEU and chrF, rouge-score's ROUGE, jiwer's error rates."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jlora._typing import Float
from jlora.evaluation.example import Answers, Counts, Example, Unscorable, averaged, best, mean, rated, references


def needs(package: str) -> Any:
    """A module of a package that the extra `metrics` brings.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"This metric needs {package}: pip install 'jlora[metrics]'.") from error


def bleu(examples: Sequence[Example], answers: Answers) -> Counts:
    """sacrebleu's BLEU (13a, mixed case, exp smoothing), 0 to 100; of one example with the orders that it has."""
    made, alone = needs("sacrebleu").BLEU(), needs("sacrebleu").BLEU(effective_order=True)
    return _of_sacrebleu(made, 2 + 2 * made.max_ngram_order, examples, answers, alone)


def chrf(examples: Sequence[Example], answers: Answers) -> Counts:
    """sacrebleu's chrF2 (characters up to 6-grams), 0 to 100."""
    made = needs("sacrebleu").CHRF()
    return _of_sacrebleu(made, 3 * made.char_order, examples, answers, made)


def _of_sacrebleu(metric: Any, width: int, examples: Sequence[Example], answers: Answers, alone: Any) -> Counts:
    # The two steps of a `sacrebleu.metrics.base.Metric`, which sacrebleu's own bootstrap takes apart likewise.
    def score(example: Example, answer: str) -> Sequence[float]:
        ((*counts,),) = metric._extract_corpus_statistics([answer], [[text] for text in references(example)])
        return counts

    counts = rated(score, functools.partial(_by_sacrebleu, metric), width, examples, answers)
    return dataclasses.replace(counts, alone=functools.partial(_by_sacrebleu, alone))


def _by_sacrebleu(metric: Any, sums: Float[np.ndarray, "corpora counts"]) -> Float[np.ndarray, " corpora"]:
    return np.array([metric._compute_score_from_stats(row).score for row in sums.astype(int).tolist()])


def rouge(kind: str) -> Callable[[Sequence[Example], Answers], Counts]:
    """F-measure of rouge-score's `kind`, without stemming, 0 to 1."""

    def score(examples: Sequence[Example], answers: Answers) -> Counts:
        scorer = needs("rouge_score.rouge_scorer").RougeScorer([kind])
        tokens = needs("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=False).tokenize

        def one(example: Example, answer: str) -> float:
            if not any(map(tokens, references(example))):
                raise Unscorable("rouge-score reads letters a to z and digits only, and its reference has none")
            return best(lambda reference, text: scorer.score(reference, text)[kind].fmeasure, example, answer)

        return averaged(one, examples, answers)

    return score


def error_rate(process: str) -> Callable[[Sequence[Example], Answers], Counts]:
    """jiwer's error rate: substitutions, deletions and insertions for each word (`process_words`) or character
    (`process_characters`) of the references. Of several references the one that an answer is nearest to counts."""

    def score(examples: Sequence[Example], answers: Answers) -> Counts:
        function = getattr(needs("jiwer"), process)

        @functools.cache
        def edits(reference: str, answer: str) -> tuple[float, float]:
            found = function(reference, answer)
            wrong = found.substitutions + found.deletions
            return float(wrong + found.insertions), float(found.hits + wrong)

        def one(example: Example, answer: str) -> tuple[float, float]:
            said = [reference for reference in references(example) if reference.strip()]
            if not said:
                raise Unscorable("its reference says nothing")
            return min((edits(reference, answer) for reference in said), key=lambda pair: pair[0] / pair[1])

        return rated(one, mean, 2, examples, answers)

    return score
