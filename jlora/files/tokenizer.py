"""Tokenizers of checkpoints, as transformers objects that encode as their tokenizer.json says."""

import base64
import binascii
import inspect
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jlora._typing import Json, JsonObject, PretrainedTokenizer
from jlora.files.gguf_tokenizer import tokenizer_of
from jlora.files.hf import find, read_config
from jlora.models import FAMILIES
from jlora.storage.fields import (
    Kind,
    anything,
    check_fields,
    either,
    flag,
    integer,
    list_of,
    mapping_of,
    one_of,
    optional,
    positive,
    shown,
    text,
    wrong_fields,
)
from jlora.storage.gguf import GGUFFile, is_gguf
from jlora.storage.gguf_tokens import GGUFTokens
from jlora.storage.structured import read_json

FILE, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

_FLAGS = mapping_of(either(text(), flag()))
_ENTRY = Kind(
    "an object with `content` and flags",
    lambda v: _FLAGS.holds(v) and isinstance(v.get("content"), str),
)
_TOKEN = optional(either(text(), _ENTRY))
_FIELDS = {
    **dict.fromkeys((*_NAMED, "sep_token", "cls_token", "mask_token"), _TOKEN),
    "additional_special_tokens": optional(list_of(_TOKEN)),
    "extra_special_tokens": optional(either(list_of(_TOKEN), mapping_of(_TOKEN))),
}
_SETTINGS = {
    **_FIELDS,
    "added_tokens_decoder": optional(mapping_of(_ENTRY)),
    "chat_template": optional(either(text(), list_of(mapping_of(text())), mapping_of(text()))),
    "tokenizer_class": optional(text()),
    "model_max_length": optional(positive(1e31)),  # transformers writes 1e30 for none
    "padding_side": optional(one_of("left", "right")),
    "truncation_side": optional(one_of("left", "right")),
    "add_prefix_space": optional(flag()),
    "split_special_tokens": optional(flag()),
    "clean_up_tokenization_spaces": optional(flag()),
}
"""Fields of tokenizer_config.json that are read."""

_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TOKENIZER = {
    "model": mapping_of(anything()),
    "added_tokens": optional(list_of(mapping_of(anything()))),
    **dict.fromkeys((*_STEPS, "truncation", "padding"), optional(mapping_of(anything()))),
}
"""Fields of tokenizer.json."""

_NUMBERS = {"FixedLength": {"length": integer()}, "Strip": {"start": integer(0), "stop": integer(0)}}
"""Fields of steps that the native library computes with unseen. (Strip is a decoder and a normalizer; the latter has neither.)"""

_MAX_GROWTH = 10_000
"""How many times longer a normalizer or decoder may make a text. The native library allocates what it is told to, and ends
the process where it cannot; real ones replace a character by at most a few."""


def load_tokenizer(name: str | os.PathLike) -> PretrainedTokenizer:
    """The checkpoint's tokenizer, as a transformers object, which can be saved.

    Where there is a tokenizer.json, the ids are that file's: transformers' AutoTokenizer picks a class by the model's
    family, and some classes put a pre-tokenizer of their own in place of the file's. Special tokens and the chat template
    come from tokenizer_config.json. Code in the directory is never run. That of a GGUF file is made of its metadata, and gives
    the ids that llama.cpp gives.

    Args:
        name: a directory, a hub id or a .gguf file (see `load`).

    Raises:
        FileNotFoundError: no such directory or hub id, or no tokenizer in it.
        ValueError: for a file that transformers or tokenizers cannot read, naming it.
    """
    # transformers greets environments without torch with advice that does not apply here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    directory = find(name)
    if is_gguf(directory):
        tokenizer = tokenizer_of(GGUFTokens.of(GGUFFile(directory)))
        _try(tokenizer, directory)
        return tokenizer
    settings = _settings(directory)
    if (directory / FILE).exists():
        tokenizer = _from_file(directory, settings)
    else:
        tokenizer = _from_vocabulary(directory)
    _try(tokenizer, directory)
    return tokenizer


def _settings(directory: Path) -> Mapping[str, Json]:
    """The fields of tokenizer_config.json, which may be absent, over those of special_tokens_map.json."""
    found = {}
    for file, table in ((SPECIAL, _FIELDS), (SETTINGS, _SETTINGS)):
        if (directory / file).exists():
            fields = read_json(directory / file)
            check_fields(fields, table, where=repr(str(directory / file)))
            found |= fields
    return found


def _from_file(directory: Path, settings: Mapping[str, Json]) -> PretrainedTokenizer:
    from transformers import PreTrainedTokenizerFast

    state = read_json(directory / FILE)
    where = repr(str(directory / FILE))
    check_fields(state, _TOKENIZER, where=where, required=("model",))
    hazards = list(_hazards(state))
    if hazards:
        raise ValueError(f"{where} cannot be used:\n  " + "\n  ".join(hazards))
    vocabulary = _vocabulary(state)
    given = _class_defaults(directory, settings, vocabulary)
    if settings.get("added_tokens_decoder") is not None:
        # The file's own tokens keep the file's flags; those of the settings that it lacks are added.
        from tokenizers import AddedToken

        given["added_tokens_decoder"] = {
            index: AddedToken(**token)
            for index, token in settings["added_tokens_decoder"].items()
            if token["content"] not in vocabulary
        }
    with _one_error(directory / FILE):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **given
        )
    # A file that was saved in the midst of training says to cut or to pad every text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _from_vocabulary(directory: Path) -> PretrainedTokenizer:
    """What transformers makes of the older files: vocab.json with merges.txt, or a SentencePiece model."""
    from transformers import AutoTokenizer

    if not any((directory / file).is_file() for file in ("vocab.json", "tokenizer.model", "vocab.txt", "tekken.json")):
        raise FileNotFoundError(
            f"{str(directory)!r} has no tokenizer. Copy tokenizer.json and tokenizer_config.json of its base model into it."
        )
    _check_family(directory)
    with _one_error(directory):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _check_family(directory: Path) -> None:
    """Without a tokenizer.json the family decides on the tokenizer."""
    if (directory / "config.json").exists():
        family = read_config(directory).get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"config.json in {str(directory)!r} has `model_type` {shown(family)}, and there is no {FILE}; jlora reads the "
                f"tokenizers of {', '.join(FAMILIES)}, and runs no code of a checkpoint. Open it in transformers and save it."
            )


