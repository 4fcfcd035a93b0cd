"""The base and its adapters, over one loaded base."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jlora._typing import PretrainedTokenizer, PyTree
from jlora.cli.adapters import adapter_places, base_of
from jlora.cli.as_trained import note_other_base
from jlora.cli.base import Weights, load_weights, tokenizer_of, with_room
from jlora.data.tokens import fingerprint
from jlora.files import find, load_adapter
from jlora.files.hf import add_stops
from jlora.lora import remove_lora
from jlora.models import Model

BASE = "base"
"""The name of the base without an adapter."""


class Models(NamedTuple):
    """Of one base, whose arrays they share."""

    base: str
    model: Model
    params: Mapping[str, PyTree]
    """By the name of the adapter, or `BASE`."""
    tokenizer: PretrainedTokenizer


def load_models(options: Weights, adapters: Sequence[str], *, with_base: bool) -> Models:
    """The adapters on the base that `options` or they name, the base first if it is asked for.

    Raises:
        ValueError: the adapters name no base or several, or were trained with different tokenizers.
    """
    places = adapter_places(adapters)
    if BASE in places:
        raise ValueError(
            f"{BASE!r} is the base without an adapter; {str(places[BASE])!r} is called so too. Rename the directory."
        )
    base = options.model or base_of(places)
    weights = Weights(model=base, quantize=options.quantize, dtype=options.dtype)
    if len(places) > 1:
        return _several(weights, base, places, with_base=with_base)
    ((name, path),) = places.items() or ((BASE, None),)
    adapter = None if path is None else str(path)
    model, params, tokenizer, _ = load_weights(dataclasses.replace(weights, adapter=adapter))
    both = {BASE: remove_lora(params)} if with_base else {}
    return Models(base, model, both | {name: params}, tokenizer)


def _several(weights: Weights, base: str, places: Mapping[str, Path], *, with_base: bool) -> Models:
    model, params, _, _ = load_weights(weights)
    tokenizers = {name: tokenizer_of(find(base), str(path), model)[0] for name, path in places.items()}
    (first, tokenizer), *others = tokenizers.items()
    for name, other in others:
        if fingerprint(other) != fingerprint(tokenizer) or other.chat_template != tokenizer.chat_template:
            raise ValueError(
                f"The adapters {first!r} and {name!r} were trained with different tokenizers or chat templates, so their figures "
                "are of different tokens. Give them one by one."
            )
    model, params = with_room(add_stops(model, tokenizer), params, places.values())
    note_other_base(places, base)
    adapted = {name: load_adapter(path, params, model=model) for name, path in places.items()}
    return Models(base, model, ({BASE: params} if with_base else {}) | adapted, tokenizer)
