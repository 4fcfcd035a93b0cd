"""Pre-tokenizers of tokenizer.json: how text is split before the merges, as rules that can be compared.

Reference: Hugging Face tokenizers, `pre_tokenizers`; llama.cpp, `src/llama-vocab.cpp` (the same rules by name).
"""

from collections.abc import Mapping

from jlora._typing import Json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = ("Split", _WORDS + r"\p{N}{1,3}" + _REST, "Isolated", False)
_QWEN2 = ("Split", _WORDS + r"\p{N}" + _REST, "Isolated", False)
_GPT2 = ("ByteLevel", False, True)  # add_prefix_space, use_regex: GPT-2's expression is built in
_BYTES = ("ByteLevel", False, False)

PRE_TOKENIZERS: Mapping[tuple[tuple, bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "smaug-bpe",
    ((_QWEN2, _BYTES), False): "qwen2",
    ((("Digits", True), _GPT2), False): "smollm",
}
"""(steps of the pre-tokenizer, whether whole words skip the merges) -> `tokenizer.ggml.pre`."""

WORDS_APART = frozenset({(_GPT2,), (("Digits", True), _GPT2), (_LLAMA3, _BYTES), (_QWEN2, _BYTES)})
"""Steps that always part a text between a letter and a space with a letter behind it, whatever stands around them: no
alternative of these expressions matches a letter and then a space, and none looks behind itself."""


def steps_of(fields: Mapping[str, Json] | None) -> list[tuple]:
    """A pre-tokenizer as the tuples of `PRE_TOKENIZERS`, sequences flattened."""
    if fields is None:
        return []
    match fields["type"]:
        case "Sequence":
            return [step for part in fields["pretokenizers"] for step in steps_of(part)]
        case "Split":
            return [("Split", fields["pattern"].get("Regex"), fields["behavior"], fields["invert"])]
        case "ByteLevel":
            return [("ByteLevel", fields["add_prefix_space"], fields["use_regex"])]
        case "Digits":
            return [("Digits", fields["individual_digits"])]
    return [(fields["type"],)]
