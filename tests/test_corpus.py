"""The text side of the embedded tiny models: the corpus generator, its assets, and the text metrics."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "examples" / "assets"
sys.path.insert(0, str(ROOT / "tools"))

import corpus  # noqa: E402
import text_metrics  # noqa: E402


def first(split, count, seed=0):
    return list(itertools.islice(corpus.documents(seed, split), count))


def word_set(texts):
    return {word for text in texts for word in text_metrics.words(text)}


def forms(entries):
    """All words that entries of the lexicon may show up as."""
    found = set()
    for entry in entries:
        head, _, value = entry.partition("=")
        inflected = [inflect(head) for inflect in (corpus.plural, corpus.past, corpus.gerund, corpus.ordinal)]
        found |= word_set([head, value, *inflected])
    return found


# The halves of town names never stand alone: the whole names are split by a hash instead.
SORTS = [sort for sort in corpus.sorts() if sort not in ("town1", "town2")]
HELDOUT_WORDS = set().union(*(forms(corpus.lexicon(sort)[2]) for sort in SORTS))


# ---------------------------------------------------------------------------------------------------------------------
# Documents.


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_documents_are_deterministic(split):
    assert first(split, 50, seed=3) == first(split, 50, seed=3)
    assert first(split, 50, seed=3) != first(split, 50, seed=4)


def test_seeds_of_the_two_splits_do_not_share_documents():
    assert not set(first("train", 300)) & set(first("heldout", 300))


def test_unknown_split():
    with pytest.raises(ValueError, match="split"):
        next(corpus.documents(0, "test"))


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_documents_are_clean(split):
    for document in first(split, 1000):
        assert document.isascii()
        assert not re.search(r"[{}<>~@|\x00\x01\[\]]|  | [,.?!]", document), document
        assert not re.search(r"\b[Aa] [aeio]", document.replace("a one", "")), document
        assert document == document.strip() and document[0] in '"ABCDEFGHIJKLMNOPQRSTUVWXYZ#'


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_every_alternative_expands(split):
    """No rule or sort that an alternative mentions is missing, and no alternative is dead."""
    reached = set()
    for seed in range(40):
        rng = corpus.random.Random(f"reach:{seed}")
        for _ in range(60):
            _, scene = corpus.document(rng, split)
            reached |= {(rule, used) for rule, options in scene.used.items() for used in options}
    every = {(rule, option) for rule in corpus.rules() for option in corpus.alternatives(rule, split)}
    assert reached <= every
    # An alternative that this document used before a reset of its rule is not listed, hence the slack.
    assert len(every - reached) <= 0.02 * len(every), every - reached


def test_text_has_the_length_and_the_documents():
    text = corpus.text(5, "train", 20_000)
    assert 20_000 <= len(text) < 22_000
    assert text.startswith(first("train", 1, seed=5)[0] + "\n\n")


def test_cli(capsys):
    assert corpus.main(["--split", "heldout", "--chars", "500", "--seed", "2"]) == 0
    assert capsys.readouterr().out == corpus.text(2, "heldout", 500)


def test_size_of_the_grammar():
    genres = [rule for rule in corpus.rules() if rule.startswith("doc_")]
    assert len(genres) >= 12
    assert sum(len(corpus.alternatives(rule, "train")) for rule in corpus.rules()) >= 300
    assert sum(len(corpus.alternatives(rule, "heldout")) for rule in corpus.rules()) >= 150


# ---------------------------------------------------------------------------------------------------------------------
# The two splits.


def test_templates_are_disjoint():
    def normal(alternative):
        return " ".join(text_metrics.words(re.sub(r"[{}<>*\[\]()]", " ", alternative)))

    train, heldout = (
        {normal(option) for rule in corpus.rules() for option in corpus.alternatives(rule, split)}
        for split in corpus.SPLITS
    )
    assert not train & heldout
    for rule in corpus.rules():
        assert corpus.alternatives(rule, "train") and corpus.alternatives(rule, "heldout"), rule


def test_groups_of_words_are_disjoint():
    for sort in corpus.sorts():
        shared, train, heldout = (set(group) for group in corpus.lexicon(sort))
        assert not shared & train and not shared & heldout and not train & heldout, sort
        assert len(shared) + len(train) + len(heldout) == sum(map(len, corpus.lexicon(sort))), (
            f"repeated word in {sort}"
        )


def test_heldout_words_are_absent_from_training():
    """By the tables: no held-out word is a word of a training template, nor a training word of another sort."""
    templates = word_set(option for rule in corpus.rules() for option in corpus.alternatives(rule, "train"))
    lexicon = set().union(*(forms(group) for sort in SORTS for group in corpus.lexicon(sort)[:2]))
    assert len(HELDOUT_WORDS) > 200
    assert not HELDOUT_WORDS & templates
    assert not HELDOUT_WORDS & lexicon


def test_heldout_words_are_absent_from_training_text():
    assert not HELDOUT_WORDS & word_set(first("train", 2000))


def test_heldout_documents_have_unseen_words():
    seen = word_set(first("train", 1500))
    documents = first("heldout", 300)
    assert all(word_set([document]) - seen for document in documents)
    # Not only names: the held-out words of the tables are used as well.
    assert np.mean([bool(word_set([document]) & HELDOUT_WORDS) for document in documents]) > 0.8


def test_splits_have_different_names():
    for seed in range(300):
        train, heldout = (corpus.Scene(corpus.random.Random(seed), split).person() for split in corpus.SPLITS)
        listed = {name for sort in ("fname", "mname") for name in corpus.lexicon(sort)[0]}
        assert train.name in listed or corpus.name_split(train.name) == "train"
        assert heldout.name in listed or corpus.name_split(heldout.name) == "heldout"


def test_fresh_documents_hardly_repeat_the_training_text():
    training = corpus.text(0, "train", 600_000)
    assert text_metrics.ngram_overlap(first("train", 200, seed=1), training) < 0.10


# ---------------------------------------------------------------------------------------------------------------------
# Language.


@pytest.mark.parametrize(
    ("inflect", "word", "expected"),
    [
        (corpus.past, "carry", "carried"),
        (corpus.past, "hide the key", "hid the key"),
        (corpus.past, "drop", "dropped"),
        (corpus.past, "keep", "kept"),
        (corpus.past, "play", "played"),
        (corpus.gerund, "hide", "hiding"),
        (corpus.gerund, "run", "running"),
        (corpus.third, "watch", "watches"),
        (corpus.third, "fly home", "flies home"),
        (corpus.plural, "cherry", "cherries"),
        (corpus.plural, "toy", "toys"),
        (corpus.plural, "knife", "knives"),
        (corpus.ordinal, "twelve", "twelfth"),
        (corpus.ordinal, "six", "sixth"),
    ],
)
def test_inflection(inflect, word, expected):
    assert inflect(word) == expected


def test_tidy():
    assert corpus.tidy('a owl sat. "my hat!" cried a honest cook.~"no?" he asked. the end.') == (
        'An owl sat. "My hat!" cried an honest cook.\n"No?" he asked. The end.'
    )


def test_second_mentions_repeat_the_first():
    scene = corpus.Scene(corpus.random.Random(0), "train")
    story = scene.expand("owner") + scene.expand("loss") + scene.expand("search")
    assert story.count(scene.bound["thing"]) >= 2
    assert scene.bound["a"].name in story


# ---------------------------------------------------------------------------------------------------------------------
# Assets.


def test_instruction_records():
    lines = (ASSETS / "instructions.jsonl").read_text(encoding="ascii").splitlines()
    records = [json.loads(line) for line in lines]
    assert records == corpus.instruction_records(0)
    assert len(records) >= 320
    assert len({(record["instruction"], record["input"]) for record in records}) == len(records)
    assert 0.25 < np.mean([bool(record["input"]) for record in records]) < 0.45
    for record in records:
        assert set(record) == {"instruction", "input", "output"}
        assert all(isinstance(value, str) and value.isascii() and value == value.strip() for value in record.values())
        assert 5 <= len(record["output"].split()) <= 40, record


def test_style_text():
    text = (ASSETS / "style.txt").read_text(encoding="ascii")
    paragraphs = text.strip().split("\n\n")
    assert 3500 <= len(text.split()) <= 5000
    assert len(set(paragraphs)) == len(paragraphs) >= 40
    assert all("\n" not in paragraph for paragraph in paragraphs)
    # The last tenth, which serves as validation text, speaks in the same voice.
    assert "dear ledger" in text[-len(text) // 10 :].lower()


def test_prompt():
    assert corpus.prompt("Sing.", preamble=False) == "### Instruction:\nSing.\n\n### Response:\n"
    full = corpus.prompt("Sing.", "A song.")
    assert full.startswith("Below is an instruction that describes a task, paired with an input")
    assert full.endswith("### Instruction:\nSing.\n\n### Input:\nA song.\n\n### Response:\n")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics.


@pytest.fixture(scope="module")
def byte_model():
    ids = np.frombuffer(corpus.text(0, "train", 200_000).encode(), dtype=np.uint8)
    return text_metrics.TrigramModel().fit(ids, 128)


@pytest.mark.parametrize("context", [(), (ord("e"),), (ord("t"), ord("h")), (ord("q"), ord("z")), (0, 0)])
def test_trigram_sums_to_one(byte_model, context):
    distribution = byte_model.distribution(*context)
    assert distribution.min() > 0
    assert distribution.sum() == pytest.approx(1.0, abs=1e-9)


def test_trigram_sums_to_one_on_tiny_data():
    model = text_metrics.TrigramModel().fit([0, 1, 2, 0, 1, 3, 0, 1, 2], 6)
    for context in [(), (0,), (5,), (0, 1), (4, 4)]:
        assert model.distribution(*context).sum() == pytest.approx(1.0, abs=1e-12)
    after = model.distribution(0, 1)
    assert after[2] > after[3] > after[5] > 0


def test_trigram_perplexity_is_sane(byte_model):
    def perplexity(text):
        return byte_model.perplexity(np.frombuffer(text.encode(), dtype=np.uint8))

    fresh = perplexity(corpus.text(1, "train", 20_000))
    heldout = perplexity(corpus.text(1, "heldout", 20_000))
    random = byte_model.perplexity(np.random.default_rng(0).integers(0, 128, 20_000))
    assert 3 < fresh < heldout < 20 < 128 < random


def test_trigram_log_probs_match_the_distributions(byte_model):
    ids = [ord(letter) for letter in "The fox"]
    expected = [np.log(byte_model.distribution(*ids[max(0, i - 2) : i])[ids[i]]) for i in range(len(ids))]
    np.testing.assert_allclose(byte_model.log_probs(ids), expected, rtol=1e-12)
    for n in (1, 2):
        np.testing.assert_allclose(byte_model.log_probs(ids[:n]), expected[:n], rtol=1e-12)


@pytest.mark.parametrize(
    ("ids", "vocab", "message"),
    [
        ([0, 1], 4, "at least 3"),
        ([[0, 1, 2]], 4, "flat"),
        ([0, 1, 4], 4, "ids must lie"),
        ([0, 1, 2], 10**7, "overflow"),
    ],
)
def test_trigram_rejects(ids, vocab, message):
    with pytest.raises(ValueError, match=message):
        text_metrics.TrigramModel().fit(ids, vocab)


def test_trigram_must_be_fitted():
    with pytest.raises(ValueError, match="fit"):
        text_metrics.TrigramModel().log_probs([1, 2, 3])


def test_ngram_overlap():
    training = "the fox ran home. the hen sat down, and the fox slept."
    assert text_metrics.ngram_overlap(["The fox ran home!"], training, n=3) == 1.0
    assert text_metrics.ngram_overlap(["a cow ran away"], training, n=3) == 0.0
    assert text_metrics.ngram_overlap(["the fox ran away", "the hen sat down"], training, n=3) == pytest.approx(3 / 4)
    assert text_metrics.ngram_overlap(["too short"], training, n=8) == 0.0
    # The end of one sample and the start of the next one make no n-gram.
    assert text_metrics.ngram_overlap(["ran home", "the hen"], training, n=3) == 0.0


def test_unigram_classifier():
    sea, land = ["the tide and the lamp", "a lamp at sea", "tide, tide"], ["a cow and a barn", "the barn door", "hay"]
    accuracy = text_metrics.unigram_classifier_accuracy
    assert accuracy(sea, land, ["the lamp at the tide"], ["hay in the barn"]) == 1.0
    assert accuracy(sea, land, ["hay in the barn"], ["the lamp at the tide"]) == 0.0
    assert accuracy(sea, land, ["tide", "barn"], []) == 0.5
    with pytest.raises(ValueError, match="empty"):
        accuracy(sea, land, [], [])
