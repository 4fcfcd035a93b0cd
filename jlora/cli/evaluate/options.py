"""The flags of `jlora evaluate`."""

import dataclasses
from collections.abc import Iterator

from jlora._numbers import check_seed
from jlora.cli.base import EvaluationData, Weights
from jlora.cli.prompts import Drawing
from jlora.evaluation import Sandbox, metrics_named
from jlora.runs.flags.checks import counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationData, Drawing, Weights):
    """Loss and perplexity of a model, its adapters or all of them side by side; with --metrics also scores of generated answers.
    A table on a terminal, JSON into a pipe."""

    adapter: tuple[str, ...] = ()  # pyright: ignore
    """Directories of adapters, such as OUTPUT/adapter, or of several of them, or GGUF files; each evaluated on the one base."""
    seed: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Of the choice of validation records; default: as in the adapter's run, otherwise 0."""
    base: bool = False
    """Evaluate the base without an adapter too, and how far each adapter is from it."""
    perplexity: bool = True
    """Without it only answers are scored, and records need none of their own."""
    metrics: tuple[str, ...] = ()
    """Scores of the answers that are generated to records: exact_match, f1, accuracy, macro_f1, wer, cer, bleu, chrf,
    rouge (which is rouge1, rouge2 and rougeL), rougeLsum, json_valid, json_fields, refusal, embedding, pass@k."""
    references: str | None = None
    """The column of right answers, a text or several; default: the record's own last answer."""
    tests: str | None = None
    """For pass@k, the column of Python code that runs behind an answer and fails where it is wrong."""
    allow_code: bool = False
    """Run what the model writes, which pass@k needs: in processes without network, under the limits below."""
    code_seconds: float = Sandbox.seconds
    """That a candidate of pass@k may take."""
    code_megabytes: int = Sandbox.megabytes
    """Of memory (address space) that it may take."""
    embedding_model: str | None = None
    """For the metric embedding: the model whose mean last hidden states are compared; a directory, hub id or GGUF file."""
    judge: str | None = None
    """An OpenAI-compatible endpoint, such as http://localhost:8000/v1, whose model says which of two answers is better, asked in
    both orders: each adapter's against the base's with --base, else against the reference. Its key: OPENAI_API_KEY."""
    judge_model: str | None = None
    """The name of the model that the endpoint is to use."""
    samples: int | None = None
    """Answers to each record; default: 1, or the largest k of pass@k."""
    temperature: float | None = 0.0
    """0: always the likeliest token."""
    sampling_seed: int = 0
    """Of sampling and of the bootstrap."""
    bootstrap: int = 1000
    """Resamples for the 95 % intervals."""
    output: str | None = None
    """Also write the JSON to this file."""
    examples: str | None = None
    """Write every example with its answers and scores to this file, as JSON lines."""

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.sampling_seed)

    @property
    def asks(self) -> bool:
        """Whether answers are generated."""
        return bool(self.metrics) or self.judge is not None

    @property
    def answers(self) -> int:
        """To each record."""
        return self.samples or self._largest()

    def _largest(self) -> int:
        return max((metric.answers for metric in metrics_named(self.metrics).values()), default=1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from counts(self, "samples", "bootstrap", "code_megabytes")
        needs, largest = {metric.need for metric in metrics_named(self.metrics).values()}, self._largest()
        if not self.code_seconds > 0:
            yield f"`code_seconds` must be positive; got {self.code_seconds}."
        if self.answers < largest:
            yield f"`samples` must be at least the {largest} of pass@{largest}; got {self.samples}."
        if self.answers > 1 and self.temperature == 0:
            yield f"{self.answers} answers of temperature 0 are one and the same. Give --temperature 0.8, or --samples 1."
        if "tests" in needs and self.tests is None:
            yield "pass@k needs --tests COLUMN, the code that runs behind an answer."
        if "tests" in needs and not self.allow_code:
            yield (
                "pass@k runs code that a model wrote. Each candidate gets a process of its own, without network and under limits; "
                "that is no reason to trust it with this machine. Say --allow-code, best in a container."
            )
        if "embedder" in needs and self.embedding_model is None:
            yield "The metric embedding needs --embedding-model: a directory, a hub id or a GGUF file."
        if "tests" not in needs and self.tests is not None:
            yield "--tests are for pass@k: give --metrics pass@1."
        if "embedder" not in needs and self.embedding_model is not None:
            yield "An --embedding-model is for the metric embedding: give --metrics embedding."
        if (self.judge is None) != (self.judge_model is None):
            yield "A judge has an address and a model: give --judge URL and --judge-model NAME."
        if not (self.perplexity or self.asks):
            yield "There is nothing to evaluate: leave --no-perplexity out, or give --metrics."
        if self.examples is not None and not self.asks:
            yield "--examples FILE has answers and their scores: give --metrics."
