"""What an adapter changed: base and adapted model side by side."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from jlora._numbers import json_number
from jlora._typing import Array, Batch, Float, JsonObject, Params, PRNGKeyArray
from jlora.data import continuation
from jlora.generation import SAMPLING, generate
from jlora.lora import remove_lora
from jlora.models import Model
from jlora.report.markdown import cell, one_line
from jlora.train import Evaluation, evaluate


@dataclasses.dataclass(frozen=True)
class PromptComparison:
    """One prompt, continued by both."""

    prompt: str
    base: str
    adapted: str
    kl: float
    """KL(adapted || base) of the next-token distributions after the prompt, nats."""
    l2: float
    """Euclidean distance of the two logit vectors after the prompt."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    prompts: tuple[PromptComparison, ...]
    base: Evaluation | None = None
    """On held-out data, when some was given."""
    adapted: Evaluation | None = None

    def to_json(self) -> JsonObject:
        held_out = None
        if self.base is not None and self.adapted is not None:
            held_out = {
                name: {
                    "loss": e.loss,
                    "perplexity": json_number(e.perplexity),
                    "supervised_tokens": e.supervised_tokens,
                }
                for name, e in (("base", self.base), ("adapted", self.adapted))
            }
        return {"prompts": [dataclasses.asdict(p) for p in self.prompts], "held_out": held_out}

    def to_markdown(self) -> str:
        lines = ["# Base and adapted model", ""]
        if self.base is not None and self.adapted is not None:
            lines += ["| held-out | loss | perplexity |", "| --- | --- | --- |"]
            lines += [
                f"| {n} | {e.loss:.4f} | {e.perplexity:.2f} |"
                for n, e in (("base", self.base), ("adapted", self.adapted))
            ]
            lines.append("")
        for p in self.prompts:
            lines += [f"## {one_line(p.prompt) or '(empty prompt)'}", "", f"KL {p.kl:.4f} nats, L2 {p.l2:.2f}", ""]
            lines += ["| base | adapted |", "| --- | --- |", f"| {cell(p.base)} | {cell(p.adapted)} |", ""]
        return "\n".join(lines)


def compare(
    model: Model,
    params: Params,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    decode: Callable[[Sequence[int]], str],
    key: PRNGKeyArray,
    max_new_tokens: int = SAMPLING.max_new_tokens,
    temperature: float = SAMPLING.temperature,
    top_k: int = SAMPLING.top_k,
    top_p: float = SAMPLING.top_p,
    held_out: Callable[[], Iterable[Batch]] | None = None,
) -> Comparison:
    """Continues each prompt with the base and with the adapted model, under the same key, and measures the distance.

    Args:
        params: adapted parameters; the base is what `remove_lora` leaves of them.
        prompts: (text, token ids) pairs.
        decode: token ids to text. A continuation's is what it adds to the text of its prompt.
        held_out: makes the batches on which both perplexities are measured.
    """
    base = remove_lora(params)
    sampling = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key,
    }  # fmt: skip
    ids = [list(row) for _, row in prompts]
    texts = {
        name: [continuation(decode, *pair) for pair in zip(ids, generate(model, tree, ids, **sampling), strict=True)]
        for name, tree in (("base", base), ("adapted", params))
    }
    rows = []
    for i, (text, row) in enumerate(prompts):
        kl, l2 = next_token_distance(_last_logits(model, params, row), _last_logits(model, base, row))
        rows.append(PromptComparison(text, texts["base"][i], texts["adapted"][i], float(kl), float(l2)))
    if held_out is None:
        return Comparison(tuple(rows))
    return Comparison(tuple(rows), evaluate(model, base, held_out()), evaluate(model, params, held_out()))


def next_token_distance(adapted: Float[Array, " vocab"], base: Float[Array, " vocab"]):
    """(KL(adapted || base) in nats, L2 distance) of two rows of logits, in float32; finite for finite logits."""
    log_p, log_q = (jax.nn.log_softmax(row.astype(jnp.float32)) for row in (adapted, base))
    # Rounding can make a divergence of equal distributions a hair negative.
    kl = jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q)), 0.0)
    return kl, jnp.linalg.norm(adapted.astype(jnp.float32) - base.astype(jnp.float32))


def _last_logits(model, params, row):
    # Right padding is invisible to a causal model; one width for prompts of similar length saves compilations.
    width = min(-(-len(row) // 32) * 32, model.config.max_length)
    ids = jnp.zeros((1, width), jnp.int32).at[0, : len(row)].set(jnp.asarray(row))
    return _logits_at(model, params, ids, len(row) - 1)


@functools.partial(jax.jit, static_argnames="model")
def _logits_at(model, params, ids, index):
    return model.apply({"params": params}, ids)[0, index]
