"""Text in pieces to one row of ids: those of the whole text, with the prompts that generation will feed.

Encoded each by itself, pieces would not give the ids of the whole: SentencePiece's tokenizers begin every text with a
space, WordPiece with a new word. So the whole text is encoded, and where a response begins is found by encoding what is
before it: when those ids are the first of the whole's, the row has both. When they are not, a token straddles the
border, such as "))" of "(a)" and ")"; the row then keeps the ids of the prompt, since they are what generation feeds,
and the rest continues them.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from jlora._typing import Tokenizer
from jlora.data.tokens import encode, encode_many
from jlora.storage.pre_tokenizers import WORDS_APART, steps_of

Piece = tuple[str, bool]  # text, and whether the loss is taken on it

# What may stand before a text so that its encoding has no space of its own: something that merges with nothing.
LEADS = ("", "\n", ".", ":", "a", "x", "0", "q")

_WORD_END = re.compile(r"[a-z](?= [a-z])")
_NEAR = 64  # how many characters before a border a cut between words is looked for


class Encoded(NamedTuple):
    """One text as ids.

    ids: of the whole text.
    spans: (start, stop) in `ids` of each supervised part.
    straddled: responses that begin, in the ids of the whole text, within a token of the prompt.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    straddled: int


def encode_pieces(tokenizer: Tokenizer, texts: Sequence[Sequence[Piece]], *, bos: int | None) -> Iterator[Encoded]:
    """Each text, given in pieces, as one row.

    Args:
        tokenizer: fast or slow.
        texts: the pieces of each; their flags say what is supervised.
        bos: a row starts with exactly one of these (see `added_bos`), whether the text had none, one or more; with None
            it is left as it is.
    Raises:
        ValueError: a token straddles a border and no ids were found that continue the prompt with the response.
    """
    cuts = _cuts(tokenizer)
    plans = [_plan(_merged(pieces), cuts) for pieces in texts]
    # A text is often asked for many times, such as "<|im_start|>assistant\n".
    wanted = dict.fromkeys(text for plan in plans for chunk in plan for text in chunk.texts())
    known = dict(zip(wanted, encode_many(tokenizer, list(wanted)), strict=True))
    for plan in plans:
        yield _with_one_bos(_joined([_encoded(chunk, known, tokenizer) for chunk in plan]), bos)


class _Chunk(NamedTuple):
    """Part of a text that is encoded independently of the rest.

    borders: (place, whether a response begins there), in order; at the others one ends.
    open: whether it begins within a response.
    """

    text: str
    borders: list[tuple[int, bool]]
    open: bool

    def texts(self) -> list[str]:
        return [self.text, *(self.text[:place] for place, _ in self.borders)]


class _Cuts(NamedTuple):
    """Where a text can be cut without changing its ids.

    any: finds all added tokens.
    hard: those before which it can be.
    words: whether it can be between two words, which are otherwise encoded twice, in the prompt and in the whole.
    """

    any: re.Pattern[str] | None
    hard: frozenset[str]
    words: bool

    def before(self, text: str, borders: Sequence[int]) -> list[int]:
        """The last place at or before each border, where there is one, in order."""
        places = [] if self.any is None else [f.span() for f in self.any.finditer(text) if f.group() in self.hard]
        found, at = [0], -1
        for border in borders:
            while at + 1 < len(places) and (places[at + 1][1] <= border or places[at + 1][0] == border):
                at += 1
            cut = places[at][0] if at >= 0 else 0
            if self.words:
                ends = _WORD_END.finditer(text, max(cut, border - _NEAR), border)
                cut = max(cut, *(end.end() for end in ends), 0)
            if found[-1] < cut < len(text):
                found.append(cut)
        return found


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    groups = groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), flag) for flag, group in groups]


def _plan(pieces: list[Piece], rules: _Cuts) -> list[_Chunk]:
    text = "".join(part for part, _ in pieces)
    ends = accumulate(len(part) for part, _ in pieces)
    starts = [(0, True)] if pieces and pieces[0][1] else []
    borders = [*starts, *((end, not flag) for end, (_, flag) in zip(ends, pieces, strict=True))]
    if borders and borders[-1][0] == len(text) and borders[-1][1]:
        borders.pop()  # the end of the text, where no response begins
    cuts = rules.before(text, [place for place, _ in borders if place < len(text)])
    if len(cuts) == 1:
        return [_Chunk(text, borders, False)]
    chunks, opened, at = [], False, 0
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        inside, was_open = [], opened
        while at < len(borders) and (borders[at][0] < stop or stop == len(text)):
            inside.append((borders[at][0] - start, borders[at][1]))
            opened = borders[at][1]
            at += 1
        chunks.append(_Chunk(text[start:stop], inside, was_open))
    return chunks


