"""Adapter directories: whose layout they have, decided here by the files found and nowhere else."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.storage.checkpoint_files import holds_checkpoint
from jlora.storage.fields import check_fields, optional, text
from jlora.storage.structured import read_json

CONFIG = "adapter_config.json"


class Layout(NamedTuple):
    """How a library lays out an adapter; each has an `adapter_config.json` beside its weights."""

    name: str
    weights: str
    """The file of weights."""
    marks: tuple[str, ...]
    """Fields of its config that no other layout has."""
    base: str
    """The field of its config that names the base model."""


PEFT = Layout("PEFT", "adapter_model.safetensors", ("peft_type",), "base_model_name_or_path")
MLX = Layout("mlx-lm", "adapters.safetensors", ("fine_tune_type", "lora_parameters"), "model")
LAYOUTS = (PEFT, MLX)


class AdapterDirectory(NamedTuple):
    path: Path
    layout: Layout
    fields: Mapping[str, Any]
    """Of `adapter_config.json`."""

    @property
    def weights(self) -> Path:
        """The file of weights.

        Raises:
            FileNotFoundError: when it is not there.
        """
        path = self.path / self.layout.weights
        if not path.is_file():
            legacy = self.layout == PEFT and (self.path / "adapter_model.bin").is_file()
            raise FileNotFoundError(
                f"There is no {path.name} in {str(self.path)!r}."
                + (
                    " Convert adapter_model.bin: load it in PEFT and call `save_pretrained(directory)`."
                    if legacy
                    else ""
                )
            )
        return path

    @property
    def base_model(self) -> str | None:
        """The base model that the config names.

        Raises:
            ValueError: when the field holds something else than a name.
        """
        check_fields(self.fields, {self.layout.base: optional(text())}, where=repr(str(self.path / CONFIG)))
        return self.fields.get(self.layout.base)


def open_adapter(directory: str | os.PathLike) -> AdapterDirectory:
    """The layout and the config of an adapter directory: PEFT's, or mlx-lm's where its config has mlx-lm's fields.

    Raises:
        FileNotFoundError: when there is no `adapter_config.json`.
        ValueError: when that is not a JSON object, or config and weights are of different layouts.
    """
    directory = Path(directory)
    path = directory / CONFIG
    if not path.is_file():
        inside = [str(path) for path in adapter_directories(directory).values()]
        raise FileNotFoundError(
            f"No adapter at {str(directory)!r}: there is no adapter_config.json. "
            + (
                f"Pass one of the adapters in it: {', '.join(inside)}."
                if inside
                else "Pass the directory that `jlora.save_adapter`, PEFT's `save_pretrained` or mlx-lm wrote (after `jlora "
                "finetune`: OUTPUT/adapter)."
            )
        )
    fields = read_json(path)
    # A config with no layout's marks counts as PEFT's, whose reader says what it lacks.
    claimed = [layout for layout in LAYOUTS if any(mark in fields for mark in layout.marks)] or [PEFT]
    others = [layout for layout in LAYOUTS if layout != claimed[0] and (directory / layout.weights).exists()]
    if len(claimed) > 1 or others:
        raise ValueError(
            f"{str(directory)!r} mixes two layouts: its adapter_config.json is {' and '.join(c.name for c in claimed)}'s"
            + "".join(f", and {other.weights} is {other.name}'s" for other in others)
            + ". Put each adapter into a directory of its own, with the config that was written with it."
        )
    return AdapterDirectory(directory, claimed[0], fields)


def adapter_directories(directory: str | os.PathLike) -> dict[str, Path]:
    """Name -> directory of every adapter in a directory; one in the directory itself is PEFT's "default"."""
    directory = Path(directory)
    found = {"default": directory} if (directory / CONFIG).is_file() else {}
    return found | {path.parent.name: path.parent for path in sorted(directory.glob(f"*/{CONFIG}"))}


def refuse_mixture(directory: str | os.PathLike, layout: Layout) -> None:
    """Refuses a directory that an adapter of this layout would be mixed up with.

    Raises:
        FileExistsError: where another layout's weights are, whose config a new one would replace, or where a checkpoint is:
            transformers reads both as one model with the adapter on, others as the checkpoint alone.
    """
    if holds_checkpoint(Path(directory)):
        raise FileExistsError(
            f"{os.fspath(directory)!r} holds a model, and with an adapter beside it some readers would put the adapter on and "
            "others not. Write the adapter into a directory of its own."
        )
    for other in LAYOUTS:
        if other != layout and (Path(directory) / other.weights).exists():
            raise FileExistsError(
                f"{os.fspath(directory)!r} holds an adapter in {other.name}'s layout ({other.weights}), whose "
                f"adapter_config.json would be overwritten. Write {layout.name}'s into another directory."
            )
