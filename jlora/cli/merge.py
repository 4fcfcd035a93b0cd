"""`jlora merge`."""

import dataclasses
from pathlib import Path

import jax

from jlora._terminal import console, say
from jlora.cli.as_trained import as_trained, merged_settings
from jlora.cli.base import Weights, load_weights, mergeable, resolve_model, written_dtype
from jlora.files import load, save_pretrained
from jlora.files.hf_save import refuse_checkpoint
from jlora.report import next_token_distance
from jlora.storage.whole import whole_files

PROBE = 64  # random tokens on which the merged model is compared with the adapted one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Weights):
    """Write a transformers checkpoint with the adapter merged into the weights."""

    output: str
    """Directory to write; it must not hold weights yet."""


def run(options: Merge) -> None:
    if options.adapter is None:
        raise ValueError("There is nothing to merge without --adapter OUTPUT/adapter.")
    refuse_checkpoint(options.output)
    terminal = console()
    options, trained = as_trained(options, "quantize")
    model, params, _, tokenizer_files = load_weights(options, to_write=True)
    ids = jax.random.randint(jax.random.key(0), (1, min(PROBE, model.config.max_length)), 0, model.config.vocab_size)
    before = model.apply({"params": params}, ids)
    model, params = mergeable(model, params, terminal)
    with whole_files(Path(options.output), last="config.json") as partial:
        save_pretrained(
            partial,
            model,
            params,
            tokenizer=tokenizer_files,
            base=resolve_model(options),
            dtype=written_dtype(options),
        )
        if trained is not None:
            merged_settings(trained).write(partial)
    del params  # one model at a time
    model, merged = load(options.output, dtype=model.dtype)
    kl = jax.vmap(next_token_distance)(model.apply({"params": merged}, ids)[0], before[0])[0]
    say(
        terminal,
        "merged checkpoint: ",
        (options.output, "bold"),
        " (loads in transformers); read back, its next-token distributions are "
        f"{float(kl.mean()):.1e} nats (KL, mean of {kl.size} positions) from those with the adapter",
    )
