"""The formats of records: a row says which columns tell one, and how it is read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from jlora._typing import Json, JsonObject
from jlora.data.turns import check_conversation, is_answer, messages_of
from jlora.data.values import Record, as_text, kind, says_nothing

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"]


class Format(NamedTuple):
    """How a record is written.

    columns: those that it has; the last one is the answer where there are two.
    read: the values of `columns`, and of `input`, as one of our own records.
    optional: further columns of this format alone.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Json]], Record]
    optional: tuple[str, ...] = ()

    def is_said(self, value: Mapping[str, Json]) -> bool:
        """Whether a record says something in the columns; an answer may be an empty text."""
        return not says_nothing(value.get(self.columns[0])) and value.get(self.columns[-1]) is not None


def _conversation(messages: list[JsonObject]) -> Record:
    check_conversation(messages)
    return Record(messages=messages)


def _instruction(asked: str, answered: str) -> Callable[[Mapping[str, Json]], Record]:
    def read(value: Mapping[str, Json]) -> Record:
        given = "" if value.get("input") is None else value["input"]
        texts = {asked: value[asked], "input": given, answered: value[answered]}
        return Record(zip(("instruction", "input", "output"), (as_text(n, t) for n, t in texts.items()), strict=True))

    return read


def _prompt_completion(value: Mapping[str, Json]) -> Record:
    """Texts, or the turns of both, of which those of the prompt are not trained."""
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise ValueError(
            f"`prompt` and `completion` must both be texts or both be turns; got {kind(prompt)} and {kind(completion)}"
        )
    if not isinstance(prompt, list):
        return _instruction("prompt", "completion")(value)
    before, after = (messages_of(turns, keys=("role", "content")) for turns in (prompt, completion))
    context = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in before]
    return _conversation(context + after)


def _text(value: Mapping[str, Json]) -> Record:
    if not as_text("text", value["text"]).strip():
        raise ValueError("a text must say something; got an empty one. Remove the record")
    return Record(text=value["text"])


FORMATS: Mapping[FormatName, Format] = {
    "messages": Format(("messages",), lambda v: _conversation(messages_of(v["messages"], keys=("role", "content")))),
    "sharegpt": Format(
        ("conversations",), lambda v: _conversation(messages_of(v["conversations"], keys=("from", "value")))
    ),
    "alpaca": Format(("instruction", "output"), _instruction("instruction", "output"), ("input",)),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion),
    "question-answer": Format(("question", "answer"), _instruction("question", "answer")),
    "text": Format(("text",), _text),
}
"""Name -> format: OpenAI's and ShareGPT's turns, Stanford Alpaca's columns, TRL's prompts, questions, and raw text."""
SIDE_COLUMNS = ("system", "system_prompt", "history", "tools", "chat_template_kwargs")
"""What a record of any format may have besides."""
MEANINGS = tuple(dict.fromkeys([n for f in FORMATS.values() for n in (*f.columns, *f.optional)] + [*SIDE_COLUMNS]))
"""Columns that mean something."""


class Reading(NamedTuple):
    """How the records of a data set are to be read.

    format: a name of FORMATS; None: told by their columns.
    columns: a column that means something -> what the data set calls it.
    system: the system prompt of those that have none.
    beside: further columns, by the data set's names, which are kept as they are.
    """

    format: FormatName | None = None
    columns: Mapping[str, str] = {}
    system: str | None = None
    beside: tuple[str, ...] = ()


TOLD = Reading()
"""By the columns alone."""


