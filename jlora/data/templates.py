"""Which template makes a record text: Alpaca's, the tokenizer's chat template, or one by name."""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from jlora._typing import Json, PretrainedTokenizer
from jlora.data.chat import CHAT_DATE as CHAT_DATE
from jlora.data.chat import ChatTemplate
from jlora.data.encoding import Piece, encode_pieces
from jlora.data.named_templates import CHAT_TEMPLATES
from jlora.data.rendering import Rendering, Rewritten, Supervise
from jlora.data.tokens import added_bos

# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT: nothing follows "### Response:".
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def render(
    record: Mapping[str, Json], tokenizer: PretrainedTokenizer, *, template: str, supervise: Supervise = "assistant"
) -> list[Piece]:
    """The text of a record in pieces, each of them supervised or not; joined they are the whole text.

    A record of raw text is that text, all of it supervised, closed by one end-of-text token if the tokenizer has one. Else:

    `alpaca`: the Stanford Alpaca prompt with or without input, then the response closed by one end-of-text token.
    `chat`: the tokenizer's chat template, given all that the record holds (`tools`, reasoning, tool calls …). Each turn
    of the assistant is supervised, unless it says otherwise (`train`, `weight`), through its end-of-turn token; if the
    template closes the last turn with no special token, the end-of-text token is put there. Where a turn begins and ends
    is found by rendering the conversation up to it; no mark in the template is needed, but each rendering must begin
    with the one before. A template that asks for the date gets CHAT_DATE.
    A name of `NAMED`: the same with that chat template.

    Args:
        record: as from `read_records`.
        tokenizer: a transformers tokenizer.
        template: "alpaca", "chat" or a name of `NAMED`.
        supervise: "assistant" is each answer, "response" those behind the last turn of the user, "last" the last one, "all" the
            whole text. Turns that say they are not to be trained are not, whichever it is.
    Raises:
        ValueError: an unknown template, a record or tokenizer that does not go with it, text of the record that the
            template leaves out, or a chat template whose renderings are not prefixes of each other.
    """
    return _render(_template(template), record, tokenizer, supervise).pieces


def renderings(
    record: Mapping[str, Json], tokenizer: PretrainedTokenizer, *, template: str, supervise: Supervise = "assistant"
) -> list[Rendering]:
    """`render`, with what the text leaves out; and a row for each answer where a chat template rewrites earlier turns.

    Such templates (Qwen3's and DeepSeek-R1's drop the reasoning of earlier turns) have no one text in which every answer stands
    behind what the model will be given. So each answer ends a row of its own, behind what the template makes of the turns before.

    Raises:
        ValueError: as `render`; over renderings only where an answer is not behind its own prompt either.
    """
    chosen = _template(template)
    try:
        return [_render(chosen, record, tokenizer, supervise)]
    except Rewritten:
        rows = list(chosen.apart(record, tokenizer, supervise))
        if not rows:
            raise
        return rows


def prompt_ids(record: Mapping[str, Json], tokenizer: PretrainedTokenizer, *, template: str) -> list[int]:
    """The tokens to generate a response from: exactly those in front of the (last) response in training.

    Args:
        record: as from `read_records`; its response (the last turn, if the assistant's) is not looked at and may be
            missing.
        tokenizer, template: as in `render`.
    Raises:
        ValueError: as `render`.
    """
    pieces = _template(template).prompt(record, tokenizer).pieces
    return next(encode_pieces(tokenizer, [pieces], bos=added_bos(tokenizer))).ids


@runtime_checkable
class _Template(Protocol):
    def render(self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise) -> Rendering: ...

    def apart(
        self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise
    ) -> Iterator[Rendering]: ...

    def prompt(self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering: ...


class _Alpaca:
    """The Stanford Alpaca prompt, for its own columns."""

    def prompt(self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering:
        if "instruction" not in record:
            raise ValueError(
                f"the alpaca template needs the columns `instruction` and `output`; got {', '.join(map(repr, record))}. "
                f"Use the template `chat` for conversations."
            )
        placeless = [name for name in record if name not in ("instruction", "input", "output")]
        if placeless:
            raise ValueError(
                f"the alpaca template has places for `instruction`, `input` and `output` only; got "
                f"{', '.join(map(repr, placeless))} too. Use the template `chat`, or remove it."
            )
        form = ALPACA_WITH_INPUT if record.get("input") else ALPACA_WITHOUT_INPUT
        return Rendering([(form.format(instruction=record["instruction"], input=record.get("input")), False)])

    def render(self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise) -> Rendering:
        ((prompt, _),), eos = self.prompt(record, tokenizer).pieces, tokenizer.eos_token
        if "output" not in record:
            raise ValueError(f"training needs the column `output`; got {', '.join(map(repr, record))}. Add the column.")
        if eos is None:
            raise ValueError(
                "the alpaca template closes a response with the tokenizer's end-of-text token, from which the model learns "
                "to stop; this tokenizer has none. Set `tokenizer.eos_token`."
            )
        return Rendering([(prompt, supervise == "all"), (record["output"].removesuffix(eos) + eos, True)])

    def apart(
        self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise
    ) -> Iterator[Rendering]:
        yield from ()  # its prompt does not depend on the response


TEMPLATES: Mapping[str, _Template] = {
    "alpaca": _Alpaca(),
    "chat": ChatTemplate(),
    **{name: ChatTemplate(name) for name in CHAT_TEMPLATES},
}


def _template(name: str) -> _Template:
    if name not in TEMPLATES:
        raise ValueError(f"`template` must be one of {', '.join(TEMPLATES)}; got {name!r}. Name one of these.")
    return TEMPLATES[name]


def _render(
    template: _Template, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise
) -> Rendering:
    if "text" not in record:
        return template.render(record, tokenizer, supervise)
    eos = tokenizer.eos_token or ""
    return Rendering([(record["text"].removesuffix(eos) + eos if eos else record["text"], True)])
