"""What ends a generation: one set of token ids, from everything that names one.

transformers stops at `eos_token_id` of generation_config.json, and takes config.json's where that file is missing. Instruct
checkpoints list the end of a turn there; a base model that was trained on chats has it in its tokenizer's chat template alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from jlora._typing import Json, JsonObject, NamedTokens
from jlora.storage.fields import check_fields, either, flag, integer, list_of, number, optional
from jlora.storage.gguf import GGUFFile, is_gguf
from jlora.storage.gguf_tokens import GGUFTokens
from jlora.storage.structured import read_json, read_text

GENERATION_CONFIG = "generation_config.json"

_ID = integer(-1, (1 << 31) - 1)  # -1: none, in files of early Llamas
_FIELDS = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), optional(either(_ID, list_of(_ID)))),
    "do_sample": optional(flag()),
    "temperature": optional(number(0, 1e30)),
    "top_k": optional(integer(0, (1 << 31) - 1)),
    "top_p": optional(number(0, 1)),
    "repetition_penalty": optional(number(0, 1e30)),
}
"""Fields of generation_config.json that are read."""

_USER, _ASSISTANT = "What does the lamp say?", "The lamp says yes."
_TURNS = ({"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT})


def generation_config(directory: Path) -> JsonObject:
    """The fields of a checkpoint's generation_config.json, none where there is no such file; of a GGUF file its special tokens.

    Raises:
        ValueError: when it is not a JSON object, or a field that is read holds something else than it may.
    """
    if is_gguf(directory):
        file = GGUFFile(directory)
        if "tokenizer.ggml.tokens" not in file.fields:
            return {}
        found = GGUFTokens.of(file)
        ids = {f"{name}_token_id": found.ids[name] for name in ("bos", "pad") if name in found.ids}
        return with_stops(ids, found.stops) if found.stops else ids
    path = directory / GENERATION_CONFIG
    fields = read_json(path) if path.is_file() else {}
    check_fields(fields, _FIELDS, where=repr(str(path)))
    return fields


def token_ids(value: Json, *, where: str) -> tuple[int, ...]:
    """The ids of an `eos_token_id`, which is null, one id or a list of them.

    Raises:
        ValueError: for anything else; `where` names the field.
    """
    ids = () if value is None else value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"`eos_token_id` in {where} must be null, a token id or a list of them; got {value!r}.")
    return tuple(ids)


def stop_ids(declared: Iterable[int], tokenizer: NamedTokens | None = None, *, vocab_size: int) -> tuple[int, ...]:
    """The ids at which a generation ends: those `declared`, the tokenizer's end of text, its chat template's end of turn.

    Each once, in this order. An id beyond the vocabulary is left out: it can never be generated.

    Args:
        tokenizer: of transformers, a `SpecialTokens`, or None.
    """
    ids = [*declared]
    if tokenizer is not None:
        ids += [tokenizer.eos_token_id, *turn_end_ids(tokenizer)]
    return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < vocab_size))


def turn_end_ids(tokenizer: NamedTokens) -> tuple[int, ...]:
    """The tokens with which a tokenizer's chat template closes a turn of the assistant.

    Found by rendering a conversation: what stands behind the answer, if it begins or ends with a token of its own, such as
    <|im_end|>, but for white space. None where there is no template, or it closes a turn with words: what several tokens
    spell cannot stop a generation, and training closes such an answer with the end of text.

    Args:
        tokenizer: of transformers, or a `SpecialTokens`.
    """
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        source = source.get("default") or next(iter(source.values()), None)
    if not source:
        return ()
    from jlora.storage.jinja import render_template  # jinja2 is imported where it is used

    variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        rendered = render_template(source, {**variables, "messages": list(_TURNS), "strftime_now": lambda _: ""})
    except Exception:  # jinja2's, or raised by the template itself over a conversation that it does not allow
        return ()
    _, found, behind = rendered.rpartition(_ASSISTANT)
    behind, own = behind.strip(), own_tokens(tokenizer)
    # The longest, where one token's text begins or ends another's.
    first = max((t for t in own if found and behind.startswith(t)), key=len, default=None)
    last = max((t for t in own if found and behind.endswith(t)), key=len, default=None)
    return tuple(dict.fromkeys(own[t] for t in (first, last) if t is not None))


def own_tokens(tokenizer: NamedTokens) -> Mapping[str, int]:
    """Text -> id of the tokens that are taken out of a text before it is split: special ones and other added ones."""
    special = {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
    return {text: i for text, i in (special | tokenizer.get_added_vocab()).items() if text and i is not None}


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """What a checkpoint's files say of its tokens' meanings, under the names that transformers' tokenizers have for it.

    Read without transformers, whose import takes longer than a small model's whole loading.
    """

    special_tokens_map: Mapping[str, str]
    """"eos_token" and the like -> text."""
    chat_template: str | Mapping[str, str] | None
    _ids: Mapping[str, int]

    @classmethod
    def of(cls, directory: Path) -> "SpecialTokens":
        """Of tokenizer_config.json, tokenizer.json and chat_template.jinja, as far as they are there, or of a GGUF file.

        Raises:
            ValueError: when one cannot be read.
        """
        if is_gguf(directory):
            found = GGUFTokens.of(GGUFFile(directory))
            ids = {text: found.tokens.index(text) for text in found.named().values()}
            return cls(found.named(), found.chat_template, found.own | ids)
        fields = _read(directory / "tokenizer_config.json")
        tokens = _read(directory / "tokenizer.json").get("added_tokens")
        tokens = tokens if isinstance(tokens, list) else []
        added = fields.get("added_tokens_decoder")
        added = {i: t for i, t in added.items() if i.isdecimal()} if isinstance(added, dict) else {}
        ids = {_text(token): int(i) for i, token in added.items()}
        ids |= {_text(token): token.get("id") for token in tokens if isinstance(token, dict)}
        named = {name: text for name, value in fields.items() if name.endswith("_token") and (text := _text(value))}
        return cls(named, _template(directory, fields), {t: i for t, i in ids.items() if t and isinstance(i, int)})

    @property
    def eos_token_id(self) -> int | None:
        return self._ids.get(self.special_tokens_map.get("eos_token", ""))

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self.special_tokens_map.values())

    def convert_tokens_to_ids(self, text: str) -> int | None:
        return self._ids.get(text)

    def get_added_vocab(self) -> dict[str, int]:
        return dict(self._ids)


def _read(path: Path) -> JsonObject:
    return read_json(path) if path.is_file() else {}


def _text(token: Json) -> str | None:
    """A token's text, which stands alone or among its flags."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _template(directory: Path, fields: Mapping[str, Json]) -> str | dict[str, str] | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    found = fields.get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        found = {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
    return found if isinstance(found, str | dict) else None


def with_stops(fields: Mapping[str, Json], stops: tuple[int, ...], *, where: str = GENERATION_CONFIG) -> JsonObject:
    """The fields of a generation_config.json with these stops for `eos_token_id`; the same where they say so already."""
    if set(token_ids(fields.get("eos_token_id"), where=where)) >= set(stops):
        return dict(fields)
    changed: JsonObject = {**fields, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
    changed.pop("_from_model_config", None)  # transformers would make it anew of config.json
    return changed
