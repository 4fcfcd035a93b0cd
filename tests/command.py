"""The `jlora` command, called in this process; and a terminal that keeps what is printed on it."""

import io

from jlora import cli
from jlora._terminal import console


def run(*flags):
    """The exit code of a command, 0 when it returns."""
    try:
        cli.main([str(flag) for flag in flags])
    except SystemExit as end:
        return end.code
    return 0


def on_a_terminal(width=200):
    return console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
