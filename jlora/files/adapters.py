"""Adapter directories and files: whose layout they have, decided here by the files found and nowhere else, and reading them.

A layout is one `Layout`, which the file that knows it registers; importing `jlora.files` registers all of them.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jlora._typing import Json, Params, PyTree
from jlora.lora import AdaptedWeight, LoraConfig, stack_adapters
from jlora.lora.config import reads_configs
from jlora.models import Model
from jlora.storage import Checkpoint
from jlora.storage.checkpoint_files import holds_checkpoint
from jlora.storage.fields import check_fields, optional, text
from jlora.storage.gguf import is_gguf
from jlora.storage.structured import read_json
from jlora.storage.tensors import Tensors

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
    read: Callable[["AdapterDirectory", Params], PyTree]
    """Unadapted parameters with the adapter of a directory on them."""
    config: Callable[["AdapterDirectory"], LoraConfig]
    """What its `adapter_config.json` means."""
    module: Callable[[str], str]
    """Start of a tensor's name -> the checkpoint's module path."""
    children: Callable[[type[AdaptedWeight]], Mapping[str, str]]
    """End of the name of a tensor -> trained child of a kind."""
    revision: str | None = None
    """The field of its config that names a revision of the base model on the hub."""
    assumed: bool = False
    """Whether a config without any layout's marks counts as this one's; its reader says what it lacks."""
    open: Callable[[Path], Tensors] = Checkpoint
    """The tensors of the file of weights."""
    is_file: bool = False
    """Whether the adapter is one file, and no directory with a config."""
    legacy: tuple[tuple[str, str], ...] = ()
    """Files of weights that are not read, each with what to do about it."""


_LAYOUTS: dict[str, Layout] = {}


def register(layout: Layout) -> Layout:
    """Makes a layout one of those that are told apart, read and written beside each other."""
    _LAYOUTS[layout.name] = layout
    return layout


def layouts() -> list[Layout]:
    """All there are of directories, the assumed one first."""
    return sorted((layout for layout in _LAYOUTS.values() if not layout.is_file), key=lambda layout: not layout.assumed)


class AdapterDirectory(NamedTuple):
    path: Path
    layout: Layout
    fields: Mapping[str, Json]
    """Of `adapter_config.json`."""
    model: Model | None = None
    """The base model, where whoever reads the adapter has it."""

    @property
    def tensors(self) -> Tensors:
        """Of the file of weights, by their names there."""
        return self.layout.open(self.weights)

    @property
    def weights(self) -> Path:
        """The file of weights.

        Raises:
            FileNotFoundError: when it is not there.
        """
        path = self.path / self.layout.weights
        if not path.is_file():
            legacy = [f" {said}" for name, said in self.layout.legacy if (self.path / name).is_file()]
            raise FileNotFoundError(f"There is no {path.name} in {str(self.path)!r}.{''.join(legacy)}")
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
    """The layout and the config of an adapter directory, by the fields that its config has.

    Raises:
        FileNotFoundError: when there is no `adapter_config.json`.
        ValueError: when that is not a JSON object, or config and weights are of different layouts.
    """
    directory = Path(directory)
    if is_gguf(directory):
        (layout,) = [layout for layout in _LAYOUTS.values() if layout.is_file]
        return AdapterDirectory(directory, layout, {})
    path = directory / CONFIG
    if not path.is_file():
        inside = [str(path) for path in adapter_directories(directory).values()]
        raise FileNotFoundError(
            f"No adapter at {str(directory)!r}: there is no adapter_config.json. "
            + (
                f"Pass one of the adapters in it: {', '.join(inside)}."
                if inside
                else "Pass the directory that `jlora.save_adapter`, PEFT's `save_pretrained` or mlx-lm wrote (after `jlora "
                "finetune`: OUTPUT/adapter), or a GGUF file."
            )
        )
    fields = read_json(path)
    known = layouts()
    claimed = [layout for layout in known if any(mark in fields for mark in layout.marks)]
    claimed = claimed or [layout for layout in known if layout.assumed]
    others = [layout for layout in known if layout != claimed[0] and (directory / layout.weights).exists()]
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
    for other in layouts():
        if other != layout and (Path(directory) / other.weights).exists():
            raise FileExistsError(
                f"{os.fspath(directory)!r} holds an adapter in {other.name}'s layout ({other.weights}), whose "
                f"adapter_config.json would be overwritten. Write {layout.name}'s into another directory."
            )


@reads_configs
def load_config(directory: str | os.PathLike) -> LoraConfig:
    """See `LoraConfig.load`."""
    found = open_adapter(directory)
    return found.layout.config(found)


def load_adapter(directory: str | os.PathLike, params: Params, *, model: Model | None = None) -> PyTree:
    """Unadapted parameters with the adapter of a directory on them, PEFT's or mlx-lm's, or of a GGUF file.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors` (written by `save_adapter` or by PEFT) or
            `adapters.safetensors` (by `save_mlx_adapter` or by mlx-lm). Which of the two, its config says. Or the file that
            `save_gguf_adapter` or llama.cpp's convert_lora_to_gguf.py wrote.
        params: unadapted, per-layer or stacked.
        model: the base model. Files of llama.cpp's own converter need it where the order of rows depends on its heads.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for features that are not represented, and for missing, unexpected or mis-shaped tensors, all in
            one error: an adapter that loads in part would silently give other outputs.
    """
    found = open_adapter(directory)._replace(model=model)
    return found.layout.read(found, params)


def tokens_of(directory: str | os.PathLike) -> int:
    """How many tokens a base must have rows for to take the adapter, by PEFT's `trainable_token_indices`; see `jlora.grow`."""
    given = open_adapter(directory).fields.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    # What is no list of numbers is refused with the rest of the config.
    return 1 + max((i for ids in lists if isinstance(ids, list) for i in ids if isinstance(i, int)), default=-1)


def load_adapters(directory: str | os.PathLike, params: Params) -> PyTree:
    """Unadapted parameters with all adapters of a directory on them, side by side: choose with `route(params, name)`.

    Args:
        directory: holds an adapter directory for each name, as PEFT's `save_pretrained` lays out a model with several; an
            adapter in `directory` itself is called "default".
        params: unadapted, per-layer or stacked.

    Raises:
        FileNotFoundError: when there is no adapter.
        ValueError: as in `load_adapter` and `stack_adapters`.
    """
    found = adapter_directories(directory)
    if not found:
        raise FileNotFoundError(
            f"There are no adapters in {os.fspath(directory)!r}: neither it nor a directory in it has an {CONFIG}."
        )
    return stack_adapters({name: load_adapter(path, params) for name, path in found.items()})


def base_model_of(directory: str | os.PathLike) -> str | None:
    """The base model that an adapter's config names.

    Raises:
        ValueError: when that is a hub model at a revision of its own (PEFT's `revision`): other weights than `load`'s.
    """
    found = open_adapter(directory)
    revision, name = found.fields.get(str(found.layout.revision)), found.base_model
    if revision not in (None, "main") and name and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"The adapter in {os.fspath(directory)!r} is of revision {revision!r} of {name!r}; jlora loads hub models at "
            f"their newest. Download it, `hf download {name} --revision {revision} --local-dir DIRECTORY`, and give that "
            "directory as --model."
        )
    return name


def update_tensors(layout: Layout, names: Iterable[str], kind: type[AdaptedWeight]) -> dict[str, dict[str, str]]:
    """Module path of the checkpoint -> trained child -> name of the tensor, among the names of a file of this layout.

    >>> from jlora import LoraWeight
    >>> update_tensors(layouts()[0], ["base_model.model.h.lora_A.weight", "base_model.model.ln_f.weight"], LoraWeight)
    {'h': {'lora_A': 'base_model.model.h.lora_A.weight'}}
    """
    children = layout.children(kind)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        end = next((end for end in children if name.endswith(end)), None)
        if end is not None:
            found.setdefault(layout.module(name.removesuffix(end)), {})[children[end]] = name
    return found
