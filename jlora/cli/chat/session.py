"""A conversation and who answers in it."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jlora._numbers import check_seed
from jlora._typing import Json, JsonObject, PretrainedTokenizer
from jlora.cli.chat.voices import Voices
from jlora.data import Continued, prompt_ids
from jlora.data.prompts import check_text
from jlora.generation import Past, check_sampling, stream
from jlora.models import Model
from jlora.storage.stops import token_ids

SETTINGS: dict[str, type] = {"temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int}
"""What /set sets; none of it compiles anything."""


@dataclasses.dataclass
class Session:
    model: Model
    voices: Voices
    tokenizer: PretrainedTokenizer
    settings: JsonObject
    """A value for each of `SETTINGS`."""
    voice: str | None = None
    """The adapter that answers; None: the base."""
    system: str | None = None
    turns: list[JsonObject] = dataclasses.field(default_factory=list)
    """Of the user and the assistant, in turn."""
    answers: int = 0
    """Given so far with this seed: each draws its own numbers."""
    speed: float | None = None
    """Of the last answer, tokens a second from the first one on; None: it had no two."""
    count: int = 0
    """Tokens of the last answer."""
    cut: str | None = None
    """Why the last answer ended before the model ended it; None: it did not."""

    def __post_init__(self):
        self.choose(self.voice)

    def choose(self, voice: str | None) -> None:
        """Who answers from now on.

        Raises:
            ValueError: when there is no such adapter.
        """
        self._params, self.voice, self._past = self.voices.params(voice), voice, Past()

    def set(self, name: str, text: str) -> None:
        """
        Raises:
            ValueError: for a setting that there is none of, or a value out of its range.
        """
        if name not in SETTINGS:
            raise ValueError(f"There is no setting {name!r}; there are {', '.join(SETTINGS)}.")
        try:
            value = SETTINGS[name](text)
        except ValueError:
            kind = "an integer" if SETTINGS[name] is int else "a number"
            raise ValueError(f"`{name}` must be {kind}; got {text!r}.") from None
        changed = {**self.settings, name: value}
        check_seed(changed["seed"])
        check_sampling(**{key: changed[key] for key in changed if key != "seed"})
        self.settings = changed
        if name == "seed":
            self.answers = 0

    @property
    def messages(self) -> list[JsonObject]:
        """The conversation, as `jlora finetune` reads it."""
        return [*([_turn("system", self.system)] if self.system else []), *self.turns]

    def answer(self, text: str, *, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to a turn of the user, as it comes; both are in the history then, as far as was answered.

        Args:
            stopped: asked after each token whether to go no further.

        Raises:
            ValueError: for a turn that cannot be rendered or for which there is no room; the history stays as it was.
        """
        record = {"messages": [*self.messages, _turn("user", check_text(text, "this turn"))]}
        ids = prompt_ids(record, self.tokenizer, template="chat")
        room = self.model.config.max_length - len(ids)
        if room < 1:
            raise ValueError(
                f"The conversation has {len(ids)} tokens with this turn, and the model {self.model.config.max_length} positions. "
                "/undo takes the last turn back, /reset begins anew, /save FILE keeps what was said; or say it in fewer words."
            )
        settings = {name: value for name, value in self.settings.items() if name != "seed"}
        limit = settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        key = jax.random.fold_in(jax.random.key(self.settings["seed"]), self.answers)
        tokens = stream(self.model, self._params, [ids], key=key, past=self._past, **settings)
        return self._told(tokens, Continued(self.tokenizer, ids), record["messages"][-1], limit, stopped)

    def _told(self, tokens, continued: Continued, asked: JsonObject, limit: int, stopped) -> Iterator[str]:
        parts, first, last = [], 0.0, 0
        self.count, self.cut = 0, None
        try:
            for (token,) in tokens:
                first, last, self.count = first or time.monotonic(), token, self.count + 1
                parts.append(continued.add(token))
                yield parts[-1]
                if stopped():
                    self.cut = "stopped"
                    break
            else:
                if last not in token_ids(self.model.config.eos_token_id, where="the model's config"):
                    self.cut = _cut(limit, self.settings["max_new_tokens"])
            parts.append(continued.rest())
            yield parts[-1]
        finally:
            tokens.close()
            seconds = time.monotonic() - first
            self.speed = (self.count - 1) / seconds if self.count > 1 and seconds > 0 else None
            if self.count:
                self.answers += 1
                self.turns += [asked, _turn("assistant", "".join(parts))]

    def undo(self) -> bool:
        """Takes the last turn and its answer back; whether there was one."""
        there = bool(self.turns)
        del self.turns[-2:]
        return there

    def save(self, path: Path) -> None:
        """Adds the conversation to a file as a line that `jlora finetune` reads.

        Raises:
            ValueError: when nothing was said yet.
        """
        if not self.turns:
            raise ValueError("There is nothing to save yet.")
        before = path.read_bytes()[-1:] if path.exists() else b""
        with path.open("a", encoding="utf-8") as file:
            begin = "" if before in (b"", b"\n") else "\n"
            file.write(begin + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")


def _turn(role: str, content: Json) -> JsonObject:
    return {"role": role, "content": content}


def _cut(limit: int, asked: int) -> str:
    if limit < asked:
        return "cut here: the model has no more positions. /undo takes this turn back, /reset begins anew"
    return f"cut here after {limit} tokens; /set max_new_tokens {2 * limit} lets the next answers be longer"
