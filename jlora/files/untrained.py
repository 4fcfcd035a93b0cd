"""Tokens that a base model never met: reserved ones, or those that were added to its vocabulary and not trained.

Their rows of the embedding are still what they were set to: zero, next to it, or the same for all of them (transformers'
`resize_token_embeddings` gives new ones the mean). An adapter of other modules does not change them, so what such a token
means, and when it is to be said, is not learned.
"""

from collections.abc import Collection, Set
from pathlib import Path

import numpy as np

from jlora._typing import PretrainedTokenizer
from jlora.files.opened import names_in, open_checkpoint
from jlora.models import Model
from jlora.storage.stops import own_tokens

HEAD = "lm_head/kernel"

_TINY = 0.01
"""Of the median norm of the rows. Those of rare tokens have a third of it or more; decay has made these vanish."""
_SAME = 1e-3
"""Of the row's norm or the median one: transformers gives new rows the mean, which may be short, with noise of some 3e-5 of a
usual row, and 16 bits round the two apart."""
_SAMPLED = 256  # rows that the median is taken of
_COMPARED = 4096  # rows of special tokens, which some vocabularies have by the ten thousand


def untrained_tokens(
    directory: Path,
    model: Model,
    tokenizer: PretrainedTokenizer,
    *,
    used: Set[int],
    learned: Set[int],
    trained: Collection[str],
) -> str | None:
    """Says which special and added tokens of the data the base has no trained rows for, and what to do; None: it has all.

    Only the rows of special tokens and a sample of others are read.

    Args:
        directory: of the base checkpoint, or its GGUF file.
        used, learned: ids in the rows of the data, and of them those that are supervised.
        trained: paths of the leaves that the run trains; the embedding and the head are no matter where they are among them.
    """
    checkpoint, embedding = open_checkpoint(directory), model.config.embedding_path
    wanted = {embedding: used} if model.config.tie_word_embeddings else {embedding: used, HEAD: learned}
    names = names_in(checkpoint, wanted)
    said: dict[str, str] = {}
    modules = []
    for path, ids in wanted.items():
        if path in trained or len(checkpoint.shapes[names[path]]) != 2:
            continue
        table = checkpoint.read(names[path])
        if len(table) != model.config.vocab_size:
            continue  # a quantized head
        found = _untrained_rows(table, tokenizer, ids)
        modules += [path.split("/")[-2]] if found else []
        said = found | said
    if not said:
        return None
    tied = model.config.tie_word_embeddings and not learned.isdisjoint(own_tokens(tokenizer)[token] for token in said)
    aside = " (to read them: the head, which is tied to it, keeps these rows)" if tied else ""
    listed = ", ".join(f"{token!r} ({why})" for token, why in list(said.items())[:8])
    more = f" and {len(said) - 8} more" if len(said) > 8 else ""
    return (
        f"the base has no trained row of its own for {len(said)} special token{'s' if len(said) > 1 else ''} of the data: "
        f"{listed}{more}. An adapter of other modules cannot teach it what they mean or when to say them: list them in a "
        "file for --new-tokens, which trains their rows alone, or add --modules-to-save "
        f"{' '.join(modules)}{aside}, or take a base that knows them, or a template that does without."
    )


def _untrained_rows(table: np.ndarray, tokenizer: PretrainedTokenizer, ids: Set[int]) -> dict[str, str]:
    """Token -> why its row cannot have been trained, for the special and added tokens among `ids`.

    Args:
        table: [vocab, d_model], of which only the rows that are looked at are read.
    """
    own = {i: token for token, i in own_tokens(tokenizer).items() if i < len(table)}
    asked = [i for i in own if i in ids]
    if not asked:
        return {}
    # Padding is often given a copy of another token's row, which is trained.
    others = [i for i in own if i not in ids and i != tokenizer.pad_token_id]
    compared = (asked + others)[:_COMPARED]
    rows = np.asarray(table[compared], np.float32)
    norms = np.linalg.norm(rows, axis=1)
    sampled = np.unique(np.linspace(0, len(table) - 1, _SAMPLED).astype(int))
    typical = float(np.median(np.linalg.norm(np.asarray(table[sampled], np.float32), axis=1)))
    found = {}
    for place, token_id in enumerate(compared[: len(asked)]):
        if norms[place] <= _TINY * typical:
            found[own[token_id]] = "zero" if norms[place] == 0 else f"{norms[place] / typical:.1g} of the usual norm"
            continue
        apart = _SAME * max(norms[place], typical)
        near = np.flatnonzero(np.abs(norms - norms[place]) <= apart)
        same = near[np.linalg.norm(rows[near] - rows[place], axis=1) <= apart]
        if len(twins := [compared[i] for i in same if i != place]):
            found[own[token_id]] = f"as {own[twins[0]]!r}"
    return found
