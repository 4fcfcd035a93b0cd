"""The `jlora` command: one dataclass per subcommand, whose fields are its flags."""

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from rich.table import Table

from jlora import _start
from jlora._terminal import console, never_fail_to_encode, say, visible
from jlora.cli.config_file import joined, with_config_file
from jlora.storage.whole import NoSpace, no_space

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, _start.INTERRUPTED

_WRITTEN_FOR_USERS = (ValueError, FileNotFoundError, FileExistsError, ImportError)
"""Types (not their subclasses) that jlora raises with messages that say what to do."""

_FOREIGN_LENGTH = 400
"""Characters of another library's message; some are pages long."""


_OF_ALL = """

--config FILE.yaml gives any of these flags; flags win over it.

--no-compilation-cache compiles everything anew, and keeps none of it for the next command."""


def _commands() -> Mapping[str, tuple[type, Callable]]:
    """Name -> (dataclass of its flags, what runs it)."""
    from jlora.cli import (
        chat,
        compare,
        evaluate,
        export,
        generate,
        inspect,
        memory,
        merge,
        prepare,
        push,
        quantize,
        report,
        serve,
    )
    from jlora.runs import FinetuneConfig, finetune

    return {
        "finetune": (FinetuneConfig, finetune),
        "evaluate": (evaluate.Evaluate, evaluate.run),
        "compare": (compare.Compare, compare.run),
        "generate": (generate.Generate, generate.run),
        "chat": (chat.Chat, chat.run),
        "serve": (serve.Serve, serve.run),
        "merge": (merge.Merge, merge.run),
        "export": (export.Export, export.run),
        "push": (push.Push, push.run),
        "quantize": (quantize.Quantize, quantize.run),
        "inspect": (inspect.Inspect, inspect.run),
        "memory": (memory.Memory, memory.run),
        "prepare": (prepare.Prepare, prepare.run),
        "report": (report.Report, report.run),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (failed), 2 (wrong usage), 130 (interrupted, state saved) or 75 (its time limit ended a
    run, state saved; more is to be done by the same command with --resume)."""
    never_fail_to_encode()
    try:
        try:
            with _plain_warnings():
                _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            _flush()
    except KeyboardInterrupt as stop:
        _interrupted(stop)
    except BrokenPipeError:  # `jlora … | head` has seen enough
        _close_output()
        sys.exit(FAILURE)
    except SystemExit:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if os.environ.get("JLORA_TRACEBACK") or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        interrupt = next((cause for cause in _causes(error) if isinstance(cause, KeyboardInterrupt)), None)
        if interrupt is not None:
            _interrupted(interrupt)
        _fail(_advice(error), FAILURE)


def _main(arguments: list[str]) -> None:
    # Said once here: nothing in jlora runs torch, and transformers would greet every start with advice to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    commands = _commands()
    import tyro

    from jlora.cli import compilation

    _start.raise_on_interrupt()
    if not arguments or arguments[0] in ("-h", "--help"):
        console().print(_overview(commands))
        sys.exit(0 if arguments else USAGE_ERROR)
    if arguments[0] in ("-V", "--version"):
        from jlora import __version__

        print(f"jlora {__version__}")
        return
    name, *flags = arguments
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        _fail(
            f"no command {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(commands)}."),
            USAGE_ERROR,
        )
    options, function = commands[name]
    wanted = compilation.OFF not in flags
    flags = [flag for flag in flags if flag != compilation.OFF]
    config = tyro.cli(
        options,
        prog=f"jlora {name}",
        args=with_config_file(options, joined(options, flags)),
        description=(options.__doc__ or "") + _OF_ALL,
    )
    compilation.keep_compiled(wanted)
    function(config)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are printed as what they say, without the line of code that they come from."""
    from jlora.cli.compilation import repairing

    before, shown = warnings.formatwarning, warnings.showwarning
    warnings.showwarning = repairing(shown)
    if not os.environ.get("JLORA_TRACEBACK"):
        warnings.formatwarning = lambda message, *_, **__: f"warning: {visible(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning, warnings.showwarning = before, shown


def _flush() -> None:
    """What is still to be printed, while its errors can be told."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_output()
        _fail(f"standard output cannot be written: {error.strerror}.", FAILURE)


def _close_output() -> None:
    """Leaves nothing for Python to flush at the end, which would fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass  # it is no file


def _advice(error: BaseException) -> str:
    """What to print of an error: jlora's own words as they are, those of others in one line."""
    text = str(error) or type(error).__name__
    full = no_space(error)
    if full is not None:
        return str(NoSpace(full, getattr(error, "advice", "") or "Run the same command after making room."))
    if type(error).__module__.startswith("jlora"):
        return text
    from jlora.train.memory import is_out_of_memory

    if is_out_of_memory(error):
        return (
            f"out of memory ({text.splitlines()[0][:200]}). Try, in this order: --quantize nf4, a smaller --batch-size with more "
            "--accumulate (same result), a smaller --max-length, --remat layer, --dtype bfloat16, a smaller --rank "
            "or fewer --targets."
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)!r}: {error.strerror}."
    if type(error) in _WRITTEN_FOR_USERS and _is_raised_here(error):
        return text
    line = " ".join(text.split())
    line = line if len(line) <= _FOREIGN_LENGTH else line[:_FOREIGN_LENGTH] + " …"
    name = "" if line == type(error).__name__ else f"{type(error).__name__}: "
    return f"{name}{line} (set JLORA_TRACEBACK=1 to see where)"


def _is_raised_here(error: BaseException) -> bool:
    """Whether it was jlora's code that raised it, and not a library below."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is None or place.tb_frame.f_globals.get("__name__", "").startswith("jlora")


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _interrupted(stop: BaseException) -> NoReturn:
    print(str(stop) or "interrupted", file=sys.stderr)
    sys.exit(getattr(stop, "exit_code", INTERRUPTED))


def _fail(message: str, code: int) -> NoReturn:
    if "huggingface_hub" in sys.modules:
        from jlora.publish.hub import without_token

        message = without_token(message)
    say(console(stderr=True), ("error:", "bold red"), f" {message}")
    sys.exit(code)


def _overview(commands: Mapping[str, tuple[type, Callable]]) -> Table:
    table = Table(box=None, show_header=False, title="jlora: LoRA for JAX", title_justify="left", pad_edge=False)
    for name, (options, _) in commands.items():
        table.add_row(f"jlora {name}", (options.__doc__ or "").strip().splitlines()[0])
    table.add_row("", "")
    table.add_row("jlora COMMAND --help", "all flags of a command")
    return table
