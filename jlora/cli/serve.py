"""`jlora serve`."""

import dataclasses
import os
from pathlib import Path

import jax

from jlora._numbers import MAX_COUNT
from jlora._terminal import console, say
from jlora._typing import PretrainedTokenizer
from jlora.cli.adapters import adapter_places
from jlora.cli.as_trained import note
from jlora.cli.base import tokenizer_of
from jlora.cli.chat.options import Speakers
from jlora.cli.chat.voices import load_voices, run_of
from jlora.cli.prompts import Drawing, sampling
from jlora.data import CHAT_TEMPLATES
from jlora.files import find, load_tokenizer
from jlora.files.hf import add_stops
from jlora.files.run_settings import RunSettings
from jlora.generation import Sampling
from jlora.models import Model
from jlora.serve.engine import Engine
from jlora.serve.voices import ALPACA, Catalogue, Voice
from jlora.storage.hub_id import is_hub_id
from jlora.storage.stops import token_ids

KEY_VARIABLE = "JLORA_API_KEY"
_MAX_LENGTH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Speakers):
    """Serve a model and its adapters through OpenAI's interface, each under its own name, and a page to chat on."""

    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs an API key."""
    port: int = 8000
    """0: a free one."""
    api_key: str | None = None
    """What clients must send; default: the variable JLORA_API_KEY, which other users of the machine do not see."""
    slots: int | None = None
    """Answers that are computed at a time; default: 8, on a CPU the 2 that the page asks for. Each step takes the time of so many,
    also for one."""
    max_length: int | None = None
    """Tokens of a prompt and its answer together; default: 1024, or the model's limit if that is less. The cache of keys and values
    holds --slots times as many."""
    queue: int = 64
    """Answers that may wait for a slot; a request beyond them gets status 429."""
    timeout: float = 600.0
    """Seconds for a request, with its time in the queue."""
    grace: float = 30.0
    """Seconds that answers may still take after Ctrl-C or SIGTERM; a second one ends them at once."""


_SLOTS, _SLOTS_ON_CPU = 8, 2
_LEAST = {"slots": 1, "queue": 0, "timeout": 1, "grace": 0, "max_length": 2, "port": 0}


def run(options: Serve) -> None:
    for name, least in _LEAST.items():
        if (given := getattr(options, name)) is not None and not least <= given <= MAX_COUNT:
            raise ValueError(f"`{name}` must be at least {least}; got {given}.")
    try:
        from jlora.serve.app import make_app
        from jlora.serve.desk import Settings
        from jlora.serve.guard import is_loopback
        from jlora.serve.server import listen, serve, url_of
    except ModuleNotFoundError as error:
        raise ImportError(f"`jlora serve` needs the package {error.name}: pip install 'jlora[serve]'.") from error

    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_loopback(options.host):
        raise ValueError(
            f"Other machines reach a server at {options.host!r}, so it needs an API key: set {KEY_VARIABLE}, or give --api-key. "
            "(With --host 127.0.0.1 only this machine reaches it.)"
        )
    with listen(options.host, options.port) as bound:  # before a model is loaded for nothing
        slots = options.slots or (_SLOTS_ON_CPU if jax.default_backend() == "cpu" else _SLOTS)
        model, loaded, tokenizer, base = load_voices(options, batch=slots)
        if loaded.routed is None and loaded.names:
            raise ValueError(
                f"{loaded.names[0]!r} is more than a plain low-rank update, and rows of base and adapters are computed side by "
                "side. Merge it and serve the result: jlora merge --adapter … --output MERGED, jlora serve --model MERGED."
            )
        length = _length(options.max_length, model)
        names = voices_of(options, model, tokenizer, base)
        catalogue = Catalogue(by_name=names, max_length=length, vocab_size=model.config.vocab_size)
        settings = Settings(api_key=key, timeout=options.timeout, sampling=Sampling(**sampling(Drawing(), base)))
        params = loaded.trees[None] if loaded.routed is None else loaded.routed
        engine = Engine(model, params, slots=slots, max_length=length, queue=options.queue)
        aside, url = console(stderr=True), url_of(bound)

        def ready() -> None:
            say(aside, f"{', '.join(names)} at {url}/v1; a page to chat on is at {url}/")

        say(aside, ("compiling …", "dim"))
        serve(make_app(engine, catalogue, settings), engine, bound, grace=options.grace, ready=ready)
        say(aside, ("stopped", "dim"))


def _length(given: int | None, model: Model) -> int:
    most = model.config.max_length
    if given is not None and given > most:
        raise ValueError(f"The model has {most} positions; got --max-length {given}.")
    return given or min(_MAX_LENGTH, most)


def voices_of(options: Speakers, model: Model, tokenizer: PretrainedTokenizer, base: str) -> dict[str, Voice]:
    """Every model name, the base's first, with its own tokenizer, end of text and template.

    Args:
        tokenizer: the base's, or that of the one adapter there is.
    """
    places = adapter_places(options.adapter)
    one = len(places) == 1
    names = {
        _base_name(base): _voice(_base_name(base), -1, model, load_tokenizer(find(base)) if one else tokenizer, None)
    }
    for number, (name, place) in enumerate(places.items()):
        if name in names:
            raise ValueError(
                f"The adapter {str(place)!r} is called {name!r}, as the base is. Give it another name: NAME=DIR."
            )
        own = tokenizer if one else tokenizer_of(find(base), str(place), model)[0]
        names[name] = _voice(name, number, model, own, run_of(place))
    return names


def _voice(name: str, number: int, model: Model, tokenizer: PretrainedTokenizer, run: RunSettings | None) -> Voice:
    template = "chat" if tokenizer.chat_template else None
    if run is not None and run.template in (ALPACA, *CHAT_TEMPLATES):
        template = run.template
        note(f"as in the run that trained {name!r}: template {template}")
    if run is not None and run.system is not None:
        note(f"as in the run that trained {name!r}, where a chat has none: system {run.system}")
    stops = token_ids(add_stops(model, tokenizer).config.eos_token_id, where="the model's config")
    return Voice(
        name=name, adapter=number, tokenizer=tokenizer, stops=frozenset(stops), template=template,
        system=None if run is None else run.system,
    )  # fmt: skip


def _base_name(base: str) -> str:
    """A hub model's id; of a directory or file its name."""
    if is_hub_id(base):
        return base
    path = Path(base).expanduser().resolve()
    return path.stem if path.is_file() else path.name
