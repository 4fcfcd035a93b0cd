"""How Sphinx makes the site of these pages: `make docs`."""

import dataclasses
import re

from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.nodes import make_refnode

import jlora
from jlora.cli import _commands

project = "jlora"
author = "The jlora authors"
copyright = f"{author}; Apache-2.0"
release = version = jlora.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["build"]
nitpicky = True

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # of docstrings: what stands between single backquotes
smartquotes = False  # "pissa" is a value
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "jlora"
html_theme_options = {
    # The colours of the pages that jlora itself writes (jlora/report/page/style.css).
    "light_css_variables": {
        "color-brand-primary": "#9a3b0a",
        "color-brand-content": "#9a3b0a",
        "color-brand-visited": "#7a4a9c",
        "color-background-primary": "#fcfbf8",
        "color-background-secondary": "#f4f1ea",
        "color-foreground-primary": "#1d1c1a",
    },
    "dark_css_variables": {
        "color-brand-primary": "#f2a06b",
        "color-brand-content": "#f2a06b",
        "color-brand-visited": "#c7a2e6",
        "color-background-primary": "#15171a",
        "color-background-secondary": "#1e2125",
        "color-foreground-primary": "#e8e5de",
    },
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
copybutton_prompt_text = "$ "


class Docstring(GoogleDocstring):
    """Sections as napoleon reads them; a colon in what is returned is a colon, not the end of a type."""

    def _consume_returns_section(self, preprocess_types=False):
        return [("", "", self._dedent(self._consume_to_next_section()))]


SECTIONS = Config(napoleon_numpy_docstring=False, napoleon_use_rtype=False)
ONE_SENTENCE = {"attribute", "data", "property"}
"""What has a docstring without sections."""


def read_docstring(app, what, name, obj, options, lines):
    if what not in ONE_SENTENCE:
        lines[:] = Docstring(lines, SECTIONS, app, what, name, obj, options).lines()
    lines[:] = [re.sub(r"(?<=\[|\s)\*(?=\w+[,\]])", r"\\*", line) for line in lines]  # axes: [*stack, in, out]


LONGER = {
    "jaxlib._jax.Array": "Array",
    "~jaxtyping.Key[Array, ''] | ~jaxtyping.UInt32[Array, '2'] | ~jaxtyping.UInt32[Array, '4']": "PRNGKeyArray",
    "str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType": "DTypeLike",
}
"""What an alias of `jlora._typing` has become -> the alias."""


def shorten_signature(app, what, name, obj, options, signature, returned):
    """Aliases by their names; the fields of a dataclass are listed below it, with what they mean."""
    if what == "class" and dataclasses.is_dataclass(obj) and len(dataclasses.fields(obj)) > 4:
        signature = "(*, …)"
    for longer, alias in LONGER.items():
        signature, returned = (text and text.replace(longer, alias) for text in (signature, returned))
    return signature, returned


def list_commands(app, docname, source):
    """A section for each command that there is."""
    if docname == COMMANDS:
        source[0] += "".join(A_COMMAND.format(name, options) for name, (options, _) in _commands().items())


COMMANDS = "api/commands"
A_COMMAND = """
## `jlora {0}`

```{{eval-rst}}
.. autoclass:: {1.__module__}.{1.__qualname__}
   :members:
   :inherited-members:
   :no-index:
```
"""


def skip_methods(app, what, name, obj, skip, options):
    """Of a command, its flags alone."""
    return skip or (app.env.docname == COMMANDS and callable(obj))


def resolve_type(app, env, node, content):
    """A type of a signature leads to its public name, where these pages have it, and otherwise stays text."""
    if node.get("refdomain") != "py" or node["reftype"] not in ("class", "exc", "obj"):
        return None
    public = f"jlora.{node['reftarget'].rpartition('.')[2]}"
    found = env.get_domain("py").objects.get(public)
    if found is None:
        return content
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, public)


def setup(app):
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_methods)
    app.connect("source-read", list_commands)
    app.connect("missing-reference", resolve_type)
