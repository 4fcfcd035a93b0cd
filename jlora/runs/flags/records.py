"""How records are read, mixed and supervised: what every command with `--data` can be told."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from jlora._typing import JsonObject
from jlora.data import FormatName, Supervise, reading
from jlora.runs.flags.checks import counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFlags:
    """How records are read, mixed and supervised. None is the default of `jlora.data.load_data`."""

    format: FormatName | None = None
    """How the records are written; default: told by their columns."""
    columns: Sequence[str] | None = None
    """Columns under other names, MEANING=COLUMN, such as instruction=question output=answer."""
    data_weights: Sequence[float] | None = None
    """The share of each --data in an epoch, which stays as long; default: every record once."""
    data_temperature: float | None = None
    """Takes the shares to the power of 1/T: above 1, small --data come oftener; default: 1."""
    max_examples: int | None = None
    """Take so many records of each --data, the first ones."""
    system: str | None = None
    """A system prompt for the records that have none."""
    supervise: Supervise | None = None
    """What the loss is on: assistant, each answer (default); response, those behind the last turn of the user; last, the last one;
    all, the whole text."""
    skip_bad_records: bool = False
    """Leave out records that cannot be used, and count them, instead of refusing them; a run writes them to
    OUTPUT/bad_records.jsonl."""
    streaming: bool = False
    """Keep tokenized records on the disk, in OUTPUT/data, for data larger than memory: the same batches."""

    def __post_init__(self):
        for name in ("columns", "data_weights"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    def of_records(self) -> JsonObject:
        """The keywords of `load_data`."""
        return {
            "how": reading(self.format, self.columns or (), self.system),
            "weights": self.data_weights,
            "temperature": 1.0 if self.data_temperature is None else self.data_temperature,
            "max_examples": self.max_examples,
            "supervise": self.supervise or "assistant",
            "streaming": self.streaming,
        }

    def problems(self) -> Iterator[str]:
        yield from counts(self, "max_examples")
        for value in (*(self.data_weights or ()), *([] if self.data_temperature is None else [self.data_temperature])):
            if not 0 < value < math.inf:
                yield f"`data_weights` and `data_temperature` must be positive; got {value}."
        if self.system is not None and not self.system.strip():
            yield "`system` must say something; got an empty text. Leave it out."
        try:
            reading(self.format, self.columns or (), self.system)
        except ValueError as error:
            yield str(error)
