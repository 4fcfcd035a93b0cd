"""The `jlora` command: one dataclass per subcommand, whose fields are its flags."""

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130

_WRITTEN_FOR_USERS = (ValueError, FileNotFoundError, FileExistsError, ImportError)
"""Types (not their subclasses) that jlora raises with messages that say what to do."""


def _commands() -> Mapping[str, tuple[type, Callable[[Any], Any]]]:
    """Name -> (dataclass of its flags, what runs it)."""
    from jlora.cli import compare, evaluate, export, generate, inspect, memory, merge, prepare, push, quantize
    from jlora.finetuning import FinetuneConfig, finetune

    return {
        "finetune": (FinetuneConfig, finetune),
        "evaluate": (evaluate.Evaluate, evaluate.run),
        "compare": (compare.Compare, compare.run),
        "generate": (generate.Generate, generate.run),
        "merge": (merge.Merge, merge.run),
        "export": (export.Export, export.run),
        "push": (push.Push, push.run),
        "quantize": (quantize.Quantize, quantize.run),
        "inspect": (inspect.Inspect, inspect.run),
        "memory": (memory.Memory, memory.run),
        "prepare": (prepare.Prepare, prepare.run),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (failed), 2 (wrong usage) or 130 (interrupted, state saved)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Said once here: nothing in jlora runs torch, and transformers would greet every start with advice to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        Console().print(_overview(commands))
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
    _run(name, *commands[name], flags)


def _run(name: str, options: type, function: Callable[[Any], Any], flags: list[str]) -> None:
    import tyro

    try:
        config = tyro.cli(
            options,
            prog=f"jlora {name}",
            args=with_config_file(options, flags),
            description=(options.__doc__ or "") + "\n\n--config FILE.yaml gives any of these flags; flags win over it.",
        )
        function(config)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if os.environ.get("JLORA_TRACEBACK"):
            raise
        _fail(_advice(error), FAILURE)


def _advice(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return (
            f"out of memory ({text.splitlines()[0][:200]}). Try, in this order: --quantize nf4, a smaller --batch-size with more "
            "--accumulate (same result), a smaller --max-length, --remat layer, --dtype bfloat16, a smaller --rank "
            "or fewer --targets."
        )
    if type(error) in _WRITTEN_FOR_USERS or type(error).__module__.startswith("jlora"):
        return text
    return f"{type(error).__name__}: {text} (set JLORA_TRACEBACK=1 to see where)"


def _fail(message: str, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/] ", end="")
    print(message, file=sys.stderr)
    sys.exit(code)


def _overview(commands: Mapping[str, tuple[type, Any]]) -> Table:
    table = Table(box=None, show_header=False, title="jlora: LoRA for JAX", title_justify="left", pad_edge=False)
    for name, (options, _) in commands.items():
        table.add_row(f"jlora {name}", (options.__doc__ or "").strip().splitlines()[0])
    table.add_row("", "")
    table.add_row("jlora COMMAND --help", "all flags of a command")
    return table


def with_config_file(options: type, flags: list[str]) -> list[str]:
    """Replaces `--config FILE.yaml` by the flags in it, put first so that those of the command line win.

    Raises:
        ValueError: when the file is not a mapping from field names to values.
    """
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else (flag,))]
    if "--config" not in flags:
        return flags
    at = flags.index("--config")
    if at + 1 == len(flags):
        raise ValueError("`--config` needs a file: --config run.yaml.")
    path = Path(flags[at + 1])
    return _flags_of(options, path) + flags[:at] + flags[at + 2 :]


def _flags_of(options: type, path: Path) -> list[str]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {error}") from error
    fields = [f.name for f in dataclasses.fields(options)]
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must map flag names to values; got {type(values).__name__}.")
    flags = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise ValueError(
                f"{str(path)!r} sets {key!r}, which is no flag" + (f"; did you mean {close[0]!r}?" if close else ".")
            )
        if name in positional(options):
            raise ValueError(f"{str(path)!r} sets {key!r}, which is given on the command line, without a flag.")
        flag = name.replace("_", "-")
        if value is None or value == []:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def positional(options: type) -> set[str]:
    """The fields that are given by their place on the command line, without a flag."""
    from tyro.conf import Positional

    (marker,) = Positional[str].__metadata__
    hints = typing.get_type_hints(options, include_extras=True)
    return {name for name, hint in hints.items() if marker in getattr(hint, "__metadata__", ())}
