"""Chat templates as transformers renders them, in its sandbox, under bounds on the work and the size.

A chat template is a program from the checkpoint. jinja2's sandbox keeps it from the machine, not from running forever
or filling the memory: its own bound is on one `range`. Here every item of a loop, every call and every filter counts
as a step, and every text that is made counts its characters.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 2_000_000
MAX_CHARS = 50_000_000
MAX_SOURCE = 1_000_000
_CALL = 20  # steps


class Unbounded(jinja2.TemplateError):
    """A template that does too much."""


def render_template(source: str, variables: Mapping[str, object]) -> str:
    """What a chat template makes of `variables` (`messages`, `tools`, special tokens, `strftime_now` …).

    Raises:
        jinja2.TemplateError: of the syntax, an undefined name, `raise_exception`, the sandbox; `Unbounded` for more
            than MAX_STEPS steps or MAX_CHARS characters (of the source: MAX_SOURCE).
        Exception: whatever else the template's expressions raise.
    """
    if len(source) > MAX_SOURCE:
        raise Unbounded(f"a chat template may have {MAX_SOURCE:,} characters; this one has {len(source):,}")
    template = _compiled(source)
    outer = _spent.set(_Spent())
    try:
        return template.render(variables)
    finally:
        _spent.reset(outer)


class _Spent:
    steps = 0
    chars = 0


_spent: ContextVar[_Spent | None] = ContextVar("spent", default=None)


def _step(count: int = 1) -> None:
    spent = _spent.get()
    if spent is not None:  # None while constants are folded
        spent.steps += count
        if spent.steps > MAX_STEPS:
            raise Unbounded(
                f"a chat template may take {MAX_STEPS:,} steps (loops, calls, filters); this one takes more"
            )


def _chars(count: int) -> None:
    spent = _spent.get()
    total = count + (spent.chars if spent is not None else 0)
    if total > MAX_CHARS:
        raise Unbounded(f"a chat template may make {MAX_CHARS:,} characters of text; this one makes more")
    if spent is not None:
        spent.chars = total


def _size(value: object, seen: dict[int, int] | None = None) -> int:
    """About how long `str(value)` is. What is in it twice counts twice, but is looked at once."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length()
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, Sequence | set | frozenset):
        parts = list(value)
    else:
        return 16
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = 0  # while it is looked at: a container in itself
        seen[id(value)] = len(parts) + 2 + sum(_size(part, seen) for part in parts)
    return seen[id(value)]


def _counted(items: Any) -> Any:
    """The items of a loop; each is a step."""
    if hasattr(items, "__len__"):
        _step(len(items))
        return items
    return _counting(items) if isinstance(items, Iterable) else items


def _counting(items: Iterable[object]) -> Iterable[object]:
    for item in items:
        _step()
        yield item


def _joined(parts: list[object]) -> str:
    """`a ~ b ~ c`."""
    _chars(sum(map(_size, parts)))
    return "".join(map(str, parts))


def _shown(value: object) -> Any:
    """What `{{ value }}` prints."""
    _chars(_size(value))
    return value


def _concatenated(parts: Iterable[str]) -> str:
    """Of the pieces of a template, a macro or a block."""
    kept = []
    for part in parts:
        _chars(len(part))
        kept.append(part)
    return "".join(kept)


def _check_call(name: str, values: tuple[Any, ...]) -> None:
    """What one call of a method of text, or a filter, may make of its arguments."""
    sizes = [_size(value) if name in _WRITERS else len(value) if hasattr(value, "__len__") else 1 for value in values]
    numbers = [abs(value) for value in values if isinstance(value, int)]
    widest = max(numbers, default=1)
    if name == "replace" and len(values) >= 3 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = values[:3]
        return _chars(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    if name == "join" and len(values) >= 2:
        apart = max((len(value) for value in values if isinstance(value, str)), default=0)
        longest = max((len(value) for value in values if hasattr(value, "__len__")), default=0)
        return _chars(sum(sizes) + apart * longest)
    if name in ("format", "format_map") and re.search(r"\d{5}|\*", str(values[:1])):
        raise Unbounded("a chat template may not pad text to ten thousand characters")
    if name in _PADDING or name in _WRITERS:
        _chars(max(sizes, default=0) * max(1, widest if name in _PADDING else 1))
    return None


_PADDING = frozenset(
    {
        "center",
        "ljust",
        "rjust",
        "zfill",
        "expandtabs",
        "indent",
        "batch",
        "slice",
        "tojson",
        "filesizeformat",
        "wordwrap",
    }
)
# Steps for each item of a filter's arguments, where it is not one.
_COSTS: dict[str, int] = {name: 0 for name in ("length", "count", "first", "last", "default", "d")} | {
    name: 10 for name in ("sort", "dictsort", "unique", "groupby")
}
_WRITERS = frozenset(
    {"string", "tojson", "join", "pprint", "xmlattr", "urlencode", "sum", "list", "format", "escape", "e"}
)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    context = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args[context:], *kwargs.values())
        _step(1 + _COSTS.get(name, 1) * sum(map(_items, values)))
        if name in ("join", "list", "sum") and values and not hasattr(values[0], "__len__"):
            # A generator: as a list, so that its size is known.
            items = list(islice(_counting(values[0]), MAX_STEPS)) if isinstance(values[0], Iterable) else values[0]
            args = (*args[:context], items, *args[context + 1 :])
            values = (items, *values[1:])
        _check_call(name, values)
        made = function(*args, **kwargs)
        if isinstance(made, str):
            _chars(len(made))
        return made

    return call


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concatenated)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        if operator == "+" and type(left) is type(right) is str:
            _chars(len(left) + len(right))
            return left + right
        if operator == "+" and hasattr(left, "__len__"):
            _chars(_length(left) + _length(right))
        elif operator == "*":
            times = [value for value in (left, right) if isinstance(value, int)]
            _chars(max(map(_length, (left, right))) * (abs(times[0]) if len(times) == 1 else 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _chars(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_call("format", (left,))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # What it costs: a macro's call takes as long as many items of a loop.
        _step(_CALL + sum(map(_items, args)))
        function_of_text = getattr(function, "__wrapped__", function)  # the sandbox wraps `str.format`
        owner = getattr(function_of_text, "__self__", None)
        if isinstance(owner, str):
            _check_call(getattr(function_of_text, "__name__", ""), (owner, *args, *kwargs.values()))
        made = super().call(context, function, *args, **kwargs)
        if isinstance(made, str):
            _chars(len(made))
        return made


def _length(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return 8 * _items(value) or (len(value) if hasattr(value, "__len__") else 1)


def _items(value: object) -> int:
    return len(value) if isinstance(value, list | tuple | dict | range) else 0


class _Counting(NodeTransformer):
    """The same template, in which loops count their items and `~` its characters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted items", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined parts", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what the assistant says; found here without it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """As transformers': no names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _public(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _public(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not name an attribute {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what means something in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_shown
    )
    environment.filters["tojson"] = _to_json
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _bounded(name, function)
    environment.filters |= {"counted items": _counted, "joined parts": _joined}
    environment.globals |= {
        "raise_exception": _raise,
        "namespace": _Namespace,
        "lipsum": jinja2.Undefined(name="lipsum"),
    }
    return environment


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = _environment()
    tree = _Counting().visit(environment.parse(source))
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))
