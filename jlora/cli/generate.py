"""`jlora generate`."""

import dataclasses

import jax

from jlora._terminal import Part, console, say
from jlora._typing import PretrainedTokenizer, PyTree
from jlora.cli.as_trained import as_trained, note_other_base
from jlora.cli.base import Weights, load_weights, resolve_model, with_room
from jlora.cli.prompts import Prompts, encode_prompts, read_prompts, sampling
from jlora.data import decode_continuation
from jlora.files import base_model_of, load_adapters
from jlora.files.adapters import adapter_directories
from jlora.generation import generate
from jlora.lora import route
from jlora.models import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Prompts, Weights):
    """Continue prompts, with or without an adapter; with each of them where --adapter DIR holds several."""


def run(options: Generate) -> None:
    found = read_prompts(options)
    options, _ = as_trained(options, "template", "system", "quantize")
    model, params, tokenizer, names = load_choices(options)
    prompts = encode_prompts(found, options, tokenizer)
    jobs = [(text, ids, name) for text, ids in prompts for name in names or ("",)]
    if names:
        params = route(params, [name for _, _, name in jobs])
    rows = generate(
        model,
        params,
        [ids for _, ids, _ in jobs],
        **sampling(options, _base(options)),
        key=jax.random.key(options.seed),
    )
    terminal = console()
    for (text, ids, name), row in zip(jobs, rows, strict=True):
        before: list[Part] = [(f"{name}: ", "bold")] if name else []
        prompt = text if options.template in (None, "none") else f"{text}\n"
        say(terminal, *before, (prompt, "dim"), decode_continuation(tokenizer, ids, row) + "\n")


def load_choices(weights: Weights) -> tuple[Model, PyTree, PretrainedTokenizer, tuple[str, ...]]:
    """(model, parameters, tokenizer, names of the adapters in them to choose from: none where there is one or none).

    Raises:
        ValueError: when the adapters name different bases and no model is given.
    """
    found = adapter_directories(weights.adapter) if weights.adapter else {}
    if set(found) <= {"default"}:
        return *load_weights(weights)[:3], ()
    base = dataclasses.replace(weights, model=_base(weights), adapter=None)
    model, params, tokenizer, _ = load_weights(base)
    model, params = with_room(model, params, found.values())
    params = load_adapters(str(weights.adapter), params)
    note_other_base(found, str(base.model))
    return model, params, tokenizer, tuple(found)


def _base(weights: Weights) -> str:
    """The base's name, which all adapters of a directory share."""
    found = adapter_directories(weights.adapter) if weights.adapter else {}
    if weights.model is not None or set(found) <= {"default"}:
        return resolve_model(weights)
    bases = {base_model_of(path) for path in found.values()}
    if len(bases) > 1 or None in bases:
        raise ValueError(
            f"The adapters in {weights.adapter!r} name different base models: {', '.join(sorted(map(str, bases)))}. Give the one "
            "they are to share with --model, or one of the adapters."
        )
    return str(bases.pop())
