"""Text to token ids and back, and what a tokenizer says of its own special tokens."""

import hashlib
import json
from collections.abc import Callable, Sequence
from os.path import commonprefix

from jlora._typing import PretrainedTokenizer, Tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` with nothing added in front or behind; special tokens written in the text become their ids."""
    return encode_many(tokenizer, [text])[0]


def encode_many(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text; a fast tokenizer works on them in parallel.

    Raises:
        ValueError: a text with half of a surrogate pair (see `require_text`).
    """
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            # verbose=False: a long text is cut into windows later; "longer than the maximum length" is no news.
            return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        # What the last call of somebody else left behind.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
        # "fast": without the characters that each token stands for, which nobody here asks for.
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except TypeError:
        for text in texts:
            require_text(text)
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which names it nowhere
            raise
        raise ValueError(
            f"the tokenizer failed on a text ({error}), as when an expression in its tokenizer.json backtracks without end. "
            f"Use another tokenizer.json."
        ) from error


def require_text(text: str) -> None:
    """Refuse what is no Unicode text: UTF-8, and so every tokenizer, has no form for half of a surrogate pair.

    Raises:
        ValueError: naming the first such character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be Unicode; got U+{ord(text[error.start]):04X}, half of a surrogate pair, at character {error.start} "
            f"({text[max(0, error.start - 20) : error.start]!r} is before it), as when an emoji is cut in two. "
            f"Correct the text"
        ) from error


def decode_continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """What new tokens add to the text of a prompt, special tokens left out. See `continuation`."""
    return continuation(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), prompt_ids, new_ids)


def continuation(decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """What `new_ids` add to the text of `prompt_ids`.

    Decoded by themselves they could lose a space: SentencePiece's decoders drop the one at the start of a text. A
    character of which the prompt holds the first bytes belongs to what is added.

    Args:
        decode: token ids to text.
    """
    before, whole = decode(list(prompt_ids)), decode([*prompt_ids, *new_ids])
    # A decoder may also tidy up what was before, such as a space before a comma.
    return whole[len(commonprefix([before.rstrip("\N{REPLACEMENT CHARACTER}"), whole])) :]


class Continued:
    """`decode_continuation` token by token: text as soon as it is whole.

    Bytes of a character that later tokens complete are held back until then.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._before, self._held = list(prompt_ids)[-_CONTEXT:], []

    def add(self, token: int) -> str:
        """What the next token adds to the text."""
        self._held.append(token)
        text = continuation(self._decode, self._before, self._held)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._said(text)

    def rest(self) -> str:
        """What is still held back when no token follows: bytes that are no character."""
        return self._said(continuation(self._decode, self._before, self._held)) if self._held else ""

    def _said(self, text: str) -> str:
        self._before, self._held = [*self._before, *self._held][-_CONTEXT:], []
        return text


_CONTEXT = 16
"""Tokens behind which the next ones are decoded: a character has at most four bytes, and decoders look back by one token."""


def added_bos(tokenizer: Tokenizer) -> int | None:
    """The beginning-of-text id if the tokenizer itself puts one before a text, else None.

    Asked of its behavior: `bos_token` alone does not tell (GPT-2 and Qwen name one and add none), and neither does an
    `add_bos_token` attribute, which fast tokenizers may lack.
    """
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", return_attention_mask=False)["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def with_bos(ids: list[int], bos: int | None) -> list[int]:
    """The first tokens of a document: behind a `bos` (see `added_bos`), unless the text begins with one of its own."""
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def pad_id(tokenizer: Tokenizer) -> int:
    """The id to pad with: the tokenizer's pad, else its end-of-text, else 0. Any will do: masks go by position."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def largest_id(tokenizer: PretrainedTokenizer) -> int:
    """The largest id in the vocabulary; `len(tokenizer) - 1` where ids have no holes."""
    return max(tokenizer.get_vocab().values())


def fingerprint(tokenizer: PretrainedTokenizer) -> str:
    """SHA-256 of everything that decides how the tokenizer encodes a text; the same for equal tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left behind by the last call that padded or truncated; we never do either.
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = {"class": type(tokenizer).__qualname__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    identity = {"state": state, "eos": tokenizer.eos_token_id, "adds_bos": added_bos(tokenizer)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
