"""What adapters changed: base and adapted models side by side."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jlora._numbers import json_number
from jlora._typing import Batch, JsonObject, Params, PRNGKeyArray, PyTree
from jlora.data import continuation
from jlora.generation import SAMPLING, generate
from jlora.lora import remove_lora
from jlora.models import Model
from jlora.report.distance import along
from jlora.report.distance import next_token_distance as next_token_distance
from jlora.report.markdown import cell, one_line, table
from jlora.train import Evaluation, evaluate

BASE, ADAPTED = "base", "adapted"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt as one of the models continues it, token by token."""

    name: str
    """`BASE`, or the adapter's."""
    text: str
    tokens: Sequence[str]
    """Of the continuation, special ones among them."""
    changed: Sequence[bool]
    """Of each, whether a diff with the tokens of the base's continuation has it as new; in the base's own, whether no adapter has
    kept it."""
    next_tokens: Sequence[tuple[str, float]]
    """The likeliest tokens after the prompt: (token, probability)."""
    kl: Sequence[float] = ()
    """KL(adapted || base) of the distributions that each token was drawn from, nats; of the base, which is at none, empty."""
    prompt_kl: Sequence[float] = ()
    """The same of each token of the prompt but the first, which nothing predicts."""
    l2: float = 0.0
    """Euclidean distance of the logits after the prompt from the base's."""


@dataclasses.dataclass(frozen=True)
class PromptComparison:
    """One prompt, continued by base and adapters."""

    prompt: str
    base: str
    adapted: str
    """By the first adapter."""
    kl: float
    """KL(adapted || base) of the next-token distributions after the prompt, nats."""
    l2: float
    """Euclidean distance of the two logit vectors after the prompt."""
    prompt_tokens: Sequence[str] = ()
    models: Sequence[Continuation] = ()
    """The base and every adapter."""

    def to_json(self) -> JsonObject:
        fields = dataclasses.asdict(self)
        return fields if self.models else {n: v for n, v in fields.items() if n not in ("prompt_tokens", "models")}

    def columns(self, names: Sequence[str]) -> list[tuple[str, str, float, float]]:
        """(name, text, KL, L2) of each adapter."""
        if not self.models:
            return [(names[0], self.adapted, self.kl, self.l2)]
        return [(m.name, m.text, m.kl[0], m.l2) for m in self.models[1:]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    prompts: Sequence[PromptComparison]
    base: Evaluation | None = None
    """On held-out data, when some was given."""
    adapted: Evaluation | None = None
    """Of the first adapter."""
    names: Sequence[str] = (ADAPTED,)
    """Of the adapters."""
    others: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    """Of the other adapters."""

    @property
    def held_out(self) -> dict[str, Evaluation]:
        """Name -> evaluation, the base's first; empty: there were no data."""
        if self.base is None or self.adapted is None:
            return {}
        return {BASE: self.base, self.names[0]: self.adapted, **self.others}

    def to_json(self) -> JsonObject:
        evaluated = dict(zip((BASE, ADAPTED, *self.others), self.held_out.values(), strict=False))
        held_out = {
            name: {"loss": e.loss, "perplexity": json_number(e.perplexity), "supervised_tokens": e.supervised_tokens}
            for name, e in evaluated.items()
        }
        prompts = [prompt.to_json() for prompt in self.prompts]
        return {"adapters": list(self.names), "prompts": prompts, "held_out": held_out or None}

    def to_markdown(self) -> str:
        return "\n".join(self._markdown())

    def _markdown(self) -> Iterator[str]:
        yield from ("# Base and adapted model", "")
        if self.held_out:
            rows = [(cell(name), f"{e.loss:.4f}", f"{e.perplexity:.2f}") for name, e in self.held_out.items()]
            yield from table(("held-out", "loss", "perplexity"), rows)
        for p in self.prompts:
            yield from (f"## {one_line(p.prompt) or '(empty prompt)'}", "")
            columns = p.columns(self.names)
            alone = len(columns) == 1
            said = [f"{'' if alone else f'{cell(n)}: '}KL {kl:.4f} nats, L2 {l2:.2f}" for n, _, kl, l2 in columns]
            yield from ("; ".join(said), "")
            texts = [cell(text) for text in (p.base, *(text for _, text, *_ in columns))]
            yield from table((BASE, *(cell(n) for n, *_ in columns)), [texts])


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
    name: str = ADAPTED,
    others: Mapping[str, PyTree] | None = None,
    spell: Callable[[Sequence[int]], str] | None = None,
) -> Comparison:
    """Continues each prompt with the base and with the adapted models, under the same key, and measures the distance.

    Args:
        params: adapted parameters; the base is what `remove_lora` leaves of them.
        prompts: (text, token ids) pairs.
        decode: token ids to text. A continuation's is what it adds to the text of its prompt.
        held_out: makes the batches on which all perplexities are measured.
        name: of the adapter.
        others: name -> the same base's parameters with another adapter.
        spell: token ids to text with special tokens in it, for the single tokens; default: `decode`.
    """
    trees = {BASE: remove_lora(params), name: params, **(others or {})}
    if len(trees) < 2 + len(others or {}):
        raise ValueError(
            f"`name` and `others` must be names of their own, none of them {BASE!r}; got {[name, *(others or {})]}."
        )
    sampling = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "key": key,
    }  # fmt: skip
    rows = [list(row) for _, row in prompts]
    made = {name: generate(model, tree, rows, **sampling) for name, tree in trees.items()}
    compared = [
        _compared(model, trees, text, row, {name: new[i] for name, new in made.items()}, decode, spell or decode)
        for i, (text, row) in enumerate(zip((text for text, _ in prompts), rows, strict=True))
    ]
    names = tuple(trees)[1:]
    if held_out is None:
        return Comparison(tuple(compared), names=names)
    base, adapted, *more = (evaluate(model, tree, held_out()) for tree in trees.values())
    return Comparison(tuple(compared), base, adapted, names, dict(zip(names[1:], more, strict=True)))


