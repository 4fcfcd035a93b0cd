"""Who writes: a base model and adapters of it, computed by jlora, or by llama.cpp where a GGUF file is to be served on a CPU."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax

import jlora
from jlora.data import decode_continuation
from jlora.generation import Past, for_decoding

MAX_NEW_TOKENS = 96
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


class Engine(Protocol):
    def tokens(self, name: str | None, prompt: list[int], seed: int) -> Iterator[int]:
        """Drawn after the prompt, by an adapter or, for None, by the base alone, up to the end of the turn."""
        ...


class Jlora:
    """By jlora: any model and adapter that it loads."""

    def __init__(self, source: str, adapters: Mapping[str, Path], *, dtype: str, quantize: str | None):
        model, base = jlora.load(source, dtype=dtype, quantize=quantize)
        trees = {name: jlora.load_adapter(place, base, model=model) for name, place in adapters.items()}
        # One tree with all of them: another choice compiles nothing.
        self._model, self._params = for_decoding(model, jlora.stack_adapters(trees) if trees else base, batch=1)
        self._adapted, self._pasts = bool(trees), dict[str | None, Past]()

    def tokens(self, name: str | None, prompt: list[int], seed: int) -> Iterator[int]:
        params = jlora.route(self._params, name) if self._adapted else self._params
        past = self._pasts.setdefault(name, Past())  # the next card's prompt begins as this one's
        key = jax.random.key(seed)
        return itertools.chain.from_iterable(
            jlora.stream(self._model, params, [prompt], max_new_tokens=MAX_NEW_TOKENS, key=key, past=past, **SAMPLING)
        )


class LlamaCpp:
    """By llama.cpp: a GGUF file and adapters as GGUF files (`jlora export --to gguf`)."""

    def __init__(self, source: str, adapters: Mapping[str, Path], *, context: int = 4096):
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise ImportError("--engine llama.cpp needs llama-cpp-python: pip install 'jlora[llama-cpp]'.") from error
        if not all(str(place).endswith(".gguf") for place in [source, *adapters.values()]):
            raise ValueError(
                "llama.cpp reads GGUF files: jlora export writes a model (--to gguf) and adapters (--to gguf-adapter) as such."
            )
        # The weights are mapped from the file, so that these share them.
        places = {None: None} | {name: str(place) for name, place in adapters.items()}
        self._models = {
            name: Llama(source, lora_path=place, n_ctx=context, verbose=False) for name, place in places.items()
        }

    def tokens(self, name: str | None, prompt: list[int], seed: int) -> Iterator[int]:
        model = self._models[name]
        model.set_seed(seed)
        drawn = model.generate(prompt, temp=SAMPLING["temperature"], top_p=SAMPLING["top_p"], top_k=0, min_p=0.0)
        return itertools.takewhile(lambda token: token != model.token_eos(), itertools.islice(drawn, MAX_NEW_TOKENS))


class Voices:
    """Base and adapters by name, in their own chat templates."""

    def __init__(self, engine: Engine, source: str, adapters: Mapping[str, Path]):
        self.names = ("base", *adapters)
        base = jlora.load_tokenizer(source)
        self._engine, self._tokenizers = engine, dict.fromkeys(self.names, base)
        # A run leaves its tokenizer, with the template that it trained on, beside its adapter.
        self._tokenizers |= {
            n: jlora.load_tokenizer(p) for n, p in adapters.items() if (p / "tokenizer.json").is_file()
        }

    def write(self, name: str, messages: list[dict[str, str]], begins: str, seed: int) -> Iterator[str]:
        """What the answer that `begins` goes on with: its text so far, token by token."""
        tokenizer = self._tokenizers[name]
        prompt = tokenizer(
            _as_text(tokenizer, messages) + begins, add_special_tokens=not tokenizer.chat_template
        ).input_ids
        ids = []
        for token in self._engine.tokens(None if name == "base" else name, prompt, seed):
            ids.append(token)
            yield decode_continuation(tokenizer, prompt, ids)


def _as_text(tokenizer, messages: list[dict[str, str]]) -> str:
    """A model without a chat template goes on with a text of the same turns."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "".join(f"{message['content']}\n" + "\n" * (message["role"] == "assistant") for message in messages)
