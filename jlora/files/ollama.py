"""Ollama: a Modelfile beside a GGUF file.

Reference: ollama, docs/modelfile.md and docs/template.md (templates are Go's text/template).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jlora._typing import PretrainedTokenizer
from jlora.files.vocabulary import Vocabulary
from jlora.models import ModelConfig
from jlora.storage.stops import stop_ids, token_ids

ROLES = ("system", "user", "assistant")
_S, _U, _A = ({"role": role, "content": f"<{role}>"} for role in ROLES)
_PROBES = ([_U], [_S, _U], [_U, _A, _U], [_S, _U, _A, _U, _A, _U])


def modelfile(gguf_name: str, tokenizer: PretrainedTokenizer, config: ModelConfig) -> str:
    """The text of a Modelfile for the GGUF file of that name in the same directory.

    FROM; TEMPLATE when the tokenizer's chat template can be said in Ollama's language (see `ChatTemplate`), otherwise
    Ollama looks for one that it knows; PARAMETER stop for each end-of-text token and the end of a turn.
    """
    lines = [f"FROM ./{gguf_name}"]
    chat = ChatTemplate.of(tokenizer, Vocabulary.of(tokenizer, config).add_bos)
    if chat is not None:
        lines.append(f'TEMPLATE """{chat.go()}"""')
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(tokenizer, config)]
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template that writes every message as its role's text before it, the content, and the text after it."""

    start: str
    """Before everything."""
    default_system: str
    """After `start`, when there is no system message."""
    turns: Mapping[str, tuple[str, str]]
    """Role -> (before, after)."""
    generation: str
    """After everything: what the model's answer begins with."""

    @classmethod
    def of(cls, tokenizer: PretrainedTokenizer, add_bos: bool) -> "ChatTemplate | None":
        """The tokenizer's chat template in this form; None when it has none, or one that does more.

        Found by rendering conversations, and kept only when it renders them all alike. With `add_bos` a bos token at the
        start is left out: the runtime puts it there.
        """
        template = getattr(tokenizer, "chat_template", None)
        # Text that changes from day to day is no fixed text.
        if not isinstance(template, str) or "strftime" in template:
            return None
        bos = (tokenizer.bos_token or "") if add_bos else ""

        def render(messages: Sequence[Mapping[str, str]], generation: bool = True) -> str:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
            return text.removeprefix(bos)

        try:
            expected = [render(probe) for probe in _PROBES]
            found = cls._from_renderings(render)
        except Exception:  # a template may raise anything on a conversation that it does not allow
            return None
        if found is None or [found.render(probe) for probe in _PROBES] != expected:
            return None
        texts = (found.start, found.default_system, found.generation, *sum(found.turns.values(), ()))
        cannot = any(mark in text for text in texts for mark in ("{{", '"""')) or found.go().startswith('"')
        return None if cannot or found.go().endswith('"') else found

    @classmethod
    def _from_renderings(cls, render) -> "ChatTemplate | None":
        first, second, third = render([_U], False), render([_U, _A], False), render([_U, _A, _U], False)
        with_system = render([_S, _U], False)
        assistant = second.removeprefix(first).split(_A["content"])
        user = third.removeprefix(second).split(_U["content"])
        if len(assistant) != 2 or len(user) != 2:
            return None
        turn = _U["content"].join(user)
        system = with_system.removesuffix(turn).split(_S["content"])
        if not first.endswith(turn) or not with_system.endswith(turn) or len(system) != 2:
            return None
        alone = first.removesuffix(turn)
        # What stands before the first message whether it is a system message or not; the rest introduces that message.
        shared = 0
        while shared < min(len(alone), len(system[0])) and alone[shared] == system[0][shared]:
            shared += 1
        shared = shared if alone == system[0][:shared] else 0
        return cls(
            start=alone[:shared],
            default_system=alone[shared:],
            turns={"system": (system[0][shared:], system[1]), "user": tuple(user), "assistant": tuple(assistant)},
            generation=render([_U], True).removeprefix(first),
        )

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as Ollama renders `go()`."""
        parts = [self.start, "" if any(m["role"] == "system" for m in messages) else self.default_system]
        for message in messages:
            before, after = self.turns[message["role"]]
            parts += [before, message["content"], after]
        return "".join([*parts, self.generation])

    def go(self) -> str:
        """As a Go template."""
        default = f"{{{{ if not .System }}}}{self.default_system}{{{{ end }}}}" if self.default_system else ""
        turns = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.turns.items()
        )
        return f"{self.start}{default}{{{{ range .Messages }}}}{{{{ {turns}{{{{ end }}}}{{{{ end }}}}{self.generation}"


def _stops(tokenizer: PretrainedTokenizer, config: ModelConfig) -> list[str]:
    """The texts of the tokens that end a generation, in the order of their ids' sources."""
    declared = token_ids(config.eos_token_id, where="the model's config")
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = stop_ids((*own, *declared), tokenizer, vocab_size=config.vocab_size)
    # Rows of the embedding beyond the tokenizer's tokens have no text.
    return [text for text in tokenizer.convert_ids_to_tokens(list(ids)) if text is not None]


def _quoted(text: str) -> str:
    """A value in a Modelfile, whose strings know no escapes."""
    mark = '"""' if '"' in text or "\n" in text else '"'
    if mark in text or text.endswith('"'):
        raise ValueError(f"The token {text!r} ends a generation, and an Ollama Modelfile cannot hold it. Rename it.")
    return f"{mark}{text}{mark}"
