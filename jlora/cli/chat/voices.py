"""Who may answer in a chat: the base model and adapters of it, side by side."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jlora._typing import Params, PretrainedTokenizer, PyTree
from jlora.cli.adapters import adapter_places, base_of
from jlora.cli.as_trained import as_trained, note, note_other_base, settings_of
from jlora.cli.base import Weights, load_weights, with_room
from jlora.cli.chat.options import Chat, Speakers
from jlora.data import CHAT_TEMPLATES
from jlora.files import load_adapter
from jlora.files.run_settings import RunSettings
from jlora.generation import for_decoding
from jlora.lora import remove_lora, route, stack_adapters
from jlora.models import Model
from jlora.tree.modules import nearest


@dataclasses.dataclass(frozen=True)
class Voices:
    """The parameters to decode with, by name; None is the base."""

    names: tuple[str, ...]
    routed: PyTree | None
    """Base and adapters in one tree: another choice compiles nothing."""
    trees: Mapping[str | None, PyTree]
    """Where there is no such tree: one of each."""

    def params(self, name: str | None) -> PyTree:
        """
        Raises:
            ValueError: for a name that there is none of.
        """
        if name is not None and name not in self.names:
            there = (
                f"the adapters are {', '.join(map(repr, self.names))}" if self.names else "none was given (--adapter)"
            )
            raise ValueError(f"There is no adapter {name!r}; {there}.{nearest(name, self.names)}")
        return self.trees[name] if self.routed is None else route(self.routed, name)

    @classmethod
    def of(cls, base: Params, adapted: Mapping[str, PyTree]) -> "Voices":
        names = tuple(adapted)
        if not adapted:
            return cls((), None, {None: base})
        try:
            return cls(names, stack_adapters(adapted), {})
        except ValueError:  # more than a low-rank update
            if len(adapted) > 1:
                raise
        note(
            f"{names[0]!r} is more than a plain low-rank update; the first answer after each of /base and /adapter compiles anew"
        )
        return cls(names, None, {None: base, **adapted})

    def for_decoding(self, model: Model, *, batch: int) -> tuple[Model, "Voices"]:
        """With the parameters in the form for decoding."""
        if self.routed is not None:
            fast, routed = for_decoding(model, self.routed, batch=batch)
            return fast, dataclasses.replace(self, routed=routed)
        made = {name: for_decoding(model, tree, batch=batch) for name, tree in self.trees.items()}
        return next(iter(made.values()))[0], dataclasses.replace(self, trees={n: tree for n, (_, tree) in made.items()})


def load_voices(options: Speakers, *, batch: int = 1) -> tuple[Model, Voices, PretrainedTokenizer, str]:
    """(model, who may answer, tokenizer, name of the base), to answer so many at a time."""
    places = adapter_places(options.adapter)
    weights = Weights(model=options.model or base_of(places), quantize=options.quantize, dtype=options.dtype)
    weights = dataclasses.replace(weights, quantize=_quantize(weights, places))
    if len(places) == 1:  # whose tokenizer may differ
        ((name, path),) = places.items()
        model, tree, tokenizer, _ = load_weights(dataclasses.replace(weights, adapter=str(path)))
        voices = Voices.of(remove_lora(tree), {name: tree})
    else:
        model, base, tokenizer, _ = load_weights(weights)
        model, base = with_room(model, base, places.values())
        note_other_base(places, str(weights.model))
        voices = Voices.of(base, {name: load_adapter(path, base, model=model) for name, path in places.items()})
    return *voices.for_decoding(model, batch=batch), tokenizer, str(weights.model)


def _quantize(weights: Weights, places: Mapping[str, Path]):
    """How the base is packed: as was said, or as in the runs of the adapters."""
    each = [dataclasses.replace(weights, adapter=str(path)) for path in places.values()] or [weights]
    found = {as_trained(one, "quantize")[0].quantize for one in each}
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(f"The adapters were trained on bases packed in different ways ({listed}). Give --quantize.")
    return found.pop()


def trained_system(options: Chat) -> str | None:
    """The system prompt that the records of the adapters' runs were given, if all had the same."""
    runs = [run for path in adapter_places(options.adapter).values() for run in settings_of(str(path)).values()]
    systems = {run.system for run in runs}
    system = systems.pop() if len(systems) == 1 else None
    if system is not None:
        note(f"as in the run that trained this: system {system}")
    return system


def note_templates(places: Mapping[str, Path]) -> None:
    """Says of which adapters the answers will be in another template than they were trained in."""
    for name, path in places.items():
        run = run_of(path)
        if run is not None and run.template not in ("chat", *CHAT_TEMPLATES):
            note(
                f"{name!r} was trained on {run.template or 'raw text'}, not on chats; here it answers in the chat template"
            )


def run_of(place: Path) -> RunSettings | None:
    """The settings of the run that made an adapter, where it has them."""
    settings = settings_of(str(place))
    return settings.get("default") or next(iter(settings.values()), None)
