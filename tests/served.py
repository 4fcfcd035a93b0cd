"""A server of a tiny model in a thread of the tests' process, as `jlora serve` makes it."""

import contextlib
import threading
import time

import jax
import numpy as np
import tiny

import jlora
from jlora.cli.chat.options import Speakers
from jlora.cli.chat.voices import load_voices
from jlora.cli.serve import voices_of
from jlora.data import decode_continuation
from jlora.generation import Sampling
from jlora.serve.app import make_app
from jlora.serve.desk import Settings
from jlora.serve.engine import Engine
from jlora.serve.server import Server, listen, url_of
from jlora.serve.voices import Catalogue

ADAPTERS = ("gull", "tide", "star", "salt")


def write_model(directory, *, positions=256):
    """(a Llama with a chat template, a directory with four adapters of it that make it say something else)."""
    base = tiny.write_checkpoint(
        directory / "llama", tiny.LLAMA | {"max_position_embeddings": positions}, chat=tiny.CHATML
    )
    _, params = jlora.load(base, dtype=np.float32)
    for seed, name in enumerate(ADAPTERS, 1):
        config = jlora.LoraConfig(rank=2, targets=["q_proj", "down_proj"])
        adapter, frozen = jlora.split(jlora.add_lora(params, config, key=jax.random.key(seed)))
        wave = jax.tree.map(lambda x, s=seed: 0.4 * np.sin(1 + s * np.arange(x.size).reshape(x.shape)), adapter)
        wave = jax.tree.map(np.float32, wave)
        jlora.save_adapter(directory / "adapters" / name, jlora.combine(wave, frozen), config=config, base_model=base)
    return base, str(directory / "adapters")


SLOTS = 4


class Loaded:
    """A base and its adapters, as the command loads them."""

    def __init__(self, base, adapters):
        options = Speakers(model=base, adapter=(adapters,))
        self.model, voices, self.tokenizer, name = load_voices(options, batch=SLOTS)
        self.params, config = voices.routed, self.model.config
        self.catalogue = Catalogue(
            by_name=voices_of(options, self.model, self.tokenizer, name),
            max_length=config.max_length,
            vocab_size=config.vocab_size,
        )

    def alone(self, voice, prompt, **options):
        """The text of a greedy answer by `generate`."""
        routed = jlora.route(self.params, np.array([self.catalogue.named(voice).adapter], np.int32))
        (ids,) = jlora.generate(self.model, routed, [prompt], temperature=0, **options)
        return decode_continuation(self.tokenizer, prompt, ids)


class Served:
    """A running server."""

    def __init__(self, loaded, *, queue=16, api_key=None, timeout=300.0, grace=0.0):
        length = loaded.catalogue.max_length
        self.engine = Engine(loaded.model, loaded.params, slots=SLOTS, max_length=length, queue=queue)
        self.settings = Settings(
            api_key=api_key, timeout=timeout, sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0)
        )  # fmt: skip
        self.app = make_app(self.engine, loaded.catalogue, self.settings)
        self.socket = listen("127.0.0.1", 0)
        self.url = url_of(self.socket)
        self._up = threading.Event()
        self.server = Server(self.app, self.engine, grace=grace, ready=self._up.set)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def start(self):
        self.engine.start()
        self._thread.start()
        assert self._up.wait(60)

    def stop(self):
        self.server.should_exit = True
        self._thread.join(60)
        self.engine.stop()
        assert not self._thread.is_alive()

    def until(self, condition):
        """Waits for what is to come soon."""
        for _ in range(6000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("it did not come")


@contextlib.contextmanager
def serving(loaded, **options):
    made = Served(loaded, **options)
    made.start()
    try:
        yield made
    finally:
        made.stop()