def _encoded(chunk: _Chunk, known: dict[str, list[int]], tokenizer: Tokenizer) -> Encoded:
    if not chunk.borders:
        ids = known[chunk.text]
        return Encoded(ids, [(0, len(ids))] if chunk.open else [], 0)
    settled: list[int] = []  # the ids in front of `origin`, which no longer change
    origin, lead, straddled = 0, None, 0
    cache = {}

    def ids_up_to(place: int) -> list[int]:
        if lead is None:
            return known[chunk.text[:place]]
        if place not in cache:
            cache[place] = settled + _continued(tokenizer, lead, chunk.text[origin:place])
        return cache[place]

    begins = [place for place, begin in chunk.borders if begin]
    spans, start = [], 0 if chunk.open else None
    for place, begin in chunk.borders:
        # Against the next prompt, not against the whole: what follows that is not known at generation.
        following = next((other for other in begins if other > place), len(chunk.text))
        head, ids = ids_up_to(place), ids_up_to(following)
        if begin:
            if ids[: len(head)] != head:
                settled, origin, straddled, cache = head, place, straddled + 1, {}
                lead = _lead(tokenizer, head, chunk.text[origin:following], ids)
            start = len(head)
        else:
            assert start is not None, "borders alternate"
            stop = len(head) if ids[: len(head)] == head else _through(head, ids, tokenizer)
            spans.append((start, max(start, stop)))
            start = None
    ids = ids_up_to(len(chunk.text))
    if start is not None:
        spans.append((start, len(ids)))
    return Encoded(ids, [span for span in spans if span[0] < span[1]], straddled)


def _lead(tokenizer: Tokenizer, head: list[int], text: str, whole: list[int]) -> str:
    """What to put before `text` when it is encoded, so that its ids continue those of `head`: both together must say what
    `whole` does, or `head` and then the text. (A normalizer may leave less white space of it.)
    """
    show = _show(tokenizer)
    meant = {show(whole), show(head) + text}
    said = {}
    for lead in LEADS:
        try:
            said[lead] = show(head + _continued(tokenizer, lead, text))
        except ValueError:
            continue
    for same in (str, _single_spaced):
        for lead, both in said.items():
            if same(both) in set(map(same, meant)):
                return lead
    raise ValueError(
        f"a response must begin with a token of its own; {text[:20]!r} shares one with the end of its prompt, "
        f"{show(head)[-20:]!r}, and no tokens were found that continue the prompt with it. Begin the response otherwise, "
        f"or use a template that ends a prompt in white space or a special token."
    )


def _continued(tokenizer: Tokenizer, lead: str, text: str) -> list[int]:
    """Ids of `text` behind `lead`.

    Raises:
        ValueError: the two share a token.
    """
    before, both = encode_many(tokenizer, [lead, lead + text]) if lead else ([], encode(tokenizer, text))
    if both[: len(before)] != before:
        raise ValueError(f"{lead!r} and {text[:20]!r} share a token. Begin the text otherwise.")
    return both[len(before) :]


def _through(head: list[int], ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of `ids` it takes to say what `head` says; the last of them says more."""
    show = _show(tokenizer)
    length = len(show(head))
    stop = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    while stop < len(ids) and len(show(ids[:stop])) < length:
        stop += 1
    return stop


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def _show(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _joined(parts: list[Encoded]) -> Encoded:
    if len(parts) == 1:
        return parts[0]
    ids, spans = [], []
    for part in parts:
        for start, stop in part.spans:
            start, stop = start + len(ids), stop + len(ids)
            if spans and spans[-1][1] == start:  # one response in two chunks
                start = spans.pop()[0]
            spans.append((start, stop))
        ids += part.ids
    return Encoded(ids, spans, sum(part.straddled for part in parts))


def _with_one_bos(row: Encoded, bos: int | None) -> Encoded:
    if bos is None:
        return row
    own = 0
    while own < len(row.ids) and row.ids[own] == bos:
        own += 1
    spans = [(max(start - own, 0) + 1, stop - own + 1) for start, stop in row.spans if stop > own]
    return row._replace(ids=[bos, *row.ids[own:]], spans=spans)


def _cuts(tokenizer: Tokenizer) -> _Cuts:
    """`tokenizers` splits a text at its added tokens first, then by its pre-tokenizer, and encodes the parts each by
    itself. Not so slow tokenizers, tokens that take the white space beside them, and ones matched as single words only.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return _Cuts(None, frozenset(), False)
    added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    plain = not any(token.lstrip or token.rstrip or token.single_word or " " in token.content for token in added)
    words = plain and _parts_words(backend)
    exact = [token for token in added if not token.normalized]
    hard = frozenset(token.content for token in exact if not (token.lstrip or token.rstrip))
    if not hard or any(token.single_word for token in exact):
        return _Cuts(None, frozenset(), words)
    # The longest first, as `tokenizers` prefers them.
    contents = sorted((token.content for token in exact), key=len, reverse=True)
    return _Cuts(re.compile("|".join(map(re.escape, contents))), hard, words)


def _parts_words(backend: Any) -> bool:
    """Whether a text can be cut between two words of a `tokenizers.Tokenizer`."""
    if backend.pre_tokenizer is None or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    normal = backend.normalizer is None or type(backend.normalizer).__name__ == "NFC"
    return normal and tuple(steps_of(json.loads(backend.pre_tokenizer.__getstate__()))) in WORDS_APART
