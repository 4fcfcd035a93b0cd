"""`jlora_run.json`: what a run says beside its adapter, for those who evaluate, continue or merge it."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora._typing import Json
from jlora.quant import KEEP, SPECS
from jlora.storage.structured import read_json
from jlora.storage.whole import whole_file

FILE = "jlora_run.json"
VERSION = 1
OF_RECORDS = (
    "format", "columns", "data_weights", "data_temperature", "max_examples", "system", "supervise", "skip_bad_records",
)  # fmt: skip
"""Settings that are `RecordFlags` of the run: in the file where they are not their defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How an adapter was trained, as far as its figures depend on it. The names are `FinetuneConfig`'s."""

    template: str | None
    """How records became text; None: they were raw text."""
    data: str | Sequence[str] | None
    """As it was given to the run; None: not told, because it is a path of another machine."""
    eval_data: str | None
    """What the run evaluated on, where that was no share of `data`."""
    eval_fraction: float
    """The share of `data` that was not trained on."""
    seed: int
    """Of the choice of that share."""
    max_length: int
    """Tokens in a row."""
    pack: bool
    quantize: str | None
    """How the base was packed."""
    base: str | None = None
    """`base_fingerprint` of what it was trained on; None: of a merged checkpoint, which is on no other."""
    format: str | None = None
    columns: Sequence[str] | None = None
    data_weights: Sequence[float] | None = None
    data_temperature: float | None = None
    max_examples: int | None = None
    system: str | None = None
    supervise: str | None = None
    skip_bad_records: bool = False

    def __post_init__(self):
        for name in ("data", "columns", "data_weights"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def write(self, directory: str | os.PathLike) -> None:
        """As `FILE` of an adapter's directory."""
        with whole_file(Path(directory) / FILE) as partial:
            partial.write_bytes(self.to_json())

    def to_json(self) -> bytes:
        fields = {name: value for name, value in vars(self).items() if name not in OF_RECORDS or value}
        return (json.dumps({"version": VERSION, **fields}, indent=2) + "\n").encode()

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "RunSettings | None":
        """Of an adapter's directory; None: it has none, as adapters of PEFT and of mlx-lm.

        Raises:
            ValueError: when the file is damaged, or another version's.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            return None
        fields = read_json(path)
        if fields.get("version") != VERSION:
            raise ValueError(
                f"`version` in {str(path)!r} must be {VERSION}; got {fields.get('version')!r}. Update jlora, or remove the file "
                "and give the run's settings as flags."
            )
        given = {name: value for name, value in fields.items() if name != "version"}
        wrong = [f"`{name}` is missing" for name in _CHECKS if name not in given and name not in OF_RECORDS]
        wrong += [f"`{name}` is no setting of a run" for name in given if name not in _CHECKS]
        wrong += [
            f"`{name}` must be {_CHECKS[name][0]}; got {value!r}"
            for name, value in given.items()
            if name in _CHECKS and not _CHECKS[name][1](value)
        ]
        if wrong:
            raise ValueError(
                f"{str(path)!r} is damaged: {'; '.join(wrong)}. Copy it again from the run, or remove it and give the run's "
                "settings as flags."
            )
        return cls(**given)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_list(value: Json, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_PACKED = (*SPECS, KEEP)

_CHECKS: Mapping[str, tuple[str, Callable[[Json], bool]]] = {
    "template": ("a template's name or null", _is_text),
    "data": ("a name, names or null", lambda v: _is_text(v) or _is_list(v, str)),
    "eval_data": ("a name or null", _is_text),
    "eval_fraction": ("in [0, 1)", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1),
    "seed": ("an integer from 0", lambda v: _is_int(v, 0)),
    "max_length": ("an integer from 2", lambda v: _is_int(v, 2)),
    "pack": ("true or false", lambda v: isinstance(v, bool)),
    "quantize": (
        f"{', '.join(map(repr, _PACKED))} or null",
        lambda v: v is None or (isinstance(v, str) and v in _PACKED),
    ),
    "base": ("a fingerprint or null", _is_text),
    "format": ("a format's name or null", _is_text),
    "columns": ("names or null", lambda v: v is None or _is_list(v, str)),
    "data_weights": ("numbers or null", lambda v: v is None or _is_list(v, int | float)),
    "data_temperature": ("a number or null", lambda v: v is None or _is_list([v], int | float)),
    "max_examples": ("an integer from 1 or null", lambda v: v is None or _is_int(v, 1)),
    "system": ("a text or null", _is_text),
    "supervise": ("what the loss is on, or null", _is_text),
    "skip_bad_records": ("true or false", lambda v: isinstance(v, bool)),
}
"""Field -> (what it must be, whether a value is)."""
