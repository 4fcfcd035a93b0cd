"""Texts as vectors: the mean of a model's last hidden states."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, Float, Int, Params
from jlora.evaluation.example import Answers, Counts, Example, Unscorable, averaged, best, references
from jlora.models import Model

_MULTIPLE = 32
"""Of which a batch's width is one, so that texts of nearly one length share a compilation."""


class Embedder(NamedTuple):
    """A causal model that turns texts into vectors."""

    model: Model
    params: Params
    encode: Callable[[str], list[int]]
    """A text's tokens."""
    batch_size: int = 8

    def vectors(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "texts d_model"]:
        """Of the tokens of texts, none of them empty or longer than the model's positions. Long ones go together."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = np.zeros((len(rows), self.model.config.width), np.float32)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            width = -(-max(len(rows[i]) for i in chosen) // _MULTIPLE) * _MULTIPLE
            ids, there = np.zeros((2, self.batch_size, min(width, self.model.config.max_length)), np.int32)
            for place, i in enumerate(chosen):
                ids[place, : len(rows[i])], there[place, : len(rows[i])] = rows[i], 1
            found[chosen] = np.asarray(_pooled(self.model, self.params, ids, there))[: len(chosen)]
        return found


@functools.partial(jax.jit, static_argnames="model")
def _pooled(model: Model, params: Params, ids: Int[Array, "batch seq"], there: Int[Array, "batch seq"]):
    # A causal model: what is behind a text does not change its states.
    hidden = model.apply({"params": params}, ids, head=False).astype(jnp.float32)  # pyright: ignore
    return jnp.einsum("btd,bt->bd", hidden, there.astype(jnp.float32)) / jnp.maximum(there.sum(1), 1)[:, None]


def cosine(embedder: Embedder, examples: Sequence[Example], answers: Answers) -> Counts:
    """The cosine of the vectors of answer and reference, -1 to 1; 0 for an answer that says nothing."""
    positions = embedder.model.config.max_length
    said = {text for example in examples for text in example.references} | {text for given in answers for text in given}
    ids = {text: embedder.encode(text) for text in sorted(said) if text.strip()}
    fit = [text for text, row in ids.items() if len(row) <= positions]
    vectors = embedder.vectors([ids[text] for text in fit])
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    place = {text: i for i, text in enumerate(fit)}

    def score(example: Example, answer: str) -> float:
        for text in (*references(example), answer):
            if text in ids and text not in place:
                raise Unscorable(f"one of its texts has more tokens than the embedding model's {positions} positions")
        if all(text not in place for text in example.references):
            raise Unscorable("its reference says nothing")
        if answer not in place:
            return 0.0
        said = example._replace(references=tuple(text for text in example.references if text in place))
        return best(lambda reference, text: float(unit[place[reference]] @ unit[place[text]]), said, answer)

    return averaged(score, examples, answers)
