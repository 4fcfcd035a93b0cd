"""Flags that are left out of a command on a run's adapter: what they were in the run, and a line that says so."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jlora._terminal import console, say
from jlora._typing import Json, JsonObject
from jlora.cli.adapters import adapter_places
from jlora.files import find
from jlora.files.adapters import adapter_directories, open_adapter
from jlora.files.run_settings import FILE, RunSettings
from jlora.storage.checkpoint_files import base_fingerprint, is_checkpoint


@runtime_checkable
class _OfAModel(Protocol):
    """Options of a command: a dataclass with these fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def adapter(self) -> str | Sequence[str] | None: ...
    @property
    def model(self) -> str | None: ...


Options = TypeVar("Options", bound=_OfAModel)

_OF_THE_DATA = ("seed", "eval_fraction", "format", "columns", "data_weights", "data_temperature", "max_examples")
"""Settings that say nothing of other data."""
_OF_THE_SPLIT = ("seed", "eval_fraction", "eval_data", "max_examples")
"""Settings with which other records are held out."""
_NONE = {"template": "none", "quantize": "none", "supervise": "assistant"}
"""What a flag calls the null of a setting."""


def note(text: str) -> None:
    """A line for people, beside the output for programs."""
    say(console(stderr=True), f"note: {text}")


def settings_of(adapter: str | Sequence[str] | None, model: str | None = None) -> dict[str, RunSettings]:
    """Name -> settings of the run, of each adapter in a directory, or of several, that has them; without an adapter, of a merged
    checkpoint."""
    if not adapter:
        found = {} if model is None else {"": find(model)}
    elif isinstance(adapter, str):
        found = adapter_directories(adapter) or {"": Path(adapter)}
    else:
        found = adapter_places(adapter)
    read = {name: RunSettings.read(path) for name, path in found.items()}
    return {name: settings for name, settings in read.items() if settings is not None}


def as_trained(options: Options, *names: str) -> tuple[Options, RunSettings | None]:
    """The options with those of `names` that are None as in the run, and the run's settings; both are said.

    Args:
        options: with `adapter` and `model`, perhaps with `data`.
        names: fields that options and settings share.

    Raises:
        ValueError: when the adapters of a directory were trained with different settings, and a flag is to choose.
    """
    settings = settings_of(options.adapter, options.model)
    if not settings:
        return options, None
    _refuse_differing(options, settings, names)
    run = next(iter(settings.values()))
    data = getattr(options, "data", None) or (run.data if "data" in names else None)
    of_the_run = _is_same(data, run.data)
    known = dict.fromkeys(_OF_THE_DATA, of_the_run) | {"eval_data": of_the_run or _is_same(data, run.eval_data)}
    taken: JsonObject = {}
    other: dict[str, tuple[Json, Json]] = {}
    for name in (name for name in names if known.get(name, True)):
        given, was = getattr(options, name), getattr(run, name)
        if given is None:
            taken[name] = was
        elif name != "data" and given != (was or _NONE.get(name)):
            other[name] = given, was or _NONE.get(name)
    said = {name: value for name, value in taken.items() if value is not None}
    if said:
        note(f"as in the run that trained this ({FILE}): {_listed(said)}")
    if other:
        note(_differs(other, measured=data is not None, split=any(name in _OF_THE_SPLIT for name in other)))
    return dataclasses.replace(options, **taken), run


def merged_settings(run: RunSettings) -> RunSettings:
    """Of the checkpoint that an adapter was merged into, whose weights are dense."""
    return dataclasses.replace(run, quantize=None, base=None)


def note_other_base(adapters: Mapping[str, Path], model: str) -> None:
    """A line for each of the adapters, by name, that the model is not known to be the base of."""
    for name, path in adapters.items():
        if (said := _other_base(path, model)) is not None:
            note(f"the adapter{f' {name!r}' if len(adapters) > 1 else ''} {said}")


def _other_base(adapter: Path, model: str) -> str | None:
    """The end of a sentence about the adapter; None: the base is its own, or it names none."""
    named, settings, directory = open_adapter(adapter).base_model, RunSettings.read(adapter), find(model)
    trained_on = settings and settings.base
    if trained_on is None and named and named != model and is_checkpoint(Path(named).expanduser()):
        trained_on = base_fingerprint(Path(named).expanduser())
    if trained_on is not None:
        if trained_on == base_fingerprint(directory):
            return None
        if named == model:
            return f"was trained on {named!r} as it was then; its config.json or its weights have changed since"
        return f"was trained on {named!r}, and {model!r} has another config.json or other weights"
    if not named or named == model:
        return None
    return f"says that it was trained on {named!r}, and nothing says that {model!r} is the same"


def _refuse_differing(options: _OfAModel, settings: Mapping[str, RunSettings], names: tuple[str, ...]) -> None:
    for name in names:
        values = {named: getattr(run, name) for named, run in settings.items()}
        if getattr(options, name) is None and len(set(values.values())) > 1:
            listed = ", ".join(f"{named}: {value}" for named, value in values.items())
            raise ValueError(
                f"The adapters in {_quoted(options.adapter)} were trained with different settings of `{name}` ({listed}). Give the "
                f"one to use, --{name.replace('_', '-')}, or one of the adapters."
            )


def _quoted(adapter: str | Sequence[str] | None) -> str:
    return repr(adapter) if isinstance(adapter, str) else " and ".join(map(repr, adapter or ()))


def _listed(settings: Mapping[str, Json]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _differs(other: Mapping[str, tuple[Json, Json]], *, measured: bool, split: bool) -> str:
    listed = ", ".join(f"{name} {given} (it was {was})" for name, (given, was) in other.items())
    means = "; the figures do not compare with the run's" if measured else ""
    trained_on = ", and records of this validation split were trained on" if measured and split else ""
    return f"other than in the run that trained this: {listed}{means}{trained_on}"


def _is_same(given: str | Sequence[str] | None, was: str | Sequence[str] | None) -> bool:
    """Whether a data set is the run's, which may have moved since, or is not told."""
    if given is None or was is None:
        return given is not None
    if not (isinstance(given, str) and isinstance(was, str)):
        several = not isinstance(given, str) and not isinstance(was, str) and len(given) == len(was)
        return several and all(map(_is_same, given, was))
    moved = not Path(was).exists() and Path(given).name == Path(was).name
    return given == was or Path(given).resolve() == Path(was).resolve() or moved
