"""What is written and said of a run while it goes on; nothing of it changes what is trained."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from jlora.runs.flags.checks import counts

NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """What is written and said of a run while it goes on; nothing of it changes what is trained."""

    run_name: str | None = None
    """Of the run in tables and trackers; default: the name of the --output directory."""
    log_to: Sequence[Literal["csv", "tensorboard", "trackio", "wandb", "none"]] = ("csv",)
    """Where else the lines of metrics.jsonl go: OUTPUT/metrics.csv, OUTPUT/tensorboard, and the trackers of these names."""
    experiments_log: str | None = None
    """A CSV table with a row for each run that has ended; default: experiments_log.csv beside --output. none: no table."""
    report: Literal["page", "none"] = "page"
    """page: write OUTPUT/report.html and OUTPUT/report.md at the end of the run; none: neither. `jlora report` writes them too."""
    sample_prompts: Sequence[str] = ()
    """Continue these prompts at every evaluation, greedily, into OUTPUT/samples.jsonl."""
    sample_prompts_file: str | None = None
    """More of them: a .txt file with one a line, or records in .jsonl or .json."""
    sample_tokens: int = 64
    """At most this many new tokens a prompt."""
    profile: int | None = None
    """Trace so many steps, from the third on, into OUTPUT/profile."""

    def __post_init__(self):
        for name in ("log_to", "sample_prompts"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    def problems(self) -> Iterator[str]:
        yield from counts(self, "sample_tokens", "profile")
        if NONE in self.log_to and len(self.log_to) > 1:
            yield f"`log_to` {NONE!r} stands alone; got {' '.join(self.log_to)}."
        for name in ("run_name", "experiments_log", "sample_prompts_file"):
            if getattr(self, name) == "":
                yield f"`{name}` must not be empty; leave it out for the default."
