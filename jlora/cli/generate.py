"""`jlora generate`."""

import dataclasses

import jax
from rich.console import Console

from jlora.cli.base import Weights, load_weights
from jlora.cli.prompts import Prompts, encode_prompts, read_prompts
from jlora.generation import generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Prompts, Weights):
    """Continue prompts, with or without an adapter."""


def run(options: Generate) -> None:
    found = read_prompts(options)
    model, params, tokenizer = load_weights(options)
    prompts = encode_prompts(found, options, tokenizer)
    rows = generate(
        model,
        params,
        [ids for _, ids in prompts],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
    )
    console = Console(highlight=False, markup=False)
    for (text, _), row in zip(prompts, rows, strict=True):
        console.print(text, style="dim", end="" if options.template == "none" else "\n")
        console.print(tokenizer.decode(row, skip_special_tokens=True) + "\n", soft_wrap=True)
