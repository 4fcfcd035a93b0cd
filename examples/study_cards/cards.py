"""Flash cards: how a model is asked for them, how one is read from what it writes, and the files they go to.

Small models copy a form better than they follow its description. So the prompt is a conversation in which cards of other topics
have been written already, each card that is accepted becomes its next turn, and the answer is begun for the model: "Q:".
"""

import csv
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["easy", "medium", "hard"]
Messages = list[dict[str, str]]
Write = Callable[[Messages, str, int], Iterator[str]]
"""(a conversation, how its next turn begins, seed) -> the text of the turn from there on, growing."""

BEGINS = "Q:"
MAX_TOPIC, MAX_COUNT = 80, 12
_TRIES = 4
_LONGEST = {"question": 200, "answer": 300}


@dataclass(frozen=True)
class Card:
    question: str
    answer: str

    def __str__(self) -> str:
        return f"{BEGINS} {self.question}\nA: {self.answer}"


_SYSTEM = "You write flash cards for students. A card is one short question and its short, correct answer."
_ASKS: dict[Level, str] = {
    "easy": "Write an easy flash card about {topic}, for a beginner.",
    "medium": "Write a flash card about {topic}, for a student who knows the basics.",
    "hard": "Write a hard flash card about {topic}, for an examination.",
}
_SHOWN: dict[Level, dict[str, Card]] = {
    "easy": {
        "bread": Card("What makes bread dough rise?", "Yeast, which gives off gas as it feeds on sugar."),
        "the moon": Card("How long does the moon take to go around the Earth?", "About 27 days."),
    },
    "medium": {
        "bread": Card(
            "Why is dough kneaded?", "Kneading links the proteins of the flour to gluten, which holds the gas."
        ),
        "the moon": Card(
            "Why do we always see the same side of the moon?", "It turns once on its axis in the time of one orbit."
        ),
    },
    "hard": {
        "bread": Card(
            "Why does bread go stale faster in a refrigerator than at room temperature?",
            "Starch crystallizes again fastest a little above freezing, and the crumb becomes firm.",
        ),
        "the moon": Card(
            "Why does the moon move a little farther from the Earth each year?",
            "Tides slow the Earth's rotation, and its angular momentum goes to the moon's orbit.",
        ),
    },
}


def topic_of(text: str) -> str:
    """What was typed, on one line.

    Raises:
        ValueError: for nothing, and for more than a topic.
    """
    topic = " ".join(text.split())
    if not topic:
        raise ValueError("Type a topic first: volcanoes, French verbs, the French Revolution.")
    if len(topic) > MAX_TOPIC:
        raise ValueError(f"A topic has at most {MAX_TOPIC} characters; this one has {len(topic)}. Shorten it.")
    return topic


def conversation(topic: str, level: Level, cards: Sequence[Card]) -> Messages:
    """What the next card is the answer to."""
    turns = [(_ASKS[level].format(topic=other), card) for other, card in _SHOWN[level].items()]
    turns += [(_ASKS[level].format(topic=topic), card) for card in cards]
    messages = [{"role": "system", "content": _SYSTEM}]
    for asked, card in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": str(card)}]
    return [*messages, {"role": "user", "content": _ASKS[level].format(topic=topic)}]


def read(text: str, *, ended: bool) -> Card | None:
    """The card that an answer begins with, after "Q:"; None where it is no card, or not yet a whole one.

    Args:
        ended: whether the model has nothing to add; until then, the line after "A:" may go on.

    >>> read(" What is lava?\\nA: Molten rock.\\nQ: What", ended=False)
    Card(question='What is lava?', answer='Molten rock.')
    >>> read(" What is lava?\\nA: Molten ro", ended=False)
    """
    found = re.match(r"\s*([^\n]+)\n\s*A:[^\S\n]*([^\n]+)(\n?)", text)
    if not found or not (ended or found[3]):
        return None
    card = Card(found[1].strip(), found[2].strip())
    short = len(card.question) <= _LONGEST["question"] and len(card.answer) <= _LONGEST["answer"]
    return card if short and card.question.endswith("?") and card.answer else None


def deal(write: Write, topic: str, level: Level, count: int, *, seed: int) -> Iterator[tuple[list[Card], str]]:
    """Cards as they are written.

    Yields:
        (the cards so far, what is written of the next). A card that is none, or asks what another asks, is written again, at
        most three times; the cards at the end are fewer than `count` where the model has no more to give.
    """
    cards: list[Card] = []
    for number in range(count):
        for attempt in range(_TRIES):
            text, card = "", None
            for text in write(
                conversation(topic, level, cards), BEGINS, _TRIES * (MAX_COUNT * seed + number) + attempt
            ):
                if card := read(text, ended=False):
                    break
                yield list(cards), text
            card = card or read(text, ended=True)
            if card and _plain(card.question) not in {_plain(other.question) for other in cards}:
                cards.append(card)
                yield list(cards), ""
                break
        else:
            return


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).casefold().strip()


def as_csv(cards: Sequence[Card], *, topic: str, level: Level) -> str:
    """With a head, as spreadsheets and most card programs read it (RFC 4180)."""
    rows = [["question", "answer", "topic", "level"], *([c.question, c.answer, topic, level] for c in cards)]
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def as_anki(cards: Sequence[Card], *, topic: str, level: Level) -> str:
    """For Anki's File > Import: the lines that begin with # say what the columns are (docs.ankiweb.net/importing/text-files)."""
    head = [
        "#separator:tab",
        "#html:false",
        "#notetype:Basic",
        f"#deck:{topic}",
        "#columns:Front\tBack\tTags",
        "#tags column:3",
    ]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([c.question, c.answer, level] for c in cards)
    return "\n".join(head) + "\n" + file.getvalue()


def as_html(card: Card) -> str:
    """A card that is turned by a click, or by the space bar: a check box, which needs no script."""
    question, answer = html.escape(card.question), html.escape(card.answer)
    return (
        f'<label class="card"><input type="checkbox" aria-label="Turn: {question}"><span class="sheet">'
        f'<span class="face front">{question}</span><span class="face back">{answer}</span></span></label>'
    )
