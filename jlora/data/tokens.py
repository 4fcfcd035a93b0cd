"""Text to token ids, and what a tokenizer says of its own special tokens."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

Tokenizer = Any  # a transformers.PreTrainedTokenizerBase; not imported, to keep `import jlora` light


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` with nothing added in front or behind; special tokens written in the text become their ids."""
    return encode_many(tokenizer, [text])[0]


def encode_many(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text; a fast tokenizer works on them in parallel."""
    if not texts:
        return []
    # verbose=False: a long text is cut into windows later, so "longer than the maximum length" would be a false alarm.
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


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


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest id in the vocabulary; `len(tokenizer) - 1` where ids have no holes."""
    return max(tokenizer.get_vocab().values())


def fingerprint(tokenizer: Tokenizer) -> str:
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
