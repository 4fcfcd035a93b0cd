"""A record as text: what the model is given, and what it is to say."""

from collections.abc import Callable, Mapping
from datetime import date
from typing import NamedTuple

from jlora._typing import Json, PretrainedTokenizer
from jlora.data.conversations import Conversation, Message, conversation_of, left_out_of, turn_content
from jlora.data.encoding import Piece, encode_pieces
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

# What chat templates are told when they ask for today's date, so that a run started tomorrow has the same tokens. The
# day is the one that Llama 3's templates fall back to.
CHAT_DATE = date(2024, 7, 26)


class Rendering(NamedTuple):
    """A record as text.

    pieces: the text, each piece supervised or not; joined they are the whole.
    left_out: what the record says and the text does not, by name, once each.
    """

    pieces: list[Piece]
    left_out: tuple[str, ...] = ()


def render(record: Mapping[str, Json], tokenizer: PretrainedTokenizer, *, template: str) -> list[Piece]:
    """The text of a record in pieces, each of them supervised or not; joined they are the whole text.

    `alpaca`: the Stanford Alpaca prompt with or without input, then the response closed by one end-of-text token.
    `chat`: the tokenizer's chat template, given all that the record holds (`tools`, reasoning, tool calls …). Each turn
    of the assistant is supervised, unless it says otherwise (`train`, `weight`), through its end-of-turn token; if the
    template closes the last turn with no special token, the end-of-text token is put there. Where a turn begins and ends
    is found by rendering the conversation up to it; no mark in the template is needed, but each rendering must begin
    with the one before. A template that asks for the date gets CHAT_DATE.

    Args:
        record: as from `read_records`.
        tokenizer: a transformers tokenizer.
        template: "alpaca" or "chat".
    Raises:
        ValueError: an unknown template, a record or tokenizer that does not go with it, text of the record that the
            template leaves out, or a chat template whose renderings are not prefixes of each other.
    """
    return rendering(record, tokenizer, template=template).pieces


def rendering(record: Mapping[str, Json], tokenizer: PretrainedTokenizer, *, template: str) -> Rendering:
    """`render`, with what the text leaves out."""
    return _template(template).render(record, tokenizer)


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


class _Template(NamedTuple):
    render: Callable[[Mapping[str, Json], PretrainedTokenizer], Rendering]
    prompt: Callable[[Mapping[str, Json], PretrainedTokenizer], Rendering]


def _template(name: str) -> _Template:
    if name not in TEMPLATES:
        raise ValueError(f"`template` must be one of {', '.join(TEMPLATES)}; got {name!r}. Name one of these.")
    return TEMPLATES[name]


def _alpaca_prompt(record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering:
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


def _alpaca(record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering:
    prompt, eos = _alpaca_prompt(record, tokenizer).pieces, tokenizer.eos_token
    if "output" not in record:
        raise ValueError(f"training needs the column `output`; got {', '.join(map(repr, record))}. Add the column.")
    if eos is None:
        raise ValueError(
            "the alpaca template closes a response with the tokenizer's end-of-text token, from which the model learns "
            "to stop; this tokenizer has none. Set `tokenizer.eos_token`."
        )
    return Rendering([*prompt, (record["output"].removesuffix(eos) + eos, True)])


def _chat(record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering:
    conversation = conversation_of(record)
    if all(message["role"] != "assistant" for message in conversation.messages):
        raise ValueError("training needs a turn of the assistant; got none. Add the column `output`, or the turn.")
    return _chat_rendering(conversation, tokenizer, prompt=False)


def _chat_prompt(record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering:
    conversation = conversation_of(record)
    messages = conversation.messages
    if messages[-1]["role"] == "assistant":
        conversation = conversation._replace(messages=messages[:-1], trained=conversation.trained[:-1])
    return _chat_rendering(conversation, tokenizer, prompt=True)


TEMPLATES = {"alpaca": _Template(_alpaca, _alpaca_prompt), "chat": _Template(_chat, _chat_prompt)}


def _chat_rendering(conversation: Conversation, tokenizer: PretrainedTokenizer, *, prompt: bool) -> Rendering:
    """The whole conversation, or (`prompt`) what is in front of the next answer."""
    messages, trained, _, _ = conversation
    whole = _rendered(conversation, len(messages), tokenizer, add_generation_prompt=prompt)
    if not whole:
        raise ValueError(
            "a chat template must render a conversation to some text; this tokenizer's renders to none. "
            "Use another template."
        )
    left_out = left_out_of(conversation, whole, tokenizer.get_chat_template(tools=conversation.tools))
    pieces, done = [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = turn + 1 == len(messages)
        before = _rendered(conversation, turn, tokenizer, add_generation_prompt=True)
        through = whole if last else _rendered(conversation, turn + 1, tokenizer, add_generation_prompt=False)
        for text, beginning in ((before, whole[:done]), (through, before), (whole, through)):
            if not text.startswith(beginning):
                raise ValueError(
                    f"a chat template must render a conversation so that it begins with the rendering of its first "
                    f"turns; this tokenizer's changes, at turn {turn}, what came before: "
                    f"{_difference(text, beginning)}. So the tokens to supervise are not known. "
                    f"Use another template, or conversations with one answer each."
                )
        response = through[len(before) :]
        tail = _tail(response, message)
        # White space behind the end-of-turn token belongs to the template: the model has stopped before it.
        if _closed(tail.rstrip(), tokenizer):
            response = response[: len(response) - (len(tail) - len(tail.rstrip()))]
        elif last and tokenizer.eos_token is not None:
            response, whole = response + tokenizer.eos_token, whole + tokenizer.eos_token
        pieces += [(whole[done : len(before)], False), (response, trained[turn])]
        done = len(before) + len(response)
    return Rendering([piece for piece in (*pieces, (whole[done:], False)) if piece[0]], left_out)


def _rendered(
    conversation: Conversation, turns: int, tokenizer: PretrainedTokenizer, *, add_generation_prompt: bool
) -> str:
    """Its first turns."""
    from jlora.storage.jinja import render_template  # jinja2 is imported where it is used, as transformers does

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the template `chat` needs a tokenizer with a chat template; this one has none, as is usual for base "
            "models. Use the template `alpaca`, or the tokenizer of an instruct model."
        )
    messages = conversation.messages[:turns]
    variables = {
        "strftime_now": CHAT_DATE.strftime,
        **tokenizer.special_tokens_map,
        **conversation.variables,
        "messages": messages,
        "tools": conversation.tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return render_template(tokenizer.get_chat_template(tools=conversation.tools), variables)
    except Exception as error:  # jinja2's, or raised by the template itself over roles it does not know
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the tokenizer's chat template refuses a conversation of the turns {roles} "
            f"({type(error).__name__}: {error}). Change the record, or use another template."
        ) from error


def _tail(response: str, message: Message) -> str:
    """What the template wrote behind the content of a turn.

    The content itself may end in what looks like the end of a turn.
    """
    content = turn_content(message)
    for text in (content, content.strip()):
        place = response.find(text) if text else -1
        if place >= 0:
            return response[place + len(text) :]
    return response


def _closed(text: str, tokenizer: PretrainedTokenizer) -> bool:
    """Whether the text ends in a token of its own, such as <|im_end|>."""
    return text.endswith((*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()))


def _difference(text: str, beginning: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(text, beginning, strict=False)) if a != b), len(text))
    return f"expected {beginning[same : same + 40]!r} at character {same}, got {text[same : same + 40]!r}"
