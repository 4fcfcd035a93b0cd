"""Prompts of the command line: raw text, or instructions in the template that the adapter was trained with."""

import dataclasses
from typing import Literal

from jlora._numbers import check_seed
from jlora._typing import JsonObject, PretrainedTokenizer
from jlora.cli.as_trained import note
from jlora.data import TemplateName
from jlora.data.columns import put_system
from jlora.data.prompts import Prompt, check_text, prompts_of, text_ids
from jlora.data.records import Record
from jlora.data.templates import prompt_ids
from jlora.files import find
from jlora.generation import SAMPLING
from jlora.storage.stops import GENERATION_CONFIG, generation_config

_FROM_CHECKPOINT = ("temperature", "top_k", "top_p")
"""Fields of generation_config.json that hold where no flag says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How to sample."""

    max_new_tokens: int = SAMPLING.max_new_tokens
    """At most this many new tokens a prompt."""
    temperature: float | None = None
    """0: always the likeliest token; default: as generation_config.json of the model says, otherwise 0.8."""
    top_k: int | None = None
    """Sample among the k likeliest; 0: all; default: as generation_config.json says, otherwise 50."""
    top_p: float | None = None
    """Then among those that together reach this probability; default: as generation_config.json says, otherwise 0.95."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self):
        check_seed(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(Drawing):
    """What to continue, and how."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue."""
    prompts_file: str | None = None
    """More prompts: a .txt file with one a line, or .jsonl or .json records with `instruction` and `input`, or `messages`."""
    template: Literal["none"] | TemplateName | None = None
    """none: continue the prompt as it is; else take it as an instruction, in Alpaca's prompt, the tokenizer's chat template or one
    by name; default: as the adapter was trained, otherwise none."""
    system: str | None = None
    """A system prompt for the prompts that have none; default: as the adapter was trained."""


def read_prompts(options: Prompts) -> list[Prompt]:
    """Every prompt, before a model is loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: when there is none, or one is not text.
    """
    found = [
        Prompt(check_text(text, f"prompt {n}"), Record(instruction=text)) for n, text in enumerate(options.prompts, 1)
    ]
    if options.prompts_file is not None:
        found += prompts_of(options.prompts_file)
    if not found:
        raise ValueError("Give at least one prompt: --prompts 'Once upon a time', or --prompts-file FILE.")
    return found


def encode_prompts(
    found: list[Prompt], options: Prompts, tokenizer: PretrainedTokenizer
) -> list[tuple[str, list[int]]]:
    """(text, token ids) of every prompt."""
    if options.system is not None and options.template is None:
        raise ValueError("A --system prompt needs a template with a place for it: give --template chat.")
    if options.template in (None, "none"):
        return [(text, text_ids(tokenizer, _raw(text, record))) for text, record in found]
    for _, record in found:
        if options.system is not None:
            put_system(record, options.system)
    return [(text, prompt_ids(record, tokenizer, template=options.template)) for text, record in found]


def _raw(text: str, record: JsonObject) -> str:
    if "messages" in record:
        raise ValueError("Prompts of `messages` are rendered by a chat template; give --template chat.")
    return text


def sampling(options: Drawing, base: str) -> JsonObject:
    """The arguments of `generate` that say how to sample; what the checkpoint says of it, and is taken or not, is said."""
    fields = generation_config(find(base))
    taken = {
        name: fields[name]
        for name in _FROM_CHECKPOINT
        if fields.get("do_sample") and getattr(options, name) is None and fields.get(name) is not None
    }
    given = {name: value for name in _FROM_CHECKPOINT if (value := getattr(options, name)) is not None}
    if taken:
        note(f"as {GENERATION_CONFIG} says: {', '.join(f'{name} {value}' for name, value in taken.items())}")
    without = {name: fields[name] for name, none in _LEFT_OUT.items() if fields.get(name) not in (None, none)}
    if without:
        note(f"left out of {GENERATION_CONFIG}: {', '.join(f'{name} {value}' for name, value in without.items())}")
    return SAMPLING._asdict() | {"max_new_tokens": options.max_new_tokens} | taken | given


_LEFT_OUT = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0,
    "num_beams": 1, "bad_words_ids": None, "suppress_tokens": None, "stop_strings": None, "sequence_bias": None,
}  # fmt: skip
"""Fields of generation_config.json that would change what is generated -> the value with which they do not."""
