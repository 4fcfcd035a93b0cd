"""`jlora_run.json`: what a run says beside its adapter, for those who evaluate, continue or merge it."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from jlora._typing import Json
from jlora.quant import KEEP, SPECS
from jlora.storage.structured import read_json
from jlora.storage.whole import whole_file

FILE = "jlora_run.json"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How an adapter was trained, as far as its figures depend on it. The names are `FinetuneConfig`'s."""

    template: str | None
    """How records became text; None: they were raw text."""
    data: str | None
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

    def write(self, directory: str | os.PathLike) -> None:
        """As `FILE` of an adapter's directory."""
        with whole_file(Path(directory) / FILE) as partial:
            partial.write_bytes(self.to_json())

    def to_json(self) -> bytes:
        return (json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2) + "\n").encode()

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
        wrong = [f"`{name}` is missing" for name in _CHECKS if name not in given]
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


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_PACKED = (*SPECS, KEEP)

_CHECKS: Mapping[str, tuple[str, Callable[[Json], bool]]] = {
    "template": ("'alpaca', 'chat' or null", lambda v: v in (None, "alpaca", "chat")),
    "data": ("a name or null", _is_text),
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
}
"""Field -> (what it must be, whether a value is)."""
