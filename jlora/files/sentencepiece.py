"""SentencePiece's BPE as tokenizer.json has it, and the scores that llama.cpp merges by.

A space is "▁" in its tokens, and characters that it has no token for are tokens of their bytes. tokenizer.json has merges in
their order; llama.cpp makes whichever token has the highest score of two neighbours, whatever they are.

Reference: llama.cpp, `src/llama-vocab.cpp` (`llm_tokenizer_spm_session`); transformers, `tokenization_gemma.py`.
"""

from collections.abc import Collection, Mapping, Sequence

from jlora._typing import Json, JsonObject

_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPENDED = {"type": "Prepend", "prepend": "▁"}
_BEFORE = (
    (_REPLACED, False),  # Gemma
    ({"type": "Sequence", "normalizers": [_PREPENDED, _REPLACED]}, True),  # Llama 2, Mistral
)
"""Normalizers, and whether they put a space before the text."""
_NO_SPLIT = (
    None,
    # At spaces, of which none is left: Gemma's.
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
)
_UNMERGED = -1e6
"""The score of what no merge makes; no merge is tried for characters, which are there from the start."""


def space_before(fields: Mapping[str, Json]) -> bool:
    """Whether a tokenizer.json of this kind puts a space before a text.

    Raises:
        ValueError: when llama.cpp would tokenize otherwise, naming the part that it does not have.
    """
    model, normalizer = fields["model"], fields["normalizer"]
    # A part of the tokenizer -> whether llama.cpp has it.
    parts = {
        f"model {model['type']!r}": model["type"] == "BPE",
        "`dropout`": not model.get("dropout"),
        "`continuing_subword_prefix`": not model.get("continuing_subword_prefix"),
        "`end_of_word_suffix`": not model.get("end_of_word_suffix"),
        "`ignore_merges`": not model.get("ignore_merges"),
        f"normalizer {normalizer}": any(normalizer == known for known, _ in _BEFORE),
        f"pre-tokenizer {fields['pre_tokenizer']}": fields["pre_tokenizer"] in _NO_SPLIT,
        "a token for every byte": all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)),
    }
    foreign = [part for part, known in parts.items() if not known]
    if foreign:
        raise ValueError(
            "llama.cpp would tokenize otherwise than this tokenizer, and the model would read other tokens than it was "
            f"trained on. What has no counterpart in GGUF's SentencePiece vocabulary: {'; '.join(foreign)}. Export with "
            "`save_pretrained` and convert the directory with llama.cpp's convert_hf_to_gguf.py."
        )
    return next(before for known, before in _BEFORE if normalizer == known)


def normalizer_of(before: bool) -> JsonObject:
    """The inverse of `space_before`."""
    return next(dict(known) for known, prefix in _BEFORE if prefix == before)


def scores_of(tokens: Sequence[str], merges: Sequence[Sequence[str]], users: Collection[str]) -> list[float]:
    """A score for each token: minus the rank among the tokens that merges make. `users` are found in a text before it is
    merged, and no merge is needed to make them.

    Raises:
        ValueError: when the order of the merges is not one of the tokens, so that no scores give it.
    """
    ranks: dict[str, int] = {}
    made: set[tuple[str, str]] = set()
    latest = ""
    for left, right in merges:
        token = left + right
        if token in users:
            continue
        made.add((left, right))
        if token != latest and token in ranks:
            raise ValueError(_no_scores(f"{token!r} is made by merges of different ranks"))
        ranks.setdefault(token, len(ranks))
        latest = token
    known = set(tokens)
    for token in ranks:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in made and pair[0] in known and pair[1] in known:
                raise ValueError(
                    _no_scores(f"{pair[0]!r} and {pair[1]!r} are both tokens, and no merge makes {token!r} of them")
                )
    return [float(-ranks[token]) if token in ranks else _UNMERGED for token in tokens]


def _no_scores(why: str) -> str:
    return (
        f"llama.cpp merges by the scores of tokens, and no scores give the merges of this tokenizer: {why}. Export with "
        "`save_pretrained` and convert the directory with llama.cpp's convert_hf_to_gguf.py."
    )
