"""`jlora evaluate`, from flags to figures."""

import os
from collections.abc import Mapping

from jlora._numbers import json_text
from jlora._terminal import console
from jlora._typing import JsonObject
from jlora.cli.as_trained import as_trained
from jlora.cli.base import OF_DATA, Weights, load_weights, open_data, require_data
from jlora.cli.evaluate.answers import ask, check_records, respond
from jlora.cli.evaluate.figures import Figures
from jlora.cli.evaluate.judging import judge_models
from jlora.cli.evaluate.options import Evaluate
from jlora.cli.models import Models, load_models
from jlora.data import eval_batches, lay_out
from jlora.data.prompts import text_ids
from jlora.evaluation import Embedder, Endpoint, Sandbox, Tools, metrics_named, scored
from jlora.files.run_settings import RunSettings
from jlora.report.evaluation import print_evaluation
from jlora.storage.whole import check_writable, write_text
from jlora.train import Evaluation, evaluate

KEY = "OPENAI_API_KEY"
"""The judge's, in the environment: OpenAI's own name for it, which its client takes for any endpoint."""


def run(options: Evaluate) -> None:
    options, trained = as_trained(options, *OF_DATA, "quantize")
    require_data(options)
    for path in (options.output, options.examples):
        if path is not None:
            check_writable(path, file=True)
    if options.asks:
        check_records(options)
    judge = None
    if options.judge is not None and options.judge_model is not None:
        judge = Endpoint(options.judge, options.judge_model, os.environ.get(KEY))
    models = load_models(options, options.adapter, with_base=options.base)
    losses, of_data, template = _losses(options, models, trained)
    sandbox = Sandbox(options.code_seconds, options.code_megabytes)
    asked, answers, results, verdicts = None, {}, None, []
    if options.asks:
        asked = ask(options, models, trained, template)
        answers = {name: respond(options, models, params, asked, name) for name, params in models.params.items()}
        results = scored(
            asked.examples,
            {name: answered.texts for name, answered in answers.items()},
            metrics_named(options.metrics),
            Tools(embedder=_embedder(options), sandbox=sandbox),
            resamples=options.bootstrap,
            seed=options.sampling_seed,
        )
        verdicts = [] if judge is None else judge_models(options, judge, asked, answers)
    _tell(
        Figures(options, models.base, list(models.params), losses, of_data, asked, answers, results, verdicts, sandbox)
    )


def _losses(
    options: Evaluate, models: Models, run: RunSettings | None
) -> tuple[Mapping[str, Evaluation], JsonObject, str | None]:
    """(the loss of each model, what there is to say of the split, the template that its records were rendered by)."""
    if not options.perplexity:
        return {}, {}, None
    size = options.batch_size
    with open_data(options, models.tokenizer, models.model, run) as data:
        layout = lay_out(data, batch_size=size, widest=models.model.config.max_length)
        losses = {
            name: evaluate(models.model, params, eval_batches(data, batch_size=size, layout=layout))
            for name, params in models.params.items()
        }
    of_data = {
        "batch_size": size,
        "max_length": data.length,
        "rows": layout.rows,
        "widths": layout.widths,
        "efficiency": layout.efficiency,
        "truncated": data.stats.truncated,
        "dropped": data.stats.dropped,
    }
    return losses, of_data, getattr(data, "template", None)


def _embedder(options: Evaluate) -> Embedder | None:
    if options.embedding_model is None:
        return None
    model, params, tokenizer, _ = load_weights(Weights(model=options.embedding_model, dtype=options.dtype))
    return Embedder(model, params, lambda text: text_ids(tokenizer, text), options.batch_size)


def _tell(figures: Figures) -> None:
    """A table for people on a terminal, JSON for programs elsewhere; before the files, whose disk may have filled up meanwhile."""
    options, terminal = figures.options, console()
    text = json_text(figures.to_json(), indent=2)
    if terminal.is_terminal:
        print_evaluation(terminal, figures.models, figures.losses, figures.results, lines=list(figures.lines()))
    else:
        print(text, flush=True)
    if options.output is not None:
        write_text(options.output, text + "\n")
    if options.examples is not None:
        write_text(options.examples, "".join(json_text(line) + "\n" for line in figures.examples()))
