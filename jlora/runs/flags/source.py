"""What a run reads, and where it writes."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Literal

from jlora.data import TemplateName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a run reads, and where it writes."""

    model: str
    """Hugging Face directory or hub id of the base model, or a GGUF file."""
    data: str | Sequence[str]
    """One or more: .txt files or folders of them (raw text); or records, in .jsonl, .json, .parquet, .csv or .tsv files, folders of
    them, or hub data sets, owner/name:configuration:split."""
    output: str
    """Directory of the run. An existing one is refused without --resume."""

    init_adapter: str | None = None
    """Start anew from the weights of this adapter, such as OUTPUT/adapter of another run, with the same adapter flags."""
    new_tokens: str | None = None
    """A file of tokens, one a line, that the tokenizer is given; their rows of the embedding are trained too, and of the head."""
    eval_data: str | None = None
    """Evaluate on this file instead of a share of --data."""
    eval_fraction: float | None = None
    """Share of --data to evaluate on (default 0.1 without --eval-data); 0: no evaluation."""
    template: TemplateName | Literal["auto"] = "alpaca"
    """How records become text: Alpaca's prompt, the tokenizer's own chat template, or one by name, which is saved with the
    tokenizer; auto: chat where there are conversations, alpaca otherwise."""
    max_length: int | None = None
    """Tokens in a row; longer records are cut. Default: 512, or the model's limit if that is less."""
    pack: bool = False
    """Put several records into a row; they do not see each other."""

    def __post_init__(self):
        for name in ("model", "data", "output", "init_adapter", "new_tokens", "eval_data"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        if not isinstance(self.data, str):
            named = tuple(map(os.fspath, self.data))
            object.__setattr__(self, "data", named[0] if len(named) == 1 else named)

    def problems(self) -> Iterator[str]:
        if not self.data:
            yield "`data` must name at least one file or data set; got none."
        if self.max_length is not None and self.max_length < 2:
            yield f"`max_length` must be at least 2, a token and the one it predicts; got {self.max_length}."
        if self.eval_data is not None and self.eval_fraction:
            yield "`eval_data` and `eval_fraction` exclude each other; leave one out."
