"""`jlora evaluate`."""

import dataclasses

from jlora._numbers import json_text
from jlora.cli.as_trained import as_trained
from jlora.cli.base import OF_DATA, EvaluationData, Weights, load_weights, open_data, require_data, resolve_model
from jlora.data import eval_batches, lay_out
from jlora.storage.whole import check_writable, write_text
from jlora.train import evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationData, Weights):
    """Loss and perplexity of a model, with or without an adapter, as JSON."""

    output: str | None = None
    """Also write the JSON to this file."""


def run(options: Evaluate) -> None:
    options, trained = as_trained(options, *OF_DATA, "quantize")
    require_data(options)
    if options.output is not None:
        check_writable(options.output, file=True)
    model, params, tokenizer, _ = load_weights(options)
    with open_data(options, tokenizer, model, trained) as data:
        layout = lay_out(data, batch_size=options.batch_size, widest=model.config.max_length)
        result = evaluate(model, params, eval_batches(data, batch_size=options.batch_size, layout=layout))
    report = {
        "model": resolve_model(options),
        "adapter": options.adapter,
        "data": options.data,
        "split": options.split,
        "eval_loss": result.loss,
        "perplexity": result.perplexity,
        "batches": result.batches,
        "supervised_tokens": result.supervised_tokens,
        "batch_size": options.batch_size,
        "max_length": data.length,
        "rows": layout.rows,
        "widths": layout.widths,
        "efficiency": layout.efficiency,
        "truncated": data.stats.truncated,
        "dropped": data.stats.dropped,
    }
    text = json_text(report, indent=2)
    print(text, flush=True)  # before the file, whose disk may have filled up meanwhile
    if options.output is not None:
        write_text(options.output, text + "\n")
