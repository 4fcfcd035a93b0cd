"""A record as text: what the model is given, and what it is to say."""

import re
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, NamedTuple

from jlora.data.records import Record
from jlora.data.tokens import Tokenizer, added_bos, encode_many

Piece = tuple[str, bool]  # text, and whether the loss is taken on it

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


def render(record: Record, tokenizer: Tokenizer, *, template: str) -> list[Piece]:
    """The text of a record in pieces, each of them supervised or not; joined they are the whole text.

    `alpaca`: the Stanford Alpaca prompt with or without input, then the response closed by one end-of-text token.
    `chat`: the tokenizer's chat template. Each turn of the assistant is supervised, through its end-of-turn token; if
    the template closes the last turn with no special token, the end-of-text token is put there. Where a turn begins
    and ends is found by rendering the conversation up to it; no mark in the template is needed, but each rendering
    must begin with the one before. A template that asks for the date gets CHAT_DATE.

    Args:
        record: as from `read_records`.
        tokenizer: a transformers tokenizer.
        template: "alpaca" or "chat".
    Raises:
        ValueError: an unknown template, a record or tokenizer that does not go with it, or a chat template whose
            renderings are not prefixes of each other.
    """
    return _template(template).render(record, tokenizer)


def prompt_ids(record: Record, tokenizer: Tokenizer, *, template: str) -> list[int]:
    """The tokens to generate a response from: exactly those in front of the (last) response in training.

    Args:
        record: as from `read_records`; its response (the last turn, if the assistant's) is not looked at and may be
            missing.
        tokenizer, template: as in `render`.
    Raises:
        ValueError: as `render`.
    """
    pieces = _template(template).prompt(record, tokenizer)
    encoded = encode_many(tokenizer, [text for text, _ in pieces])
    return assemble([(ids, False) for ids in encoded], bos=added_bos(tokenizer))[0]


def assemble(pieces: Sequence[tuple[Sequence[int], bool]], *, bos: int | None) -> tuple[list[int], list[bool]]:
    """Encoded pieces, each encoded by itself, as one row: its ids, and which are supervised.

    The row starts with exactly one `bos` (see `added_bos`), whether the text had none, one or more; with None it
    is left as it is.
    """
    ids = [token_id for piece, _ in pieces for token_id in piece]
    supervised = [flag for piece, flag in pieces for _ in piece]
    if bos is None:
        return ids, supervised
    own = 0
    while own < len(ids) and ids[own] == bos:
        own += 1
    return [bos, *ids[own:]], [False, *supervised[own:]]


class _Template(NamedTuple):
    render: Callable[[Record, Tokenizer], list[Piece]]
    prompt: Callable[[Record, Tokenizer], list[Piece]]


def _template(name: str) -> _Template:
    if name not in TEMPLATES:
        raise ValueError(f"`template` must be one of {', '.join(TEMPLATES)}; got {name!r}. Name one of these.")
    return TEMPLATES[name]


def _alpaca_prompt(record: Record, tokenizer: Tokenizer) -> list[Piece]:
    if "instruction" not in record:
        raise ValueError(
            f"the alpaca template needs the columns `instruction` and `output`; got {', '.join(map(repr, record))}. "
            f"Use the template `chat` for conversations."
        )
    form = ALPACA_WITH_INPUT if record.get("input") else ALPACA_WITHOUT_INPUT
    return [(form.format(instruction=record["instruction"], input=record.get("input")), False)]


def _alpaca(record: Record, tokenizer: Tokenizer) -> list[Piece]:
    prompt, eos = _alpaca_prompt(record, tokenizer), tokenizer.eos_token
    if "output" not in record:
        raise ValueError(f"training needs the column `output`; got {', '.join(map(repr, record))}. Add the column.")
    if eos is None:
        raise ValueError(
            "the alpaca template closes a response with the tokenizer's end-of-text token, from which the model learns "
            "to stop; this tokenizer has none. Set `tokenizer.eos_token`."
        )
    return [*prompt, (record["output"].removesuffix(eos) + eos, True)]


