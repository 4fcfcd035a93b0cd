"""What the directory of a run says of how its adapter came to be."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jlora._typing import Json, JsonObject
from jlora.data import holds_rows, hub_id
from jlora.storage.history import read_history
from jlora.storage.structured import read_yaml

CONFIG, METRICS = "config.yaml", "metrics.jsonl"

HYPERPARAMETERS = (
    "kind", "rank", "alpha", "dropout", "targets", "exclude", "layers_to_transform", "bias", "modules_to_save", "use_rslora",
    "use_dora", "init", "quantize", "template", "max_length", "pack", "optimizer", "learning_rate", "schedule", "warmup_fraction",
    "warmup_steps", "min_learning_rate", "decay_fraction", "weight_decay", "beta1", "beta2", "momentum", "max_grad_norm",
    "lora_plus_ratio", "neftune_alpha", "label_smoothing", "batch_size", "accumulate", "epochs", "dtype", "seed",
)  # fmt: skip
"""The fields of config.yaml that say what was trained and how, in the order in which they are read."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run directory says about how its adapter came to be."""

    directory: Path
    config: Mapping[str, Json]
    """config.yaml."""
    history: Sequence[Mapping[str, Json]]
    """metrics.jsonl."""

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "RunRecord":
        """Raises a FileNotFoundError for what is not a directory of `jlora finetune`, and a ValueError for a broken one."""
        directory = Path(directory)
        for name in (CONFIG, METRICS):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{str(directory)!r} is no run of `jlora finetune`: there is no {name} in it.")
        try:
            return cls(directory, read_config(directory), read_history(directory / METRICS))
        except ValueError as error:
            raise ValueError(f"The run in {str(directory)!r} cannot be read: {str(error).rstrip('.')}.") from error

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        return [(e["step"], e["loss"]) for e in self.history if e.get("loss") is not None]

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, evaluation loss)."""
        return [(e["step"], e["eval_loss"]) for e in self.history if "eval_loss" in e]

    @property
    def before(self) -> float | None:
        """The evaluation loss before the first step."""
        return next((loss for step, loss in self.evaluations if step == 0), None)

    @property
    def chosen(self) -> tuple[int, float] | None:
        """Of `evaluations`, that of the adapter that was saved: the last, or the best with --save best; None: there is none."""
        after = [entry for entry in self.evaluations if entry[0] > 0]
        if not after:
            return None
        return min(after, key=lambda entry: entry[1]) if self.config.get("save") == "best" else after[-1]

    @property
    def is_text(self) -> bool:
        """Whether the data were raw text, which leaves its shards in the run; those of records are other ones."""
        shards = self.directory / "data"
        return shards.is_dir() and any(shards.iterdir()) and not holds_rows(shards)

    @property
    def data_sets(self) -> list[str]:
        """The hub ids of the data, where all of them came from the hub."""
        named = self.config.get("data", "")
        ids = [hub_id(str(name)) for name in (named if isinstance(named, list) else [named])]
        return [] if None in ids or self.is_text else list(dict.fromkeys(filter(None, ids)))

    @property
    def hyperparameters(self) -> Iterator[tuple[str, Json]]:
        """Name in words -> value, of those that are not off."""
        for name in HYPERPARAMETERS:
            value = self.config.get(name)
            if name == "template" and self.is_text:
                continue
            if value not in (None, [], False, "none", "auto") or (name in ("dropout", "seed") and value is not None):
                yield name.replace("_", " "), value
        if self.losses:
            yield "steps", self.losses[-1][0]

    @property
    def loss_table(self) -> Iterator[tuple[str, str, str, str]]:
        """(what, step, loss, perplexity)."""
        rows = []
        if self.losses:
            rows += [("training, first step", *self.losses[0]), ("training, last step", *self.losses[-1])]
        if self.before is not None:
            rows += [("evaluation, before training", 0, self.before)]
        if self.chosen is not None:
            rows += [("evaluation, this adapter", *self.chosen)]
        for name, step, loss in rows:
            yield name, str(step), loss_said(loss), perplexity_said(loss)


def loss_said(loss: float | None) -> str:
    """Empty: there is none."""
    return "" if loss is None else f"{loss:.4f}"


def perplexity_said(loss: float | None) -> str:
    return "" if loss is None else f"{math.exp(loss):.2f}" if loss < 700 else "inf"


def read_config(directory: Path) -> JsonObject:
    """The fields of a run's config.yaml.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is none.
    """
    config = read_yaml(directory / CONFIG)
    for name in ("model", "data"):
        values = config.get(name)
        values = values if name == "data" and isinstance(values, list) else [values]
        if not all(isinstance(value, str | None) for value in values):
            raise ValueError(f"`{name}` in {CONFIG} must be text; got {config[name]!r}")
    return config


def in_words(value: Json) -> str:
    """A value of a configuration."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
