"""What the metadata of a GGUF file say of its tokens: `tokenizer.ggml.*` and the chat templates.

Reference: the GGUF specification (ggml, docs/gguf.md, "Tokenizer"); llama.cpp, `src/llama-vocab.cpp`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jlora._typing import Json
from jlora.storage.fields import check_fields, flag, integer, list_of, shown, text
from jlora.storage.gguf import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`, as in `gguf.TokenType`."""

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""`tokenizer.ggml.model`: byte-level BPE, whichever the family, and SentencePiece's."""

_TEMPLATE = "tokenizer.chat_template"
_IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id", "unk": "unknown_token_id",
    "pad": "padding_token_id",
}  # fmt: skip
_STOPS = ("eos", "eot", "eom")
_ABSENT: Mapping[str, Mapping[str, int]] = {SENTENCEPIECE: {"bos": 1, "eos": 2, "unk": 0}}
"""Ids where a file says none, by the model of the tokenizer. (Byte-level BPE has none: llama.cpp takes token 11.)"""
_ID = integer(0, (1 << 32) - 1)

_FIELDS = {
    "tokenizer.ggml.model": text(),
    "tokenizer.ggml.pre": text(),
    "tokenizer.ggml.tokens": list_of(text(), least=1),
    "tokenizer.ggml.merges": list_of(text()),
    **{f"tokenizer.ggml.{name}": _ID for name in _IDS.values()},
    **{f"tokenizer.ggml.{name}": flag() for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
    _TEMPLATE: text(),
}


@dataclasses.dataclass(frozen=True)
class GGUFTokens:
    """The vocabulary of a file."""

    where: str
    """The file's name, for errors."""
    model: str
    """`BYTE_LEVEL`, `SENTENCEPIECE` or one that is not read."""
    pre: str | None
    """What splits text, where the file says it."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: Mapping[str, int]
    """Of "bos", "eos", "eot", "eom", "unk" and "pad", where there is one."""
    flags: Mapping[str, bool]
    """`add_bos_token`, `add_eos_token` and `add_space_prefix`, where they are said."""
    chat_template: str | Mapping[str, str] | None

    @classmethod
    def of(cls, file: GGUFFile) -> "GGUFTokens":
        """
        Raises:
            ValueError: when the file has no vocabulary, or a field of it holds something else than it may.
        """
        where, fields = repr(str(file.path)), file.fields
        required = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
        check_fields(fields, _FIELDS, where=where, required=required)
        model, tokens = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.tokens"]
        absent = _ABSENT.get(model, {})
        ids = {kind: fields.get(f"tokenizer.ggml.{name}", absent.get(kind)) for kind, name in _IDS.items()}
        names = ("add_bos_token", "add_eos_token", "add_space_prefix")
        said = {name: fields[key] for name in names if (key := f"tokenizer.ggml.{name}") in fields}
        return cls(
            where=where,
            model=model,
            pre=fields.get("tokenizer.ggml.pre"),
            tokens=tokens,
            types=_numbers(fields, "token_type", where, len(tokens)) or len(tokens) * [NORMAL],
            merges=fields.get("tokenizer.ggml.merges", []),
            scores=_numbers(fields, "scores", where, len(tokens)),
            # One beyond the vocabulary, as the -1 of some, is none.
            ids={kind: i for kind, i in ids.items() if i is not None and i < len(tokens)},
            flags=said,
            chat_template=_templates(fields),
        )

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a generation."""
        return tuple(dict.fromkeys(self.ids[kind] for kind in _STOPS if kind in self.ids))

    @property
    def own(self) -> dict[str, int]:
        """Text -> id of the tokens that are taken out of a text before it is split."""
        return {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        }

    def named(self) -> dict[str, str]:
        """ "bos_token" and the like -> text."""
        return {f"{kind}_token": self.tokens[i] for kind, i in self.ids.items() if kind in ("bos", "eos", "unk", "pad")}


def _numbers(fields: Mapping[str, Json], name: str, where: str, count: int) -> list:
    value = fields.get(f"tokenizer.ggml.{name}")
    if value is None:
        return []
    if not isinstance(value, np.ndarray) or len(value) != count:
        is_list = isinstance(value, np.ndarray | list)
        raise ValueError(
            f"{where} cannot be used: `tokenizer.ggml.{name}` must be a list of a number for each of its {count} tokens; got "
            + (f"a list of {len(value)}." if is_list else shown(value))
        )
    return value.tolist()


def _templates(fields: Mapping[str, Json]) -> str | Mapping[str, str] | None:
    """One, or several by name."""
    default = fields.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): value for key, value in fields.items() if key.startswith(f"{_TEMPLATE}.")
    }
    named = {name: value for name, value in named.items() if isinstance(value, str)}
    if not named:
        return default
    return ({"default": default} if default is not None else {}) | named
