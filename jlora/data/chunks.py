"""Cut a stream of text where a tokenizer would not notice."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jlora._typing import PretrainedTokenizer
from jlora.data.encoding import LEADS
from jlora.data.tokens import encode, encode_many

# The least and the most characters on each side of a cut on which it is tried. Tokenizers look at a word and the white space
# around it, or at as much as a token holds.
CONTEXT = 64
_MOST_CONTEXT = 1 << 12
# Where to look for a cut: the end of the buffer, and this many places of a kind in it before more text is read.
_SEARCH = 1 << 16
_TRIES = 16

_NEWLINES = re.compile(r"\n+(?=\S)")
_SPACE = re.compile(r"(?<=\S) (?=\S)")
# Text that is written without spaces: before an ideograph or behind a sentence.
_ANYWHERE = re.compile(r"(?<=[^\w\s])(?=\w)")


class Chunk(NamedTuple):
    """Part of a text.

    lead: what to encode before it and to take off again: `encode(lead + text)[len(encode(lead)):]`. It keeps a tokenizer
        that begins every text with a space from putting one here.
    """

    lead: str
    text: str


def stable_chunks(
    blocks: Iterable[str],
    encode: Callable[[str], list[int]],
    *,
    context: int = CONTEXT,
    warn_chars: int = 1 << 26,
) -> Iterator[Chunk]:
    r"""Regroup blocks of text so that encoding chunk by chunk equals encoding the whole text.

    A chunk ends at a run of newlines before a word. Where exactly depends on the tokenizer: GPT-2 splits "a\n\nb" into
    a, \n, \n, b, so the cut must leave the last newline to the next chunk (a chunk ending in "\n\n" would make one
    token of it), while Llama 3 and Qwen keep "\n\n" together and want the cut behind it. So each place is tried on the
    `context` characters around it and taken only if the ids do not change. Text without newlines is cut before a space,
    else behind punctuation.

    Args:
        blocks: consecutive parts of one text.
        encode: text to ids, nothing added.
        context: see `context_of`.
        warn_chars: characters to hold back without finding a cut before a warning is given.
    Yields:
        non-empty chunks whose texts together are the text.
    """
    held, lead, warned = "", "", False
    for block in blocks:
        held += block
        cut, next_lead = _cut(held, encode, context)
        if cut:
            yield Chunk(lead, held[:cut])
            held, lead = held[cut:], next_lead
        elif len(held) > warn_chars and not warned:
            warned = True
            warnings.warn(
                f"found no place to cut {len(held)} characters of text without changing its tokens, so the rest of "
                f"the document is held in memory. Split the file, or use a tokenizer with a pre-tokenizer.",
                stacklevel=2,
            )
    if held:
        yield Chunk(lead, held)


def context_of(tokenizer: PretrainedTokenizer) -> int:
    """Characters on which a cut is to be tried: a few times the longest token."""
    return min(_MOST_CONTEXT, max(CONTEXT, 2 * max(map(len, tokenizer.get_vocab()))))


def encode_chunks(tokenizer: PretrainedTokenizer, chunks: Sequence[Chunk]) -> Iterator[list[int]]:
    """The ids of each chunk."""
    leads = {lead: len(encode(tokenizer, lead)) if lead else 0 for lead, _ in chunks}
    for chunk, ids in zip(chunks, encode_many(tokenizer, [lead + text for lead, text in chunks]), strict=True):
        yield ids[leads[chunk.lead] :]


def _cut(text: str, encode: Callable[[str], list[int]], context: int) -> tuple[int, str]:
    """The last place found at which `text` can be cut, and what must lead the rest; 0 if there is none."""
    start = max(context, len(text) - _SEARCH)
    stop = max(start, len(text) - context)
    newlines = [match.end() for match in _NEWLINES.finditer(text, start, stop)][-_TRIES:]
    found = [[end - back for end in reversed(newlines) for back in (0, 1)]]
    for pattern in (_SPACE, _ANYWHERE):
        found.append([match.start() for match in pattern.finditer(text, start, stop)][: -_TRIES - 1 : -1])
    for places in found:
        for lead in LEADS:
            for place in places:
                before, after = text[place - context : place], text[place : place + context]
                head, led = encode(lead) if lead else [], encode(lead + after)
                if led[: len(head)] == head and encode(before) + led[len(head) :] == encode(before + after):
                    return place, lead
    return 0, ""
