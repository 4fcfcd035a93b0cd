"""What is asked of the models, and what they answer."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jlora._terminal import console
from jlora._typing import JsonObject, Params
from jlora.cli.base import eval_share, require_data
from jlora.cli.evaluate.options import Evaluate
from jlora.cli.models import Models
from jlora.cli.prompts import sampling
from jlora.data import AUTO, Question, decode_continuation, kind_of, prompt_ids, questions_of
from jlora.data.records import BadRecords
from jlora.evaluation import Example
from jlora.files.run_settings import RunSettings
from jlora.generation import SAMPLING, generate_many
from jlora.storage.stops import token_ids


class Asked(NamedTuple):
    examples: list[Example]
    ids: list[list[int]]
    """The tokens of their prompts."""
    left_out: Mapping[str, str]
    """Place -> why there is no answer to this record."""


class Answered(NamedTuple):
    """A model's answers."""

    texts: list[list[str]]
    """Of each example."""
    cut: int
    """Answers that were at `max_new_tokens` before their end."""


def check_records(options: Evaluate) -> None:
    """
    Raises:
        ValueError: the data are raw text.
    """
    if kind_of(_source(options)) == "text":
        raise ValueError(
            f"Answers are given to records, and {_source(options)!r} is raw text. Leave --metrics out for its perplexity, or give "
            "records."
        )


def _source(options: Evaluate) -> str | Sequence[str]:
    return options.eval_data if _has_own_file(options) else require_data(options)  # pyright: ignore[reportReturnType]


def _has_own_file(options: Evaluate) -> bool:
    """Whether the split is all of a file of its own."""
    return options.split == "validation" and options.eval_data is not None


def ask(options: Evaluate, models: Models, run: RunSettings | None, template: str | None) -> Asked:
    """The prompts of the split.

    Args:
        template: that the records were rendered by; None: as the options say.

    Raises:
        ValueError: as `questions_of` and `prompt_ids`; or where no prompt leaves room for an answer.
    """
    skip, whole = options.skip_bad_records or (run is not None and run.skip_bad_records), _has_own_file(options)
    with tempfile.TemporaryDirectory() as directory:
        questions = questions_of(
            _source(options),
            eval_fraction=eval_share(options),
            held_out=options.split == "validation" and not whole,
            seed=options.seed or 0,
            how=options.of_records()["how"],
            max_examples=None if whole else options.max_examples,
            bad=BadRecords(Path(directory) / "bad_records.jsonl" if skip else None),
            references=options.references,
            tests=options.tests,
            answered=options.perplexity,
        )
    return _encoded(questions, template or _template(options, questions), models, options.max_new_tokens, skip)


def _template(options: Evaluate, questions: Sequence[Question]) -> str:
    if options.template != AUTO:
        return options.template or "alpaca"
    return "chat" if any("messages" in question.record for question in questions) else "alpaca"


def _encoded(questions: Sequence[Question], template: str, models: Models, new: int, skip: bool) -> Asked:
    positions = models.model.config.max_length
    examples, ids, left_out = [], [], {}
    for question in questions:
        try:
            row = prompt_ids(question.record, models.tokenizer, template=template)
        except ValueError as error:
            if not skip:
                raise ValueError(f"{question.where}: {error}") from error
            left_out[question.where] = str(error)
            continue
        if len(row) + new > positions:
            left_out[question.where] = (
                f"the prompt leaves no room for {new} tokens among the model's {positions} positions"
            )
            continue
        examples.append(Example(question.where, question.shown, question.references, question.tests))
        ids.append(row)
    if not examples:
        where, why = next(iter(left_out.items()), ("the split", "it is empty"))
        raise ValueError(
            f"There is nothing to answer: {where}: {why}. Give other records, --split all, or a smaller --max-new-tokens."
        )
    return Asked(examples, ids, left_out)


def respond(options: Evaluate, models: Models, params: Params, asked: Asked, name: str) -> Answered:
    """`options.answers` answers to each prompt by one of the models."""
    copies = options.answers
    prompts = [row for row in asked.ids for _ in range(copies)]
    made = generate_many(
        models.model,
        params,
        prompts,
        batch_size=options.batch_size,
        key=jax.random.key(options.sampling_seed),
        **_drawn(options, models.base),
    )
    rows = dict(with_bar(made, len(prompts), f"{name} answers"))
    ends = set(token_ids(models.model.config.eos_token_id, where="the model's config"))
    texts = [decode_continuation(models.tokenizer, prompts[i], rows[i]) for i in range(len(prompts))]
    cut = sum(row[-1] not in ends for row in rows.values())
    return Answered([texts[i : i + copies] for i in range(0, len(texts), copies)], cut)


def _drawn(options: Evaluate, base: str) -> JsonObject:
    """How to sample, which where the likeliest token is taken has nothing to be told of."""
    if options.temperature == 0:
        return SAMPLING._asdict() | {"max_new_tokens": options.max_new_tokens, "temperature": 0.0}
    return sampling(options, base)


Item = TypeVar("Item")


def with_bar(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """With a bar on the terminal, if standard error is one."""
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total)
