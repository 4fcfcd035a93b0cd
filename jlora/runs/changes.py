"""What of a run's configuration may be another when it is resumed, and the command that resumes it."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from jlora._typing import Json, JsonObject
from jlora.runs.config import FinetuneConfig
from jlora.runs.flags import Watching

# Where a run is, how it is started and ended, and what is said of it do not change its result.
FREE = ("output", "resume", "quiet", "time_limit", *(field.name for field in dataclasses.fields(Watching)))

_COMPUTED = ("remat", "form", "offload_optimizer")
"""Settings of how, not of what, is computed: other values round differently."""
_MICRO = ("batch_size", "accumulate")
"""Likewise, where their product stays: a step then has the same records."""


def plain(fields: Mapping[str, Json]) -> JsonObject:
    """As JSON and YAML give it back: tuples as lists."""
    return json.loads(json.dumps(fields))


DEFAULTS = plain(
    {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.default is not dataclasses.MISSING}
)
"""What a field counts as that an older version's config.yaml lacks: options come with defaults that change nothing."""


def differences(before: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """The names that are not the same in both."""
    return [n for n in {**now, **before} if (n in before, before.get(n)) != (n in now, now.get(n))]


def rounded(before: Mapping[str, Json], now: Mapping[str, Json]) -> tuple[str, ...]:
    """The fields in which `now` may differ from `before`, to a result that is equal up to rounding."""
    rows = [_rows(fields) for fields in (before, now)]
    return (*_COMPUTED, *_MICRO) if rows[0] is not None and rows[0] == rows[1] else _COMPUTED


def _rows(fields: Mapping[str, Json]) -> int | None:
    """The records of a step; None: the fields are damaged."""
    batch_size, accumulate = (fields.get(name) for name in _MICRO)
    if not isinstance(batch_size, int) or not isinstance(accumulate, int):
        return None
    return batch_size * accumulate


def said(before: Mapping[str, Json], now: Mapping[str, Json], names: list[str]) -> str:
    """What other ways to compute mean for the result."""
    listed = ", ".join(f"{name} {now[name]} (was {before[name]})" for name in names)
    text = f"{listed}: from here on the run is equal up to rounding to one that was not stopped, no longer to the byte"
    if now.get("dropout") and set(names) & set(_MICRO):
        text += ", and dropout drops other values"
    return text


def command(config: FinetuneConfig, began: Mapping[str, Json]) -> str:
    """What continues a run, for a shell: its config.yaml, which holds the fields `began`, and what is other than there."""
    now = plain(dataclasses.asdict(config))
    names = [n for n in differences(began, now) if n in now and n != "resume"]
    flags = [part for name in names for part in _flag(name, now[name])]
    words = ["jlora", "finetune", "--config", str(Path(config.output) / "config.yaml"), *flags, "--resume"]
    return shlex.join(words)


def _flag(name: str, value: Json) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]
