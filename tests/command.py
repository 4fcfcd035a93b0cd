"""The `jlora` command, called in this process."""

from jlora import cli


def run(*flags):
    """The exit code of a command, 0 when it returns."""
    try:
        cli.main([str(flag) for flag in flags])
    except SystemExit as end:
        return end.code
    return 0
