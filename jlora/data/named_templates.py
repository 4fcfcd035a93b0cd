"""Chat templates by name, for tokenizers that have none: a row each, its text in `chat_templates/NAME.jinja`."""

from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from jlora._typing import PretrainedTokenizer
from jlora.storage.stops import own_tokens

_TEXTS = Path(__file__).parent / "chat_templates"


TemplateName = Literal["alpaca", "chat", "chatml", "llama3", "qwen2.5", "qwen3", "mistral", "gemma", "vicuna", "plain"]
"""What can be trained with."""


class NamedTemplate(NamedTuple):
    """A chat template.

    marks: what it sets apart turns with; each must be a token of the tokenizer's own, which text never encodes to.
    closes: whether an answer ends in the tokenizer's end of text.
    """

    marks: tuple[str, ...] = ()
    closes: bool = False


_CHATML = ("<|im_start|>", "<|im_end|>")

NAMED = {
    "chatml": NamedTemplate(_CHATML),
    "llama3": NamedTemplate(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen2.5": NamedTemplate(_CHATML),
    "qwen3": NamedTemplate(_CHATML),
    "mistral": NamedTemplate(("[INST]", "[/INST]"), closes=True),
    "gemma": NamedTemplate(("<start_of_turn>", "<end_of_turn>")),
    "vicuna": NamedTemplate(closes=True),
    "plain": NamedTemplate(closes=True),
    "alpaca": NamedTemplate(closes=True),
}
"""ChatML of OpenAI; Llama 3 (meta-llama/llama-models, without its tools); Qwen2.5, Qwen3 and Gemma 3 as in their checkpoints;
Mistral 7B Instruct v0.3 with the system prompt in the first turn; FastChat's vicuna_v1.1; the texts and nothing between them, as
TRL joins prompts and completions; Stanford Alpaca for several turns (training on its columns has `ALPACA_WITH_INPUT` too)."""
CHAT_TEMPLATES = tuple(name for name in NAMED if name != "alpaca")
"""Those that conversations are trained with by name."""


@lru_cache
def template_text(name: str) -> str:
    """The Jinja source of a named template."""
    return (_TEXTS / f"{name}.jinja").read_text()


def check_tokenizer(name: str, tokenizer: PretrainedTokenizer) -> None:
    """Refuses a tokenizer whose vocabulary has not what a named template is written with.

    Raises:
        ValueError: a mark that would be spelled in pieces of ordinary text, which stops no generation; no end of text.
    """
    row, own = NAMED[name], own_tokens(tokenizer)
    missing = [mark for mark in row.marks if mark not in own]
    without = [other for other, template in NAMED.items() if not template.marks]
    if missing:
        raise ValueError(
            f"the template {name!r} is written with tokens of its own; this tokenizer has no {', '.join(missing)}, and would spell "
            f"them in pieces of ordinary text, at which no generation ends. Use a tokenizer that has them, or a template without, "
            f"such as {', '.join(without)}."
        )
    if row.closes and tokenizer.eos_token is None:
        raise ValueError(
            f"the template {name!r} closes an answer with the tokenizer's end-of-text token, from which the model learns to stop; "
            f"this tokenizer has none. Set `tokenizer.eos_token`."
        )


def put_template(tokenizer: PretrainedTokenizer, name: str) -> str | None:
    """Makes a named template the tokenizer's own, for all that is done with it from now on.

    Returns:
        What is to be said where it had another; None where it had none or this one.
    Raises:
        ValueError: as `check_tokenizer`.
    """
    check_tokenizer(name, tokenizer)
    before, now = tokenizer.chat_template, template_text(name)
    tokenizer.chat_template = now  # pyright: ignore[reportAttributeAccessIssue]
    if before is None or before == now:
        return None
    return (
        f"the tokenizer has a chat template of its own; it is trained and saved with the template {name!r} instead "
        f"(--template chat would take its own)"
    )