def _compared(
    model: Model,
    trees: Mapping[str, PyTree],
    prompt: str,
    row: list[int],
    made: Mapping[str, list[int]],
    decode: Callable[[Sequence[int]], str],
    spell: Callable[[Sequence[int]], str],
) -> PromptComparison:
    """One prompt; `made`: name -> new tokens."""
    base, models, likeliest, after = made[BASE], [], [], len(row) - 1
    kept = [False] * len(base)
    for name, new in list(made.items())[1:]:
        found = along(model, trees[name], trees[BASE], [*row, *new], prompt=len(row))
        likeliest = likeliest or found.base
        changed = [True] * len(new)
        for at_base, at, size in difflib.SequenceMatcher(None, base, new, autojunk=False).get_matching_blocks():
            kept[at_base : at_base + size] = [True] * size
            changed[at : at + size] = [False] * size
        models.append(
            Continuation(
                name=name,
                text=continuation(decode, row, new),
                tokens=_spelled(spell, row, new),
                changed=changed,
                next_tokens=[(spell([i]), p) for i, p in found.adapted],
                kl=found.kl[after : after + len(new)],
                prompt_kl=found.kl[:after],
                l2=found.l2[after],
            )
        )
    first = Continuation(
        name=BASE,
        text=continuation(decode, row, base),
        tokens=_spelled(spell, row, base),
        changed=[not there for there in kept],
        next_tokens=[(spell([i]), p) for i, p in likeliest],
    )
    adapted = models[0]
    return PromptComparison(
        prompt, first.text, adapted.text, adapted.kl[0], adapted.l2, _spelled(spell, [], row), (first, *models)
    )


def _spelled(spell: Callable[[Sequence[int]], str], before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character that several make up belongs to the last of them."""
    texts, row = [], list(before)[-_CONTEXT:]
    for i in ids:
        texts.append(continuation(spell, row, [i]) if row else spell([i]))
        row = [*row, i][-_CONTEXT:]
    return texts


_CONTEXT = 8  # tokens that decide how the next one is spelled
