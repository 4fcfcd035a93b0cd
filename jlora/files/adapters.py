"""Reading adapter directories, whatever their layout."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jlora._typing import Params
from jlora.files.mlx import read_mlx_adapter
from jlora.files.peft import PREFIX, read_peft_adapter
from jlora.lora import AdaptedWeight, stack_adapters
from jlora.storage.adapters import CONFIG, MLX, PEFT, AdapterDirectory, Layout, adapter_directories, open_adapter
from jlora.storage.mlx import SUFFIXES

_READERS: Mapping[Layout, Callable[[AdapterDirectory, Params], dict[str, Any]]] = {
    PEFT: read_peft_adapter,
    MLX: read_mlx_adapter,
}


def load_adapter(directory: str | os.PathLike, params: Params) -> dict[str, Any]:
    """Unadapted parameters with the adapter of a directory on them, PEFT's or mlx-lm's.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors` (written by `save_adapter` or by PEFT) or
            `adapters.safetensors` (by `save_mlx_adapter` or by mlx-lm). Which of the two, its config says.
        params: unadapted, per-layer or stacked.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for features that are not represented, and for missing, unexpected or mis-shaped tensors, all in
            one error: an adapter that loads in part would silently give other outputs.
    """
    found = open_adapter(directory)
    return _READERS[found.layout](found, params)


def load_adapters(directory: str | os.PathLike, params: Params) -> Any:
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
    revision, name = found.fields.get("revision"), found.base_model
    if found.layout == PEFT and revision not in (None, "main") and name and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"The adapter in {os.fspath(directory)!r} is of revision {revision!r} of {name!r}; jlora loads hub models at "
            f"their newest. Download it, `hf download {name} --revision {revision} --local-dir DIRECTORY`, and give that "
            "directory as --model."
        )
    return name


def update_tensors(names: Iterable[str], kind: type[AdaptedWeight]) -> dict[str, dict[str, str]]:
    """Module path -> trained child -> name of the tensor, of a PEFT or an mlx-lm adapter of this kind.

    >>> from jlora import LoraWeight
    >>> update_tensors(["base_model.model.h.lora_A.weight", "lm_head.lora_b", "ln_f.weight"], LoraWeight)
    {'h': {'lora_A': 'base_model.model.h.lora_A.weight'}, 'lm_head': {'lora_B': 'lm_head.lora_b'}}
    """
    suffixes = {f".{suffix}": child for child, suffix in SUFFIXES.items()} | kind.peft_suffixes()
    found: dict[str, dict[str, str]] = {}
    for name in names:
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is not None:
            module = name.removeprefix(PREFIX).removesuffix(suffix)
            found.setdefault(module, {})[suffixes[suffix]] = name
    return found
