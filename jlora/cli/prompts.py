"""Prompts of the command line: raw text, or instructions in the template that the adapter was trained with."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jlora._numbers import check_seed
from jlora.data import prompt_ids, read_records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to continue, and how."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue."""
    prompts_file: str | None = None
    """More prompts: a text file with one a line, or .jsonl records with `instruction` and `input`."""
    template: Literal["none", "alpaca", "chat"] = "none"
    """none: continue the prompt as it is; alpaca, chat: take it as an instruction."""
    max_new_tokens: int = 64
    """At most this many new tokens a prompt."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest; 0: all."""
    top_p: float = 0.95
    """Then among those that together reach this probability."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self):
        check_seed(self.seed)


Prompt: TypeAlias = tuple[str, dict[str, Any]]
"""Text to show, and its record."""


def read_prompts(options: Prompts) -> list[Prompt]:
    """Every prompt, before a model is loaded.

    Raises:
        ValueError: when there is none.
    """
    found: list[Prompt] = [(text, {"instruction": text}) for text in options.prompts]
    if options.prompts_file is not None:
        found += _from_file(Path(options.prompts_file))
    if not found:
        raise ValueError("Give at least one prompt: --prompts 'Once upon a time', or --prompts-file FILE.")
    return found


def encode_prompts(found: list[Prompt], options: Prompts, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(text, token ids) of every prompt."""
    if options.template != "none":
        return [(text, prompt_ids(record, tokenizer, template=options.template)) for text, record in found]
    # An empty prompt starts from the end-of-text token, as a document does.
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [(text, tokenizer(text)["input_ids"] or [start]) for text, _ in found]


def _from_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompts file {str(path)!r}.")
    if path.suffix == ".jsonl":
        records = [record for _, record in read_records(path)]
        if any("instruction" not in record for record in records):
            raise ValueError(f"Prompts in {str(path)!r} need an `instruction`; chat records cannot be prompts here.")
        return [("\n".join(filter(None, (r["instruction"], r.get("input")))), r) for r in records]
    return [(line, {"instruction": line}) for line in path.read_text().splitlines() if line.strip()]
