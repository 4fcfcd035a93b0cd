"""Cut a stream of text where a tokenizer would not notice."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator

# Characters on each side of a cut on which it is tried. Tokenizers look at a word and the white space around it.
CONTEXT = 64
# Where to look for a cut: the end of the buffer, and this many places in it before more text is read.
_SEARCH = 1 << 16
_TRIES = 16

_NEWLINES = re.compile(r"\n+(?=\S)")
_SPACE = re.compile(r"(?<=\S) (?=\S)")


def stable_chunks(
    blocks: Iterable[str], encode: Callable[[str], list[int]], *, warn_chars: int = 1 << 26
) -> Iterator[str]:
    r"""Regroup blocks of text so that encoding chunk by chunk equals encoding the whole text.

    A chunk ends at a run of newlines before a word. Where exactly depends on the tokenizer: GPT-2 splits "a\n\nb" into
    a, \n, \n, b, so the cut must leave the last newline to the next chunk (a chunk ending in "\n\n" would make one
    token of it), while Llama 3 and Qwen keep "\n\n" together and want the cut behind it. So each place is tried on the
    CONTEXT characters around it and taken only if the ids do not change. Text without newlines is cut before a space.

    Args:
        blocks: consecutive parts of one text.
        encode: text to ids, nothing added.
        warn_chars: characters to hold back without finding a cut before a warning is given.
    Yields:
        non-empty chunks whose concatenation is the text.
    """
    held, warned = "", False
    for block in blocks:
        held += block
        cut = _cut(held, encode)
        if cut:
            yield held[:cut]
            held = held[cut:]
        elif len(held) > warn_chars and not warned:
            warned = True
            warnings.warn(
                f"found no place to cut {len(held)} characters of text without changing its tokens, so the rest of "
                f"the document is held in memory. Split the file, or use a tokenizer with a pre-tokenizer.",
                stacklevel=2,
            )
    if held:
        yield held


def _cut(text: str, encode: Callable[[str], list[int]]) -> int:
    """The last place found at which `text` can be cut; 0 if there is none."""
    start = max(CONTEXT, len(text) - _SEARCH)
    stop = len(text) - CONTEXT
    newlines = [match.end() for match in _NEWLINES.finditer(text, start, max(start, stop))][-_TRIES:]
    spaces = [match.start() for match in _SPACE.finditer(text, start, max(start, stop))][-_TRIES:]
    for place in [*(end - back for end in reversed(newlines) for back in (0, 1)), *reversed(spaces)]:
        before, after = text[place - CONTEXT : place], text[place : place + CONTEXT]
        if encode(before) + encode(after) == encode(before + after):
            return place
    return 0
