"""`jlora compare`."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import jax

from jlora._numbers import json_text
from jlora.cli.as_trained import as_trained
from jlora.cli.base import OF_DATA, EvaluationData, Weights, open_data
from jlora.cli.models import load_models
from jlora.cli.prompts import Prompts, encode_prompts, read_prompts, sampling
from jlora.data import TemplateName, eval_batches, lay_out
from jlora.files.run_settings import RunSettings
from jlora.report import compare, print_comparison
from jlora.report.comparison import ADAPTED
from jlora.report.comparison_page import comparison_html, preference_html
from jlora.storage.whole import check_writable, whole_files, write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(EvaluationData, Prompts, Weights):
    """Base and adapted models side by side: samples, KL divergence, perplexity."""

    adapter: tuple[str, ...] = ()  # pyright: ignore
    """Directories of adapters, such as OUTPUT/adapter, or of several of them, or GGUF files; beside each other, on the one base."""
    template: Literal["none"] | TemplateName | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """none: continue prompts as they are; else take them as instructions; default: as the adapter was trained, otherwise none.
    Records in --data are rendered by the run's template, or alpaca, where this is none."""
    seed: int = 0  # pyright: ignore[reportIncompatibleVariableOverride]
    """Of sampling; without a run also of the choice of validation records."""
    output: str | None = None
    """Write compare.html (every token, how far the predictions are apart), preference.html (a blind test of which answers are
    better), compare.md and compare.json into this directory."""


def run(options: Compare) -> None:
    if not options.adapter:
        raise ValueError("`jlora compare` sets an adapted model beside its base: give --adapter OUTPUT/adapter.")
    if options.output is not None:
        check_writable(options.output)
    found = read_prompts(options)
    chosen = options.template
    of_data = [name for name in OF_DATA if name not in ("data", "seed", "template", "system")] if options.data else ()
    options, trained = as_trained(options, "template", "system", "quantize", *of_data)
    base, model, adapted, tokenizer = load_models(options, options.adapter, with_base=False)
    (name, params), *others = adapted.items()
    prompts = encode_prompts(found, options, tokenizer)
    with (
        open_data(_held_out(options, chosen, trained), tokenizer, model, trained)
        if options.data
        else nullcontext() as data
    ):
        size = options.batch_size
        layout = None if data is None else lay_out(data, batch_size=size, widest=model.config.max_length)
        result = compare(
            model,
            params,
            prompts,
            decode=lambda row: tokenizer.decode(row, skip_special_tokens=True),
            key=jax.random.key(options.seed),
            **sampling(options, base),
            spell=tokenizer.decode,
            name=name if others else ADAPTED,
            others=dict(others),
            held_out=None if data is None else lambda: eval_batches(data, batch_size=size, layout=layout),
        )
    print_comparison(result)
    if options.output is not None:
        with whole_files(Path(options.output), last="compare.json", replace=True) as partial:
            write_text(partial / "compare.md", result.to_markdown())
            write_text(partial / "compare.html", comparison_html(result))
            write_text(partial / "preference.html", preference_html(result, seed=options.seed))
            write_text(partial / "compare.json", json_text(result.to_json(), indent=2) + "\n")


def _held_out(options: Compare, chosen: str | None, trained: RunSettings | None) -> Compare:
    """The data's settings: --template none is about prompts, and --seed about sampling."""
    if trained is None:
        return dataclasses.replace(options, template=None if options.template == "none" else options.template)
    template = trained.template if chosen in (None, "none") else chosen
    return dataclasses.replace(options, template=template, seed=trained.seed)  # pyright: ignore[reportArgumentType]
