"""Several adapters of one base, as `--adapter A B` names them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jlora.files import base_model_of
from jlora.files.adapters import adapter_directories


def adapter_places(given: Sequence[str]) -> dict[str, Path]:
    """Name -> place of each adapter. One that lies in OUTPUT/adapter is called after OUTPUT, others after their directory or file;
    NAME=PLACE says what one is called.

    Raises:
        ValueError: when two have one name, or a name is given to several.
    """
    places: dict[str, Path] = {}
    for text in given:
        own, place = _named(text)
        found = adapter_directories(place) or {"default": Path(place)}
        if own is not None and len(found) > 1:
            raise ValueError(f"{text!r} gives one name to the adapters {', '.join(found)}. Name them one by one.")
        for name, path in found.items():
            name = own or (_name(path) if name == "default" else name)
            if name in places:
                raise ValueError(
                    f"Two adapters are called {name!r}: {str(places[name])!r} and {str(path)!r}. Give one another name, NAME=DIR."
                )
            places[name] = path
    return places


def _named(text: str) -> tuple[str | None, str]:
    """(name, place) of NAME=PLACE; a path may hold = too."""
    name, _, place = text.partition("=")
    is_name = bool(name and place) and not {"/", os.sep} & set(name) and not Path(text).exists()
    return (name, place) if is_name else (None, text)


def _name(path: Path) -> str:
    whole = path.expanduser().resolve()
    return whole.parent.name if whole.name == "adapter" else whole.stem if whole.is_file() else whole.name


def base_of(places: Mapping[str, Path]) -> str:
    """The name of the base that all adapters name.

    Raises:
        ValueError: when there is none, or they differ.
    """
    bases = {name: base_model_of(path) for name, path in places.items()}
    if not bases or None in bases.values():
        raise ValueError(
            "Give --model, or an --adapter whose adapter_config.json names its base model (a GGUF file names none)."
        )
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{name}: {base}" for name, base in bases.items())
        raise ValueError(
            f"The adapters name different base models ({listed}). Give the one they are to share with --model."
        )
    return str(next(iter(bases.values())))
