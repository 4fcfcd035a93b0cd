"""`compare.html` and `preference.html`: what adapters changed, to be looked at and to be judged."""

import bisect
import hashlib
import json
import random
from collections.abc import Sequence
from typing import NamedTuple

from jlora._typing import JsonObject
from jlora.report.comparison import BASE, Comparison, Continuation, PromptComparison

GROUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Nats from which on a token has the next of the ten grounds: the divergences of one text span five powers of ten."""

AIM = 0.6
"""Share of the pairs in which the adapter should win."""


class Token(NamedTuple):
    text: str
    heat: int
    """Of its ground."""
    kl: float | None
    """None: of the base, and of what nothing predicts."""
    changed: bool


class Column(NamedTuple):
    """A model's answer to a prompt."""

    name: str
    tokens: Sequence[Token]
    prompt: Sequence[Token]
    next_tokens: Sequence[tuple[str, float]]
    mean_kl: float | None
    next_kl: float | None
    l2: float
    changed: int
    """Of the tokens."""


def heat(kl: float) -> int:
    """
    >>> heat(0.0), heat(0.02), heat(20.0)
    (0, 3, 9)
    """
    return bisect.bisect_right(GROUNDS, kl)


def columns(prompt: PromptComparison) -> list[Column]:
    """Of the base and every adapter."""
    return [_column(prompt, model) for model in prompt.models]


def _column(prompt: PromptComparison, model: Continuation) -> Column:
    is_base = model.name == BASE
    kl = [None] * len(model.tokens) if is_base else model.kl
    before = [None] * len(prompt.prompt_tokens) if is_base else [None, *model.prompt_kl]
    return Column(
        name=model.name,
        tokens=[_token(*each) for each in zip(model.tokens, kl, model.changed, strict=True)],
        prompt=[_token(text, value, False) for text, value in zip(prompt.prompt_tokens, before, strict=True)],
        next_tokens=model.next_tokens,
        mean_kl=None if is_base else sum(model.kl) / len(model.kl),
        next_kl=None if is_base else model.kl[0],
        l2=model.l2,
        changed=sum(model.changed),
    )


def _token(text: str, kl: float | None, changed: bool) -> Token:
    return Token(text, 0 if kl is None else heat(kl), kl, changed)


def comparison_html(comparison: Comparison) -> str:
    """The page of a comparison that `compare` made."""
    from jlora.report.page import HERE, page

    return page(
        HERE / "compare.html",
        comparison=comparison,
        prompts=[(prompt.prompt, columns(prompt)) for prompt in comparison.prompts],
        grounds=GROUNDS,
    )


def pairs(comparison: Comparison, *, seed: int) -> list[JsonObject]:
    """What is judged: each prompt as the base and as one of the adapters continues it, in a random order and on random sides.

    Returns:
        Objects of adapter, prompt, left and right (texts), `adapter_is` ("left" or "right"), and `number`, the prompt's.
    """
    draw = random.Random(seed)
    found = []
    for number, prompt in enumerate(comparison.prompts):
        for name, text, *_ in prompt.columns(comparison.names):
            left = draw.random() < 0.5
            texts = {"left": text, "right": prompt.base} if left else {"left": prompt.base, "right": text}
            side = "left" if left else "right"
            found.append({"number": number + 1, "adapter": name, "prompt": prompt.prompt, **texts, "adapter_is": side})
    draw.shuffle(found)
    return found


def preference_html(comparison: Comparison, *, seed: int) -> str:
    """A page on which a person says of each pair which answer is better, without knowing whose it is."""
    from jlora.report.page import HERE, page

    judged = pairs(comparison, seed=seed)
    different = [pair for pair in judged if pair["left"] != pair["right"]]
    same = {name: sum(p["adapter"] == name for p in judged if p not in different) for name in comparison.names}
    # Answers are kept for these very pairs: other samples, or another order, are another test.
    digest = hashlib.sha256(json.dumps(judged).encode()).hexdigest()[:16]
    data = {
        "id": digest,
        "seed": seed,
        "aim": AIM,
        "adapters": list(comparison.names),
        "same": same,
        "pairs": different,
    }
    return page(HERE / "preference.html", scripts=[HERE / "preference.js"], data=data, total=len(different))
