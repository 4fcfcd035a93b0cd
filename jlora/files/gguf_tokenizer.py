"""The tokenizer of a GGUF file, as a transformers object that can be saved: the inverse of `jlora.files.vocabulary`.

What splits text is looked up by the name that the file says, and a name that is not known is refused: with the rules of
another, the model would read other tokens than it was trained on.

Reference: llama.cpp, `src/llama-vocab.cpp`; transformers, `convert_slow_tokenizer.py` (`generate_merges`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jlora._typing import Json, JsonObject, PretrainedTokenizer
from jlora.files.sentencepiece import normalizer_of
from jlora.storage.fields import shown
from jlora.storage.gguf_tokens import (
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    SENTENCEPIECE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GGUFTokens,
)
from jlora.storage.pre_tokenizers import ADDS_BOS, pre_tokenizer_of, rules_of

_ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
_PAD = re.compile(r"\[PAD\d+\]")
_MAX_CHARACTERS = 1 << 23
"""Of all pieces of a SentencePiece vocabulary, whose splits are all looked at. Gemma's have two million."""


def tokenizer_of(found: GGUFTokens) -> PretrainedTokenizer:
    """
    Raises:
        ValueError: for a model or a pre-tokenizer that is not known, and for a vocabulary that is damaged.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kinds = {BYTE_LEVEL: _byte_level, SENTENCEPIECE: _sentencepiece}
    if found.model not in kinds:
        raise ValueError(
            f"{found.where} has `tokenizer.ggml.model` {shown(found.model)}; jlora reads {' and '.join(map(repr, kinds))}. "
            "Load the original checkpoint."
        )
    _check_once(found)
    state = {"version": "1.0", "truncation": None, "padding": None} | kinds[found.model](found)
    try:
        backend = Tokenizer.from_str(json.dumps(state))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the panics of native code are no `Exception`s
        raise ValueError(f"{found.where} has a vocabulary that cannot be used: {str(error)[:300]}.") from error
    made: Any = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **found.named())
    template = found.chat_template
    made.chat_template = dict(template) if isinstance(template, Mapping) else template
    return made


def _check_once(found: GGUFTokens) -> None:
    if len(set(found.tokens)) < len(found.tokens):
        seen: set[str] = set()
        twice = next(token for token in found.tokens if token in seen or seen.add(token))
        raise ValueError(
            f"{found.where} has a vocabulary that cannot be used: the token {shown(twice)} is there twice."
        )


def _byte_level(found: GGUFTokens) -> JsonObject:
    if found.pre is None:
        raise ValueError(
            f"{found.where} does not say `tokenizer.ggml.pre`, by which text is split: it is of a converter that is years old. "
            "Convert the original checkpoint again."
        )
    steps, whole_words = rules_of(found.pre, where=found.where)
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in found.merges)]
    add_bos = found.flags.get("add_bos_token", found.pre in ADDS_BOS)
    ends = _ends(found, add_bos, found.flags.get("add_eos_token", False))
    return {
        "added_tokens": [_added(i, token, kind, normalized=False) for i, token, kind in _special(found)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_of(steps),
        "post_processor": ends or pre_tokenizer_of([("ByteLevel", True, True)], trim_offsets=False),
        "decoder": pre_tokenizer_of([("ByteLevel", True, True)]),
        "model": _bpe(_vocabulary(found), merges, ignore_merges=whole_words),
    }


def _sentencepiece(found: GGUFTokens) -> JsonObject:
    if len(found.scores) != len(found.tokens):
        raise ValueError(
            f"{found.where} has no `tokenizer.ggml.scores`, in whose order {SENTENCEPIECE!r} vocabularies are merged."
        )
    before = found.flags.get("add_space_prefix", True)
    # llama.cpp finds a user's token in the text as it is written; after the normalizer a space is "▁".
    users = {i: token for i, token, kind in _special(found) if kind == USER_DEFINED}
    spelled = {i: token if before else token.replace(" ", "▁") for i, token in users.items()}
    vocabulary = {spelled.get(i, token): i for token, i in _vocabulary(found).items()}
    if len(vocabulary) < len(_vocabulary(found)):
        raise ValueError(
            f"{found.where} has a vocabulary that cannot be used: a token of the user's is there as another's text."
        )
    unknown = found.tokens[found.ids["unk"]] if "unk" in found.ids else None
    end = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return {
        "added_tokens": [
            _added(i, spelled.get(i, token), kind, normalized=kind == USER_DEFINED and not before)
            for i, token, kind in _special(found)
        ],
        "normalizer": normalizer_of(before),
        "pre_tokenizer": None if before else words,
        "post_processor": _ends(found, found.flags.get("add_bos_token", True), found.flags.get("add_eos_token", False)),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, *end,
            ],
        },
        "model": _bpe(
            vocabulary, list(_merges(found, vocabulary)), unk_token=unknown, fuse_unk=unknown is not None, byte_fallback=True
        ),
    }  # fmt: skip


def _merges(found: GGUFTokens, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that make a token, those of the highest score first, as transformers makes them of a SentencePiece
    model."""
    if sum(map(len, found.tokens)) > _MAX_CHARACTERS:
        raise ValueError(
            f"{found.where} has a vocabulary of {sum(map(len, found.tokens)):,} characters; read are at most {_MAX_CHARACTERS:,}."
        )
    pairs: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(found.tokens, found.scores, found.types, strict=True):
        if kind == NORMAL:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            pairs += [
                (score, len(left), len(right), left, right)
                for left, right in splits
                if left in vocabulary and right in vocabulary
            ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return ((left, right) for *_, left, right in pairs)


def _vocabulary(found: GGUFTokens) -> dict[str, int]:
    """Token -> id, without the padding behind the last token: rows of the embedding that no text means."""
    last = max((i for i, kind in enumerate(found.types) if not _is_padding(found, i, kind)), default=-1)
    return {token: i for i, token in enumerate(found.tokens[: last + 1])}


def _is_padding(found: GGUFTokens, number: int, kind: int) -> bool:
    return kind == UNUSED and _PAD.fullmatch(found.tokens[number]) is not None


def _special(found: GGUFTokens) -> Iterator[tuple[int, str, int]]:
    """(id, text, type) of the tokens that are found in a text before it is split."""
    for i, (token, kind) in enumerate(zip(found.tokens, found.types, strict=True)):
        if kind in _ADDED and token:
            yield i, token, kind


def _added(number: int, token: str, kind: int, *, normalized: bool) -> JsonObject:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": number, "content": token, **flags, "normalized": normalized, "special": kind != USER_DEFINED}


def _ends(found: GGUFTokens, add_bos: bool, add_eos: bool) -> JsonObject | None:
    """What puts the bos and the eos token around a text, where something does."""
    ends = [kind for kind, on in (("bos", add_bos), ("eos", add_eos)) if on]
    if not ends:
        return None
    missing = [kind for kind in ends if kind not in found.ids]
    if missing:
        raise ValueError(
            f"{found.where} says that each text gets a {missing[0]} token, and names none of its tokens as that."
        )
    tokens = {kind: found.tokens[found.ids[kind]] for kind in ends}

    def around(part: str) -> list[Json]:
        def special(kind):
            return [{"SpecialToken": {"id": tokens[kind], "type_id": 0}}] if kind in tokens else []

        return [*special("bos"), {"Sequence": {"id": part, "type_id": 0}}, *special("eos")]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": [*around("A"), *around("B")],
        "special_tokens": {
            token: {"id": token, "ids": [found.ids[kind]], "tokens": [token]} for kind, token in tokens.items()
        },
    }


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], **changes: Json) -> JsonObject:
    fields: JsonObject = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return fields | changes | {"vocab": dict(vocabulary), "merges": [list(merge) for merge in merges]}
