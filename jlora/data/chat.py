"""A conversation as a chat template writes it, parted into what is learned and what is in front of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date

from jlora._typing import Json, PretrainedTokenizer
from jlora.data.conversations import Conversation, Message, conversation_of, left_out_of, turn_content
from jlora.data.named_templates import CHAT_TEMPLATES, template_text
from jlora.data.rendering import Rendering, Rewritten, Supervise

# What chat templates are told when they ask for today's date, so that a run started tomorrow has the same tokens. The
# day is the one that Llama 3's templates fall back to.
CHAT_DATE = date(2024, 7, 26)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a name; "chat": the tokenizer's own."""

    name: str = "chat"

    def render(self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise) -> Rendering:
        """All answers in one text.

        Raises:
            Rewritten: the template renders the conversation otherwise than it does the beginning of it.
            ValueError: no answer, or what the template refuses or leaves out.
        """
        return _whole(_Chat(_supervised(record, supervise), tokenizer, self._source(tokenizer)), supervise == "all")

    def apart(
        self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer, supervise: Supervise
    ) -> Iterator[Rendering]:
        """Each answer behind what the template makes of the turns before it; with "all", the last one with all before it."""
        conversation, source = _supervised(record, supervise), self._source(tokenizer)
        answers = [turn for turn, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        trained = [turn for turn in answers if conversation.trained[turn]]
        if supervise == "all":
            trained = answers[-1:] if trained == answers and answers[-1] + 1 == len(conversation.messages) else []
        for turn in trained:
            yield _ending(_Chat(conversation.until(turn + 1), tokenizer, source), supervise == "all")

    def prompt(self, record: Mapping[str, Json], tokenizer: PretrainedTokenizer) -> Rendering:
        """What is in front of the next answer, or of the one that ends the record."""
        conversation = conversation_of(record)
        if conversation.messages[-1]["role"] == "assistant":
            conversation = conversation.until(-1)
        chat = _Chat(conversation, tokenizer, self._source(tokenizer))
        try:
            return _whole(chat, False, prompt=True)
        except Rewritten:
            text = chat.asked(len(conversation.messages))
            return Rendering([(text, False)], left_out_of(conversation, text, chat.source, forgets=True))

    def _source(self, tokenizer: PretrainedTokenizer) -> str | None:
        return None if self.name == "chat" else template_text(self.name)


class _Chat:
    """Renders the first turns of a conversation.

    given: the source of the template; None: the tokenizer's own.
    """

    def __init__(self, conversation: Conversation, tokenizer: PretrainedTokenizer, given: str | None):
        self.conversation, self.tokenizer = conversation, tokenizer
        if given is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the template `chat` needs a tokenizer with a chat template; this one has none, as is usual for base "
                f"models. Use the template `alpaca`, a chat template by name ({', '.join(CHAT_TEMPLATES)}), or the tokenizer of an "
                f"instruct model."
            )
        self.source = tokenizer.get_chat_template(tools=conversation.tools) if given is None else given

    def said(self, turns: int) -> str:
        return self._rendered(turns, add_generation_prompt=False)

    def asked(self, turns: int) -> str:
        """With what opens an answer to them."""
        return self._rendered(turns, add_generation_prompt=True)

    def _rendered(self, turns: int, *, add_generation_prompt: bool) -> str:
        from jlora.storage.jinja import render_template  # jinja2 is imported where it is used, as transformers does

        messages = self.conversation.messages[:turns]
        variables = {
            "strftime_now": CHAT_DATE.strftime,
            **self.tokenizer.special_tokens_map,
            **self.conversation.variables,
            "messages": messages,
            "tools": self.conversation.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = render_template(self.source, variables)
        except Exception as error:  # jinja2's, or raised by the template itself over roles it does not know
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of the turns {roles} "
                f"({type(error).__name__}: {error}). Change the record, or use another template."
            ) from error
        if not text and turns == len(self.conversation.messages):
            raise ValueError(
                "a chat template must render a conversation to some text; this tokenizer's renders to none. "
                "Use another template."
            )
        return text


def _supervised(record: Mapping[str, Json], supervise: Supervise) -> Conversation:
    """The conversation of a record, of which only those answers are trained that are asked for.

    Raises:
        ValueError: there is none, or none is left.
    """
    conversation = conversation_of(record)
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in roles:
        raise ValueError("training needs a turn of the assistant; got none. Add the column `output`, or the turn.")
    first = 0
    if supervise == "last":
        first = len(roles) - 1 - roles[::-1].index("assistant")
    elif supervise == "response" and "user" in roles:
        first = len(roles) - 1 - roles[::-1].index("user")
    trained = [flag and turn >= first for turn, flag in enumerate(conversation.trained)]
    if not any(flag for flag, role in zip(trained, roles, strict=True) if role == "assistant"):
        raise ValueError(
            f"with `supervise` {supervise!r} there is no turn of the assistant to learn from; got the turns {', '.join(roles)}. "
            f"Remove what comes last, or supervise 'assistant'."
        )
    return conversation._replace(trained=trained)


def _whole(chat: _Chat, context: bool, *, prompt: bool = False) -> Rendering:
    """The conversation, or (`prompt`) what is in front of the next answer.

    context: whether what is in front of answers is learned too.
    """
    conversation, tokenizer = chat.conversation, chat.tokenizer
    turns, pieces, done = len(conversation.messages), [], 0
    whole = chat.asked(turns) if prompt else chat.said(turns)
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        last = turn + 1 == turns
        before = chat.asked(turn)
        through = whole if last else chat.said(turn + 1)
        _check_beginnings(turn, (before, whole[:done]), (through, before), (whole, through))
        response, appended = _response(through[len(before) :], message, tokenizer, last)
        whole += appended
        pieces += [(whole[done : len(before)], context), (response, conversation.trained[turn])]
        done = len(before) + len(response)
    left_out = left_out_of(conversation, whole, chat.source)
    return Rendering([piece for piece in (*pieces, (whole[done:], context)) if piece[0]], left_out)


def _ending(chat: _Chat, context: bool) -> Rendering:
    """The last turn, an answer, as `_whole`; the template may render the turns before it as it likes."""
    conversation, turn = chat.conversation, len(chat.conversation.messages) - 1
    before, whole = chat.asked(turn), chat.said(turn + 1)
    _check_beginnings(turn, (whole, before))
    response, _ = _response(whole[len(before) :], conversation.messages[turn], chat.tokenizer, True)
    left_out = left_out_of(conversation, whole, chat.source, forgets=True)
    rest = whole[len(before) + len(response) :]
    return Rendering([piece for piece in ((before, context), (response, True), (rest, context)) if piece[0]], left_out)


def _check_beginnings(turn: int, *pairs: tuple[str, str]) -> None:
    for text, beginning in pairs:
        if not text.startswith(beginning):
            raise Rewritten(
                f"a chat template must render a conversation so that it begins with the rendering of its first "
                f"turns; this tokenizer's changes, at turn {turn}, what came before: "
                f"{_difference(text, beginning)}. So the tokens to supervise are not known. "
                f"Use another template, or conversations with one answer each."
            )


def _response(text: str, message: Message, tokenizer: PretrainedTokenizer, last: bool) -> tuple[str, str]:
    """An answer through its end, and what was appended to close it."""
    tail = _tail(text, message)
    # White space behind the end-of-turn token belongs to the template: the model has stopped before it.
    if _closed(tail.rstrip(), tokenizer):
        return text[: len(text) - (len(tail) - len(tail.rstrip()))], ""
    if last and tokenizer.eos_token is not None:
        return text + tokenizer.eos_token, tokenizer.eos_token
    return text, ""


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
