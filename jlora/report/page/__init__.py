"""A page in one file: our style, a template of its own, its scripts, and a policy by which it asks nobody for anything."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from jlora._numbers import json_text
from jlora._terminal import visible

HERE = Path(__file__).parent
STYLE = HERE / "style.css"
CHART = HERE / "chart.js"
"""For pages with charts."""


def page(
    template: Path,
    *,
    scripts: Sequence[Path] = (),
    styles: Sequence[Path] = (),
    connects: bool = False,
    **values: object,
) -> str:
    """The HTML of a page, to be written as it is: nothing that it needs is elsewhere.

    Texts are escaped, and their control characters shown as Python's escapes. In a template, `value | json` makes the content of a
    `<script type="application/json">` of a value.

    Args:
        template: a file that extends "base.html", with the blocks `title` and `main`; its neighbours can be included by name.
        scripts: in this order, at the end of the page; the browser runs these and no others.
        styles: after `STYLE`. Attributes named `style` have no effect: the policy forbids them.
        connects: the page may talk to the server that it is from, which a file never needs.
        values: what the template is told.

    Raises:
        jinja2.UndefinedError: when the template asks for something that it is not told.
    """
    codes = [_inline(path) for path in scripts]
    style = "\n".join(_inline(path) for path in (STYLE, *styles))
    allowed = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": " ".join(map(_hash, codes)) or "'none'",
        "img-src": "data:",
        "connect-src": "'self'" if connects else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return (
        _templates(template.parent)
        .get_template(template.name)
        .render(
            policy="; ".join(f"{name} {value}" for name, value in allowed.items()),
            style=Markup(style),
            scripts=[Markup(code) for code in codes],
            **values,
        )
    )


@functools.cache
def _templates(folder: Path) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["json"] = _json
    return made


def _shown(value: object) -> object:
    """What a template prints: text without control characters, which a browser would drop or take for a broken page."""
    return visible(value) if type(value) is str else value


def _json(value: object) -> Markup:
    """For a `<script>`, which ends at the first `</script` whatever it stands in."""
    text = json_text(value)
    return Markup(text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&"}))


def _inline(path: Path) -> str:
    """A style or script as it stands in the page."""
    text = path.read_text(encoding="utf-8")
    if "</" in text:
        raise ValueError(f"{str(path)!r} must not hold '</', which could end its element. Write it otherwise.")
    return text


def _hash(text: str) -> str:
    """Of a policy's source list: https://www.w3.org/TR/CSP3/#match-element-to-source-list."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
