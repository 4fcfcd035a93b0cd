"""What a run reads, and where it writes."""

import dataclasses
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a run reads, and where it writes."""

    model: str
    """Hugging Face directory or hub id of the base model, or a GGUF file."""
    data: str
    """A .txt file or folder of them (raw text), a .jsonl or .json file, or the id of a hub data set (records with
    instruction, input, output; or messages)."""
    output: str
    """Directory of the run. An existing one is refused without --resume."""

    eval_data: str | None = None
    """Evaluate on this file instead of a share of --data."""
    eval_fraction: float | None = None
    """Share of --data to evaluate on (default 0.1 without --eval-data); 0: no evaluation."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How records become text: Alpaca's prompt, or the tokenizer's own chat template."""
    max_length: int | None = None
    """Tokens in a row; longer records are cut. Default: 512, or the model's limit if that is less."""
    pack: bool = False
    """Put several records into a row; they do not see each other."""

    def problems(self) -> Iterator[str]:
        if self.max_length is not None and self.max_length < 2:
            yield f"`max_length` must be at least 2, a token and the one it predicts; got {self.max_length}."
        if self.eval_data is not None and self.eval_fraction:
            yield "`eval_data` and `eval_fraction` exclude each other; leave one out."
