"""The model that a run distills from."""

import dataclasses

import jax.numpy as jnp

from jlora._typing import DTypeLike, Params, PretrainedTokenizer
from jlora.files import find, load, load_tokenizer
from jlora.files.gguf_packed import stacks_as_packed
from jlora.models import Model
from jlora.quant import KEEP, spec_named
from jlora.runs.config import FinetuneConfig
from jlora.storage.checkpoint_files import base_fingerprint


@dataclasses.dataclass(frozen=True)
class LoadedTeacher:
    model: Model
    params: Params
    fingerprint: str
    """Of its files."""


def load_teacher(
    config: FinetuneConfig, model: Model, tokenizer: PretrainedTokenizer, *, dtype: DTypeLike, length: int
) -> LoadedTeacher | None:
    """The teacher of a run, where it has one.

    Args:
        model, tokenizer: of the model that learns.
        length: tokens in a row, at most.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when its tokens are not the model's, or its rows may not be as long.
    """
    if config.teacher is None:
        return None
    directory = find(config.teacher)
    if load_tokenizer(directory).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"`teacher` must have the vocabulary of the model, whose tokens it is asked about; {config.teacher!r} has another "
            f"than {config.model!r}. Choose a larger model of the same family."
        )
    stack = config.teacher_quantize != KEEP or stacks_as_packed(directory)
    teacher, params = load(directory, dtype=jnp.dtype(dtype), quantize=spec_named(config.teacher_quantize), stack=stack)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"`teacher` must have as many logits as the model; {config.teacher!r} has {teacher.config.vocab_size}, "
            f"{config.model!r} {model.config.vocab_size}. Choose a larger model of the same family."
        )
    if teacher.config.learned_positions and teacher.config.max_length < length:
        raise ValueError(
            f"`teacher` {config.teacher!r} has {teacher.config.max_length} learned positions; rows have {length} tokens. Give "
            f"--max-length {teacher.config.max_length}."
        )
    return LoadedTeacher(teacher, params, base_fingerprint(directory))