def reading(format: FormatName | None = None, columns: Sequence[str] = (), system: str | None = None) -> Reading:
    """Of flags: `columns` are "instruction=question" and the like.

    Raises:
        ValueError: an unknown format or meaning, one that is said twice, or not of this form.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}; got {format!r}.")
    named: dict[str, str] = {}
    for pair in columns:
        meaning, equals, column = pair.partition("=")
        if not equals or not column or meaning not in MEANINGS:
            raise ValueError(
                f"`columns` must be MEANING=COLUMN, with a meaning among {', '.join(MEANINGS)}; got {pair!r}, as in "
                f"`--columns instruction=question output=answer`."
            )
        if meaning in named or column in named.values():
            raise ValueError(f"each of `columns` must be named once; got {pair!r} besides another. Leave one out.")
        named[meaning] = column
    return Reading(format, named, system)


def renamed(value: Mapping[str, Json], columns: Mapping[str, str]) -> tuple[JsonObject, tuple[str, ...]]:
    """A record under the names of meanings, and the columns that had these names and are read as nothing now.

    Raises:
        ValueError: a column that is not there.
    """
    missing = [column for column in columns.values() if column not in value]
    if missing:
        raise ValueError(
            f"there is no column {' nor '.join(map(repr, missing))}, which `--columns` names; got {_listed(value)}"
        )
    taken = set(columns.values())
    others = {name: item for name, item in value.items() if name not in taken}
    displaced = tuple(name for name in others if name in columns)
    return others | {meaning: value[column] for meaning, column in columns.items()}, displaced


def format_of(value: Mapping[str, Json], how: Reading) -> FormatName:
    """The name of the format of a record, after `renamed`.

    `text` beside another format is the text made of it, as in Stanford's own file, and is not read.

    Raises:
        ValueError: no format has its columns, or several have.
    """
    if how.format is not None:
        missing = [name for name in FORMATS[how.format].columns if name not in value]
        if missing:
            raise ValueError(
                f"a record of --format {how.format} needs the columns {_listed(FORMATS[how.format].columns)}; got "
                f"{_listed(value)}, so {' and '.join(map(repr, missing))} is missing. Name it with `--columns {missing[0]}=…`"
            )
        return how.format
    possible: dict[FormatName, Format] = {
        name: row
        for name, row in FORMATS.items()
        if all(meaning in (*row.columns, *row.optional, *SIDE_COLUMNS) for meaning in how.columns)
    }
    said: list[FormatName] = [name for name, row in possible.items() if row.is_said(value)]
    if len(said) > 1:
        said = [name for name in said if name != "text"]
    if len(said) > 1:
        both = " and ".join(f"{name!r} ({_listed(FORMATS[name].columns)})" for name in said)
        raise ValueError(
            f"a record must be of one format; the columns are those of {both}. Say which one: --format {said[0]}, or "
            f"--format {said[1]}"
        )
    given: list[FormatName] = [
        n for n, row in possible.items() if all(value.get(c) not in (None, [], {}) for c in row.columns)
    ]
    named: list[FormatName] = [n for n, row in possible.items() if all(column in value for column in row.columns)]
    said = said or given or named  # one that says nothing is refused as what it is
    if said:
        return said[0]
    missing = [name for name in FORMATS["alpaca"].columns if name not in value]
    raise ValueError(
        f"a record needs the columns {_ALL}; got {_listed(value)}, so {' and '.join(map(repr, missing))} is missing. "
        f"Rename the columns, or say which is which, as in `--columns instruction=question output=answer`."
    )


_ALL = "`instruction` and `output` (and optionally `input`), or " + ", or ".join(
    " and ".join(f"`{column}`" for column in row.columns) for name, row in FORMATS.items() if name != "alpaca"
)


def unanswered(value: Json) -> Json:
    """A record as it would be with an answer, so that one rule reads prompts and what is trained on."""
    if not isinstance(value, dict):
        return value
    for row in FORMATS.values():
        asked, answer = row.columns[0], row.columns[-1]
        given = value.get(asked)
        if asked == answer and isinstance(given, list) and given:
            answered = isinstance(given[-1], dict) and is_answer(given[-1])
            return value if answered else {**value, asked: [*given, {"role": "assistant", "content": ""}]}
        if asked != answer and not says_nothing(given) and value.get(answer) is None:
            return {**value, answer: [{"role": "assistant", "content": ""}] if isinstance(given, list) else ""}
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