def _vocabulary(state: Mapping[str, Json]) -> set[str]:
    entries = state["model"].get("vocab")
    added = [token.get("content") for token in state.get("added_tokens") or ()]
    if isinstance(entries, list):  # of pairs, in Unigram
        entries = [entry[0] for entry in entries if isinstance(entry, list) and entry]
    words = entries if isinstance(entries, list | Mapping) else ()
    return {word for word in (*words, *added) if isinstance(word, str)}


def _class_defaults(directory: Path, settings: Mapping[str, Json], vocabulary: set[str]) -> JsonObject:
    """Special tokens that only the checkpoint's tokenizer class names, where they are in the vocabulary: GPT-2 as published has its
    <|endoftext|> from there."""
    import transformers

    name = settings.get("tokenizer_class")
    if name is None and (directory / "config.json").is_file():
        family = FAMILIES.get(read_json(directory / "config.json").get("model_type", ""))
        name = None if family is None else family.tokenizer
    name = str(name).removesuffix("Fast")
    made_by = getattr(transformers, f"{name}Fast", None) or getattr(transformers, name, None)
    if not (inspect.isclass(made_by) and issubclass(made_by, transformers.PreTrainedTokenizerBase)):
        return {}
    parameters = inspect.signature(made_by.__init__).parameters
    defaults = {field: parameters[field].default for field in _NAMED if field in parameters and field not in settings}
    return {field: str(token) for field, token in defaults.items() if token is not None and str(token) in vocabulary}


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Whatever a foreign reader raises, as one ValueError that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the panics of native code are no `Exception`s
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{str(path)!r} has no tokenizer that transformers can read ({reason[:300]}). Update tokenizers and transformers, or "
            "copy tokenizer.json and tokenizer_config.json of its base model into the directory."
        ) from error


def _try(tokenizer: PretrainedTokenizer, directory: Path) -> None:
    """Some faults of a file show when it is used."""
    with _one_error(directory if directory.is_file() else directory / FILE):
        for sample in ("a", " a b\n"):
            tokenizer.decode(tokenizer(sample, verbose=False)["input_ids"])


def _hazards(state: Mapping[str, Json]) -> Iterator[str]:
    """What the native library would end the process at, or encode differently every time."""
    model = state["model"]
    if model.get("dropout"):
        yield f"`model.dropout` must be null: BPE dropout gives a text other tokens every time; got {shown(model['dropout'])}."
    for step in _STEPS:
        growth = 0.0
        for part in _parts(state.get(step)):
            kind = part.get("type")
            added = [part[field] for field in ("content", "prepend") if isinstance(part.get(field), str)]
            growth += math.log(max([1, *map(len, added)]))
            if kind == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
                yield f"`{step}` has a precompiled_charsmap that is damaged; download the file again."
            wanted = _NUMBERS.get(kind, {}) if isinstance(kind, str) else {}
            yield from (f"`{step}`: {line}" for line in wrong_fields(part, wanted))
            if kind == "TemplateProcessing":
                yield from (f"`{step}`: {line}" for line in _undefined(part))
        if growth > math.log(_MAX_GROWTH):
            yield (
                f"`{step}` may make a text {math.exp(min(growth, 300)):.3g} times longer; at most {_MAX_GROWTH:,} are "
                "accepted. Write shorter replacements."
            )


def _parts(step: Json) -> Iterator[Mapping[str, Json]]:
    """A step and those inside it."""
    waiting = [step]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            waiting += [child for child in part.values() if isinstance(child, list | Mapping)]
        elif isinstance(part, list):
            waiting += part


def _undefined(template: Mapping[str, Json]) -> Iterator[str]:
    """Special tokens of a template that it does not define."""
    defined = template.get("special_tokens")
    defined = defined if isinstance(defined, Mapping) else {}
    for pieces in (template.get("single"), template.get("pair")):
        for piece in pieces if isinstance(pieces, list) else ():
            token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
            if isinstance(token, Mapping) and shown(token.get("id")) not in map(repr, defined):
                yield f"its template has {shown(token.get('id'))}, which its special_tokens do not define."


def _is_charsmap(encoded: Json) -> bool:
    """Whether a SentencePiece character map begins with the size of its trie, which the native library trusts.

    Reference: sentencepiece, `normalizer.cc`, `Normalizer::DecodePrecompiledCharsMap`.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError):
        return False
    size = int.from_bytes(data[:4], "little")
    return len(data) > 4 and size % 4 == 0 and 0 < size <= len(data) - 4
