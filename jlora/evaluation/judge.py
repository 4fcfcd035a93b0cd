"""A language model as the judge of two answers, asked in both orders."""

import dataclasses
import email.utils
import http.client
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jlora._typing import Json, JsonObject
from jlora.evaluation.example import Counts, mean

SYSTEM = """\
You compare two answers to the same request. Judge how well each does what was asked: whether it is right, complete, to the \
point and clear. Length by itself is no merit, nor is the order in which the answers stand. Give your reasons in at most three \
sentences. Then, on a line of its own, write your verdict and nothing else: [[A]] if answer A is better, [[B]] if answer B is \
better, [[C]] if neither is."""

_PAIR = """\
[Request]
{prompt}
{reference}
[Answer A]
{a}
[End of answer A]

[Answer B]
{b}
[End of answer B]"""

_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP's: timeouts, conflicts, too many requests, and servers that are down or overloaded."""
_TRIES, _FIRST_PAUSE, _LONGEST_PAUSE = 5, 1.0, 60.0
_SAID = 300
"""Characters of what an endpoint says of an error."""


class Refused(Exception):
    """The endpoint gave no answer, in the words of its error."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server of chat completions.

    Raises:
        ValueError: the address is none of HTTP.
    """

    url: str
    """Such as https://api.openai.com/v1: what comes before /chat/completions."""
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0
    """Seconds for one try."""
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self):
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ValueError(
                f"A judge is an address of HTTP, such as http://localhost:8000/v1; got {self.url!r}. Give all that comes before "
                "/chat/completions."
            )

    def ask(self, messages: Sequence[JsonObject]) -> str:
        """The answer to a conversation, as likely as the server makes it (temperature 0). Tries again, after longer and longer
        pauses, where the server is busy or cannot be reached.

        Raises:
            Refused: the request is wrong, or the last try failed too.
        """
        body = json.dumps({"model": self.model, "messages": list(messages), "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        said, wanted = "", None
        for attempt in range(_TRIES):
            if attempt:
                self.pause(_pause(attempt, wanted))
            wanted = None
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return _content(json.load(answer))
            except urllib.error.HTTPError as error:
                said, wanted = f"HTTP {error.code}: {_message(error)}", error.headers.get("Retry-After")
                if error.code not in _AGAIN:
                    raise Refused(said) from None
            except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, or no JSON
                said = f"{type(error).__name__}: {error}"
        raise Refused(f"{said} (after {_TRIES} tries)")


def _content(answer: Json) -> str:
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {json.dumps(answer)[:_SAID]}") from None


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])[:_SAID]
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:_SAID] or str(error.reason)


def _pause(attempt: int, wanted: str | None) -> float:
    """Seconds: as the server asks (a number or a date, RFC 9110), or twice as many each time, spread so that not all meet."""
    if wanted is not None and wanted.strip().isdigit():
        return min(float(wanted), _LONGEST_PAUSE)
    date = email.utils.parsedate_tz(wanted) if wanted is not None else None
    if date is not None:
        return min(max(email.utils.mktime_tz(date) - time.time(), 0.0), _LONGEST_PAUSE)
    return min(_FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(1.0, 1.5), _LONGEST_PAUSE)


class Pair(NamedTuple):
    """Two answers to a prompt."""

    prompt: str
    one: str
    other: str
    reference: str | None = None
    """A right answer, shown to the judge."""


class Judgement(NamedTuple):
    """What was said of a pair: 1 the one is better, 0 the other is, 0.5 neither is; None: no verdict."""

    first: float | None
    """With the one in front."""
    second: float | None
    """With the other in front."""
    why: str = ""
    """There is no verdict."""

    @property
    def score(self) -> float | None:
        """A win is one in both orders; verdicts that differ are a tie (Zheng et al. 2023, arXiv:2306.05685, section 3.4)."""
        if self.first is None or self.second is None:
            return None
        return self.first if self.first == self.second else 0.5

    @property
    def follows_order(self) -> bool:
        """Whether the judge took the answer in front, or the one behind, both times."""
        return {self.first, self.second} == {0.0, 1.0}


def judged(
    ask: Callable[[Sequence[JsonObject]], str], pairs: Sequence[Pair], *, workers: int = 8
) -> Iterator[Judgement]:
    """What a judge says of each pair, as it comes, in their order.

    Args:
        ask: a conversation -> its answer, as `Endpoint.ask`. Raises `Refused`.
    """
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda pair: _judgement(ask, pair), pairs)


def _judgement(ask: Callable[[Sequence[JsonObject]], str], pair: Pair) -> Judgement:
    if pair.one == pair.other:
        return Judgement(0.5, 0.5)
    try:
        first = _verdict(ask(_conversation(pair)))
        second = _verdict(ask(_conversation(pair._replace(one=pair.other, other=pair.one))))
    except Refused as error:
        return Judgement(None, None, f"the endpoint gave no answer: {error}")
    lacking = first is None or second is None
    return Judgement(first, None if second is None else 1.0 - second, "the judge gave no verdict" if lacking else "")


def _conversation(pair: Pair) -> list[JsonObject]:
    reference = "" if pair.reference is None else f"\n[A right answer]\n{pair.reference}\n"
    text = _PAIR.format(prompt=pair.prompt, reference=reference, a=pair.one, b=pair.other)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _verdict(text: str) -> float | None:
    """For the answer in front: 1, 0.5 or 0; None where the text has no verdict. The last one counts."""
    found = _VERDICT.findall(text)
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found[-1]] if found else None


def win_rate(judgements: Sequence[Judgement]) -> Counts:
    """Wins, and half of the ties."""
    scores = [judgement.score for judgement in judgements]
    rows = np.array([(0.0, 0.0) if score is None else (score, 1.0) for score in scores]).reshape(-1, 2)
    unscored = {i: j.why for i, (j, score) in enumerate(zip(judgements, scores, strict=True)) if score is None}
    return Counts(rows, mean, unscored)
