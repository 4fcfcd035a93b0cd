"""`jlora compare`."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import jax

from jlora.cli.base import EvaluationData, Weights, load_weights, open_data
from jlora.cli.prompts import Prompts, encode_prompts, read_prompts
from jlora.data import eval_batches
from jlora.formats.files import check_writable, whole_files, write_text
from jlora.report import compare, print_comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(EvaluationData, Prompts, Weights):
    """Base and adapted model side by side: samples, KL divergence, perplexity."""

    template: Literal["none", "alpaca", "chat"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride]
    """none: continue prompts as they are; alpaca, chat: take them as instructions. Records in --data are rendered by
    alpaca where this is none."""
    output: str | None = None
    """Write compare.md and compare.json into this directory."""


def run(options: Compare) -> None:
    if options.adapter is None:
        raise ValueError("`jlora compare` sets an adapted model beside its base: give --adapter OUTPUT/adapter.")
    if options.output is not None:
        check_writable(options.output)
    found = read_prompts(options)
    model, params, tokenizer = load_weights(options)
    prompts = encode_prompts(found, options, tokenizer)
    for_data = dataclasses.replace(options, template="alpaca") if options.template == "none" else options
    with open_data(for_data, tokenizer, model) if options.data else nullcontext() as data:
        result = compare(
            model,
            params,
            prompts,
            decode=lambda row: tokenizer.decode(row, skip_special_tokens=True),
            key=jax.random.key(options.seed),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            held_out=None if data is None else lambda: eval_batches(data, batch_size=options.batch_size),
        )
    print_comparison(result)
    if options.output is not None:
        with whole_files(Path(options.output), last="compare.json", replace=True) as partial:
            write_text(partial / "compare.md", result.to_markdown())
            write_text(partial / "compare.json", json.dumps(result.to_json(), indent=2) + "\n")
