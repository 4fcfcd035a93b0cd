"""Tokenizers as GGUF files hold them: byte-level BPE, which GPT-2, Llama 3, Qwen and SmolLM3 share, and the BPE of
SentencePiece, which Gemma 3, Mistral and Llama 2 have.

llama.cpp splits text by the name of a pre-tokenizer, not by its rules, and a wrong name silently gives other tokens. So the
name is looked up by the rules, and what has no name is refused. SentencePiece's text is not split: `jlora.files.sentencepiece`.

Reference: llama.cpp, `src/llama-vocab.cpp` (the rules by name) and `conversion/base.py` (`get_vocab_base`).
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping

from jlora._typing import Json, PretrainedTokenizer
from jlora.files.sentencepiece import scores_of, space_before
from jlora.models import ModelConfig
from jlora.storage.gguf_tokens import BYTE, BYTE_LEVEL, CONTROL, NORMAL, SENTENCEPIECE, UNUSED, USER_DEFINED
from jlora.storage.pre_tokenizers import PRE_TOKENIZERS, steps_of
from jlora.storage.stops import stop_ids, token_ids, turn_end_ids

_BYTE = re.compile("<0x[0-9A-F]{2}>")

_STOP_KEYS = 3  # eos, eot and eom


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says. One token for each row of the embedding."""

    model: str
    """"gpt2": byte-level BPE, whichever the family; "llama": SentencePiece's."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Two tokens with a space between them, in the order of their rank; in the "gpt2" model."""
    scores: list[float]
    """Of the tokens; in the "llama" model, which makes the token of the highest score first."""
    space_before: bool
    """Whether a text begins with a space that is not in it; in the "llama" model."""
    ids: dict[str, int]
    """Of "bos", "eos", "pad" and "unk", where there is one; "eot" and "eom", further tokens at which a generation ends."""
    add_bos: bool
    add_eos: bool
    chat_template: str | list[dict[str, str]] | None

    @classmethod
    def of(cls, tokenizer: PretrainedTokenizer, config: ModelConfig) -> "Vocabulary":
        """The vocabulary of a transformers tokenizer.

        Rows of the embedding beyond the tokenizer's tokens are padded with tokens of type UNUSED; special tokens added
        beyond its rows, such as a `<pad>`, are left out. The tokenizer's own
        special tokens go before those of the model's config. An NFC normalizer is left out, as llama.cpp's own
        converter leaves Qwen2's out: llama.cpp does not normalize.

        Args:
            tokenizer: a fast tokenizer (`jlora.load_tokenizer`).
            config: of the model whose embedding the tokens index.

        Raises:
            ValueError: for a tokenizer that GGUF does not represent.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"`tokenizer` must be a fast transformers tokenizer; got {type(tokenizer).__name__}. Load it with "
                "`jlora.load_tokenizer(name)`."
            )
        fields = json.loads(backend.to_str())
        pieces = bool(fields["model"].get("byte_fallback"))
        prefix = pieces and space_before(fields)
        pre = "default" if pieces else pre_tokenizer_name(fields)
        tokens, types = _tokens(tokenizer, fields, config.vocab_size)
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in fields["model"]["merges"]]
        add_bos, add_eos = _added_ends(tokenizer)
        scores = []
        if pieces:
            types = [_piece_type(token, kind) for token, kind in zip(tokens, types, strict=True)]
            users = {token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED}
            scores = scores_of(tokens, merges, users)
            # llama.cpp finds a user's tokens in the text as it is written.
            tokens = [token.replace("▁", " ") if token in users else token for token in tokens]
        return cls(
            model=SENTENCEPIECE if pieces else BYTE_LEVEL,
            pre=pre,
            tokens=tokens,
            types=types,
            merges=[] if pieces else [" ".join(merge) for merge in merges],
            scores=scores,
            space_before=prefix,
            ids=_special_ids(tokenizer, config),
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=_chat_template(tokenizer),
        )


def _piece_type(token: str, kind: int) -> int:
    return BYTE if kind == NORMAL and _BYTE.fullmatch(token) else kind


def pre_tokenizer_name(fields: Mapping[str, Json]) -> str:
    """`tokenizer.ggml.pre` for the fields of a tokenizer.json.

    Raises:
        ValueError: when llama.cpp would tokenize otherwise, naming the part that it does not have.
    """
    model, normalizer = fields["model"], fields["normalizer"]
    steps, whole_words = tuple(steps_of(fields["pre_tokenizer"])), bool(model.get("ignore_merges"))
    # A part of the tokenizer -> whether GGUF's byte-level BPE has it.
    parts = {
        f"model {model['type']!r}": model["type"] == "BPE",
        "`dropout`": not model.get("dropout"),
        "`continuing_subword_prefix`": not model.get("continuing_subword_prefix"),
        "`end_of_word_suffix`": not model.get("end_of_word_suffix"),
        f"normalizer {normalizer}": normalizer is None or normalizer["type"] == "NFC",
        f"pre-tokenizer {fields['pre_tokenizer']} with `ignore_merges` {whole_words}": (steps, whole_words)
        in PRE_TOKENIZERS,
    }
    foreign = [part for part, known in parts.items() if not known]
    if foreign:
        raise ValueError(
            "llama.cpp would tokenize otherwise than this tokenizer, and the model would read other tokens than it was "
            f"trained on. What has no counterpart in GGUF: {'; '.join(foreign)}. Written are SentencePiece's BPE and "
            f"byte-level BPE with the pre-tokenizers of {', '.join(PRE_TOKENIZERS.values())}. Export with `save_pretrained` and "
            "convert the directory with llama.cpp's convert_hf_to_gguf.py."
        )
    return PRE_TOKENIZERS[steps, whole_words]


def _tokens(tokenizer: PretrainedTokenizer, fields: Mapping[str, Json], rows: int) -> tuple[list[str], list[int]]:
    """(tokens, their types), by id."""
    by_id = {i: (token, NORMAL) for token, i in fields["model"]["vocab"].items()}
    for added in fields["added_tokens"]:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if added[name]]
        if flags:
            raise ValueError(
                f"The token {added['content']!r} has `{'`, `'.join(flags)}` set, which a GGUF file cannot say, and llama.cpp "
                "would tokenize the text around it otherwise. Set it to false in tokenizer.json if it is not needed."
            )
        special = added["special"] or added["id"] in tokenizer.all_special_ids
        # A special one that was added without a row, such as a `<pad>`, is in no text.
        if added["id"] < rows or not special:
            by_id[added["id"]] = added["content"], CONTROL if special else USER_DEFINED
    if max(by_id) >= rows:
        raise ValueError(
            f"The tokenizer has token {by_id[max(by_id)][0]!r} with id {max(by_id)}, and the embedding has {rows} rows. "
            "Pass the tokenizer that the model was trained with."
        )
    padded = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    tokens, types = [token for token, _ in padded], [kind for _, kind in padded]
    if len(set(tokens)) < rows:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"llama.cpp needs every token once; {twice!r} stands for several ids of this tokenizer.")
    return tokens, types


def _special_ids(tokenizer: PretrainedTokenizer, config: ModelConfig) -> dict[str, int]:
    ids: dict[str, int] = {}
    for kind in ("bos", "pad", "unk"):
        value = getattr(tokenizer, f"{kind}_token_id", None)
        if value is None and kind == "bos":
            value = config.bos_token_id
        if value is not None and value < config.vocab_size:
            ids[kind] = value
    ids.update(zip(("eos", "eot", "eom"), _stops(tokenizer, config), strict=False))
    return ids


def _stops(tokenizer: PretrainedTokenizer, config: ModelConfig) -> tuple[int, ...]:
    """Every id that ends a generation, the tokenizer's end of text first, then its template's end of a turn."""
    declared = token_ids(config.eos_token_id, where="the model's config")
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = stop_ids((*own, *turn_end_ids(tokenizer), *declared), vocab_size=config.vocab_size)
    if not stops:
        # llama.cpp would take token 11.
        raise ValueError(
            "Neither the tokenizer nor the model's config has an end-of-text token, and generation in llama.cpp would not "
            'stop. Set `tokenizer.eos_token = "..."`.'
        )
    if len(stops) > _STOP_KEYS:
        warnings.warn(
            f"A GGUF file names {_STOP_KEYS} tokens that end a generation, and this model has {len(stops)}: "
            f"{tokenizer.convert_ids_to_tokens(list(stops[_STOP_KEYS:]))} are left to llama.cpp, which knows the common ones by "
            "their text.",
            stacklevel=2,
        )
    return stops


def _added_ends(tokenizer: PretrainedTokenizer) -> tuple[bool, bool]:
    """Whether encoding puts (the bos, the eos) token around a text."""
    bare, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    for add_bos in (False, True):
        for add_eos in (False, True):
            if whole == [tokenizer.bos_token_id] * add_bos + bare + [tokenizer.eos_token_id] * add_eos:
                return add_bos, add_eos
    raise ValueError(
        f"The tokenizer encodes 'a' as {whole}, and without special tokens as {bare}; a GGUF file can say no more than "
        "that the bos token goes before and the eos token after a text. Change its `post_processor`."
    )


def _chat_template(tokenizer: PretrainedTokenizer) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
