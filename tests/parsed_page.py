"""A page of ours as a test sees it: its elements, and what a browser would fetch for it."""

import dataclasses
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br", "img", "hr", "wbr"}
_FETCHING = {"src", "srcset", "poster", "data", "action", "formaction", "background", "manifest"}


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    """Of all that is in it."""
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    """Of a table: the texts of the cells of each row, without white space around."""


class ParsedPage(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag == "tr":
            self._table.rows.append([])
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):  # of an SVG
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1].tag == tag, f"</{tag}> within {[e.tag for e in self._open]}"
        closed = self._open.pop()
        if tag in ("td", "th"):
            self._table.rows[-1].append(" ".join(closed.text.split()))

    @property
    def _table(self) -> Element:
        return next(element for element in reversed(self._open) if element.tag == "table")

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag and attributes.items() <= e.attributes.items()]

    @property
    def tags(self) -> set[str]:
        return {element.tag for element in self.elements}

    @property
    def title(self) -> str:
        return self.all("title")[0].text

    @property
    def fetched(self) -> list[str]:
        """Addresses that a browser would ask for; `data:` is in the page itself."""
        named = [e.attributes[name] for e in self.elements for name in _FETCHING & e.attributes.keys()]
        named += [e.attributes.get("href") for e in self.elements if e.tag in ("link", "base", "use", "image")]
        named += [text for e in self.elements if e.tag == "style" for text in ("url(", "@import") if text in e.text]
        return [name for name in named if name is not None and not name.startswith("data:")]


def parse(html: str) -> ParsedPage:
    """Raises an AssertionError for elements that are not closed in their order."""
    found = ParsedPage()
    found.feed(html)
    found.close()
    assert not found._open, [element.tag for element in found._open]
    return found