def _chat(record: Record, tokenizer: Tokenizer) -> list[Piece]:
    messages = _turns(record)
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("training needs a turn of the assistant; got none. Add the column `output`, or the turn.")
    pieces = _chat_pieces(messages, tokenizer, add_generation_prompt=False)
    last, supervised = pieces[-1]
    if supervised and tokenizer.eos_token is not None and not _closed(last, tokenizer):
        pieces[-1] = (last + tokenizer.eos_token, True)
    return pieces


def _chat_prompt(record: Record, tokenizer: Tokenizer) -> list[Piece]:
    messages = _turns(record)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return _chat_pieces(messages, tokenizer, add_generation_prompt=True)


TEMPLATES = {"alpaca": _Template(_alpaca, _alpaca_prompt), "chat": _Template(_chat, _chat_prompt)}


def _turns(record: Record) -> list[dict[str, str]]:
    if "messages" in record:
        return record["messages"]
    if "instruction" not in record:
        raise ValueError(
            f"the chat template needs `messages`, or `instruction` and `output`; got {', '.join(map(repr, record))}. "
            f"Rename the columns."
        )
    request = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    messages = [{"role": "user", "content": request}]
    if "output" in record:
        messages.append({"role": "assistant", "content": record["output"]})
    return messages


def _chat_pieces(messages: list[dict[str, str]], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[Piece]:
    whole = _rendered(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    pieces, done = [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:turn], tokenizer, add_generation_prompt=True)
        through = _rendered(messages[: turn + 1], tokenizer, add_generation_prompt=False)
        for text, beginning in ((before, whole[:done]), (through, before), (whole, through)):
            if not text.startswith(beginning):
                raise ValueError(
                    f"a chat template must render a conversation so that it begins with the rendering of its first "
                    f"turns; this tokenizer's changes, at turn {turn}, what came before: "
                    f"{_difference(text, beginning)}. So the tokens to supervise are not known. "
                    f"Use another template, or conversations with one answer each."
                )
        response = through[len(before) :]
        # White space behind the end-of-turn token belongs to the template: the model has stopped before it.
        if _closed(response.rstrip(), tokenizer):
            response = response.rstrip()
        pieces += [(whole[done : len(before)], False), (response, True)]
        done = len(before) + len(response)
    return [piece for piece in (*pieces, (whole[done:], False)) if piece[0]]


def _rendered(messages: list[dict[str, str]], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the template `chat` needs a tokenizer with a chat template; this one has none, as is usual for base "
            "models. Use the template `alpaca`, or the tokenizer of an instruct model."
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_dated(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # jinja2's, or raised by the template itself over roles it does not know
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the tokenizer's chat template refuses a conversation of the turns {roles} "
            f"({type(error).__name__}: {error}). Change the record, or use another template."
        ) from error


def _dated(template: str) -> str:
    """The template with transformers' `strftime_now` shadowed by a macro that knows CHAT_DATE only."""
    if "strftime_now" not in template:
        return template
    formats = re.findall(r"""strftime_now\(\s*["']([^"']+)["']""", template)
    known: dict[str, Any] = {form: CHAT_DATE.strftime(form) for form in formats}
    # The empty print keeps jinja2 from trimming a newline with which the template may begin.
    macro = f"{{{{ {known!r}.get(format, {CHAT_DATE.isoformat()!r}) }}}}"
    return f"{{%- macro strftime_now(format) -%}}{macro}{{%- endmacro %}}{{{{ '' }}}}{template}"


def _closed(text: str, tokenizer: Tokenizer) -> bool:
    """Whether the text ends in a token of its own, such as <|im_end|>."""
    return text.endswith((*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()))


def _difference(text: str, beginning: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(text, beginning, strict=False)) if a != b), len(text))
    return f"expected {beginning[same : same + 40]!r} at character {same}, got {text[same : same + 40]!r}"
