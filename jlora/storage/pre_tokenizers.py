"""Pre-tokenizers of tokenizer.json: how text is split before the merges, as rules that can be compared.

Reference: Hugging Face tokenizers, `pre_tokenizers`; llama.cpp, `src/llama-vocab.cpp` (the same rules by name).
"""

from collections.abc import Callable, Iterable, Mapping

from jlora._typing import Json, JsonObject

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

SAME_RULES: Mapping[str, str] = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "mpt": "gpt-2", "olmo": "gpt-2", "phi-2": "gpt-2", "jais": "gpt-2",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "starcoder": "smollm", "refact": "smollm", "command-r": "smollm",
}  # fmt: skip
"""Names of files -> the name in `PRE_TOKENIZERS` by whose rules llama.cpp splits, too."""

ADDS_BOS = frozenset({"llama-bpe", "llama3", "llama-v3"})
"""Names with which llama.cpp puts the bos token before a text where a file does not say whether."""

WORDS_APART = frozenset({(_GPT2,), (("Digits", True), _GPT2), (_LLAMA3, _BYTES), (_QWEN2, _BYTES)})
"""Steps that always part a text between a letter and a space with a letter behind it, whatever stands around them: no
alternative of these expressions matches a letter and then a space, and none looks behind itself."""


def rules_of(name: str, *, where: str) -> tuple[tuple, bool]:
    """(steps, whether whole words skip the merges) of a `tokenizer.ggml.pre`.

    Raises:
        ValueError: for a name that is not known; `where` is the file that has it.
    """
    found = [rules for rules, known in PRE_TOKENIZERS.items() if known == SAME_RULES.get(name, name)]
    if not found:
        known = ", ".join([*PRE_TOKENIZERS.values(), *SAME_RULES])
        raise ValueError(
            f"{where} has `tokenizer.ggml.pre` {name!r}, by which llama.cpp knows how to split text, and jlora does not; it knows "
            f"{known}. With other rules the model would read other tokens than it was trained on: load the original checkpoint."
        )
    return found[0]


def pre_tokenizer_of(steps: Iterable[tuple], *, trim_offsets: bool = True) -> JsonObject:
    """The inverse of `steps_of`: the field of a tokenizer.json."""
    made = [_FIELDS_OF[kind](*rest) for kind, *rest in steps]
    made = [{**step, "trim_offsets": trim_offsets} if step["type"] == "ByteLevel" else step for step in made]
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


_FIELDS_OF: Mapping[str, Callable[..., JsonObject]] = {
    "Split": lambda regex, behavior, invert: {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": behavior,
        "invert": invert,
    },
    "ByteLevel": lambda space, regex: {"type": "ByteLevel", "add_prefix_space": space, "use_regex": regex},
    "Digits": lambda each: {"type": "Digits", "individual_digits": each},
}


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
