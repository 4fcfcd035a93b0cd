"""Several adapters of one base, as `--adapter A B` names them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jlora.files import base_model_of
from jlora.files.adapters import adapter_directories


def adapter_places(given: Sequence[str]) -> dict[str, Path]:
    """Name -> place of each adapter. One that lies in OUTPUT/adapter is called after OUTPUT, others after their directory or file.

    Raises:
        ValueError: when two have one name.
    """
    places: dict[str, Path] = {}
    for text in given:
        found = adapter_directories(text) or {"default": Path(text)}
        for name, path in found.items():
            name = _name(path) if name == "default" else name
            if name in places:
                raise ValueError(
                    f"Two adapters are called {name!r}: {str(places[name])!r} and {str(path)!r}. Rename one of the directories."
                )
            places[name] = path
    return places


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
