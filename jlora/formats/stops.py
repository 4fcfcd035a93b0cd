"""What ends a generation: one set of token ids, from everything that names one.

transformers stops at `eos_token_id` of generation_config.json, and takes config.json's where that file is missing. Instruct
checkpoints list the end of a turn there; a base model that was trained on chats has it in its tokenizer's chat template alone.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jlora.formats.structured import read_json

GENERATION_CONFIG = "generation_config.json"

_USER, _ASSISTANT = "What does the lamp say?", "The lamp says yes."
_TURNS = ({"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT})


def generation_config(directory: Path) -> dict[str, Any]:
    """The fields of a checkpoint's generation_config.json, none where there is no such file.

    Raises:
        ValueError: when it is not a JSON object.
    """
    path = directory / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def token_ids(value: Any, *, where: str) -> tuple[int, ...]:
    """The ids of an `eos_token_id`, which is null, one id or a list of them.

    Raises:
        ValueError: for anything else; `where` names the field.
    """
    ids = () if value is None else value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"`eos_token_id` in {where} must be null, a token id or a list of them; got {value!r}.")
    return tuple(ids)


def stop_ids(declared: Iterable[int], tokenizer: Any = None, *, vocab_size: int) -> tuple[int, ...]:
    """The ids at which a generation ends: those `declared`, the tokenizer's end of text, its chat template's end of turn.

    Each once, in this order. An id beyond the vocabulary is left out: it can never be generated.
    """
    ids = [*declared]
    if tokenizer is not None:
        ids += [tokenizer.eos_token_id, *turn_end_ids(tokenizer)]
    return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < vocab_size))


def turn_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens with which a tokenizer's chat template closes a turn of the assistant.

    Found by rendering a conversation: what stands behind the answer, if it begins or ends with a token of its own, such as
    <|im_end|>, but for white space. None where there is no template, or it closes a turn with words: what several tokens
    spell cannot stop a generation, and training closes such an answer with the end of text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    try:
        rendered = tokenizer.apply_chat_template(list(_TURNS), tokenize=False)
    except Exception:  # jinja2's, or raised by the template itself over a conversation that it does not allow
        return ()
    _, found, behind = rendered.rpartition(_ASSISTANT)
    behind, own = behind.strip(), own_tokens(tokenizer)
    # The longest, where one token's text begins or ends another's.
    first = max((t for t in own if found and behind.startswith(t)), key=len, default=None)
    last = max((t for t in own if found and behind.endswith(t)), key=len, default=None)
    return tuple(dict.fromkeys(own[t] for t in (first, last) if t is not None))


def own_tokens(tokenizer: Any) -> Mapping[str, int]:
    """Text -> id of the tokens that are taken out of a text before it is split: special ones and other added ones."""
    special = {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
    return {text: i for text, i in (special | tokenizer.get_added_vocab()).items() if text and i is not None}


def with_stops(fields: Mapping[str, Any], stops: tuple[int, ...], *, where: str = GENERATION_CONFIG) -> dict[str, Any]:
    """The fields of a generation_config.json with these stops for `eos_token_id`; the same where they say so already."""
    if set(token_ids(fields.get("eos_token_id"), where=where)) >= set(stops):
        return dict(fields)
    changed: dict[str, Any] = {**fields, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
    changed.pop("_from_model_config", None)  # transformers would make it anew of config.json
    return changed
