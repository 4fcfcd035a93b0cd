"""`jlora inspect`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from jlora._terminal import console, say
from jlora.cli.as_trained import as_trained, note
from jlora.cli.base import OF_DATA, EvaluationData, Split, Weights, open_data, resolve_model
from jlora.data import lay_out, preview, summary
from jlora.files import find, load_tokenizer, read_config, untrained_tokens
from jlora.files.adapters import adapter_directories, open_adapter, update_tensors
from jlora.files.peft import PEFT, PREFIX, to_peft
from jlora.files.run_settings import RunSettings
from jlora.files.untrained import HEAD
from jlora.lora import LoraConfig
from jlora.models import Model, abstract_params, model_from_config
from jlora.storage.gguf import GGUFFile, is_gguf
from jlora.tree.modules import modules_of
from jlora.tree.paths import flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(EvaluationData, Weights):
    """Look before training: rendered data with its supervised tokens, a model's targets, an adapter's norms."""

    path: Positional[Annotated[str | None, arg(metavar="PATH")]] = None
    """An adapter or a model: short for --adapter or --model, whichever it is."""
    split: Split = "all"  # pyright: ignore[reportIncompatibleVariableOverride]
    """all, train or validation."""
    rows: int = 3
    """Rows of the data to show."""


def run(options: Inspect) -> None:
    terminal = console()
    options = _resolved(options)
    if options.adapter is not None:
        for directory in adapter_directories(options.adapter).values() or (options.adapter,):
            terminal.print(adapter_table(str(directory)))
    if options.data is not None:
        options, trained = as_trained(options, *OF_DATA[1:])
        show_data(options, terminal, trained)
    elif options.adapter is None:
        terminal.print(kernel_table(resolve_model(options)))


def _resolved(options: Inspect) -> Inspect:
    """The same with `path` in its place."""
    if options.path is None:
        return options
    field = "adapter" if _is_adapter(options.path) else "model"
    if getattr(options, field) is not None:
        raise ValueError(
            f"{options.path!r} and --{field} {getattr(options, field)} both say which {field} to look at. Give one of them."
        )
    return dataclasses.replace(options, **{field: options.path, "path": None})


def _is_adapter(path: str) -> bool:
    if is_gguf(Path(path)):
        return GGUFFile(path).fields.get("general.type") == "adapter"
    return bool(adapter_directories(path))


def show_data(options: Inspect, terminal: Console, trained: RunSettings | None = None) -> None:
    name = resolve_model(options)
    model = model_from_config(read_config(find(name)), dtype=jnp.float32)
    tokenizer = load_tokenizer(name)
    with open_data(options, tokenizer, model, trained) as data:
        counts = summary(data)
        layout = lay_out(data, batch_size=options.batch_size, widest=model.config.max_length)
        used, learned = data.tokens()
        said = untrained_tokens(
            find(name), model, tokenizer, used=used, learned=learned, trained=_trained(options.adapter, model)
        )
        if said is not None:
            note(said)
        for number, runs in enumerate(preview(data, tokenizer, rows=options.rows), start=1):
            terminal.rule(f"row {number} of {counts['rows']}", align="left", style="dim")
            say(terminal, *((text, "bold green underline" if on else "dim") for text, on in runs))
    terminal.rule(style="dim")
    table = Table(box=None, show_header=False, pad_edge=False)
    for field, value in counts.items():
        if isinstance(value, tuple):
            value = ", ".join(value[:5]) + (" …" if len(value) > 5 else "")
            if not value:
                continue
        shown = f"{value:.1%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        table.add_row(field.replace("_", " "), shown)
    if data.stats.formats:
        table.add_row("formats", ", ".join(f"{name} ({count:,} records)" for name, count in data.stats.formats))
    table.add_row("a batch", str(layout))
    terminal.print(table)
    say(
        terminal,
        ("green", "bold green underline"),
        ": supervised (the loss is on these tokens); ",
        ("dim", "dim"),
        ": context only",
    )


def _trained(adapter: str | None, model: Model) -> set[str]:
    """Which of the embedding and the head an adapter changes, by their paths."""
    if adapter is None:
        return set()
    paths = adapter_directories(adapter).values() or (adapter,)
    files = [open_adapter(path).tensors for path in paths]
    names = [f".{name}." for file in files for name in file.shapes]
    return {
        path
        for path in (model.config.embedding_path, HEAD)
        if any(f".{path.split('/')[-2]}." in name for name in names)
    }


def kernel_table(name: str) -> Table:
    """The linear kernels that `--targets` can name."""
    model = model_from_config(read_config(find(name)), dtype=jnp.float32)
    tree = abstract_params(model)
    leaves = flatten(tree)
    groups: dict[str, list[tuple[int, ...]]] = {}
    for module, path in modules_of(tree).kernels.items():
        tail = ".".join(part for part in module.split(".")[-2:] if not part.isdigit())
        groups.setdefault(tail, []).append(leaves[path].shape)
    table = Table(box=None, pad_edge=False, header_style="dim", title=f"{name}: linear kernels", title_justify="left")
    for title in ("target", "kernel [in, out]", "layers"):
        table.add_column(title)
    for tail, shapes in groups.items():
        table.add_row(tail, " x ".join(map(str, shapes[0])), str(len(shapes)))
    return table


def adapter_table(directory: str) -> Table:
    """An adapter's config, and for each update the norm of the factor that is zero at first: 0 where nothing was learned."""
    found, config = open_adapter(directory), LoraConfig.load(directory)
    fields = {k: v for k, v in to_peft(config).items() if v not in (None, {}, [], False)}
    title = f"{directory} ({found.layout.name}): base {found.base_model}\n{json.dumps(fields)}"
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    kind = config.weight
    needed = [child for child in kind.TRAINED if child not in kind.OPTIONAL]
    for column in ("module", "rank", "scaling", f"norm of {needed[-1].removeprefix('lora_')}"):
        table.add_column(column)
    file = found.tensors
    updates = update_tensors(found.layout, sorted(file.shapes), kind)
    for module, tensors in updates.items():
        norms = {c: float(np.linalg.norm(file.read(tensors[c]).astype(np.float32))) for c in needed if c in tensors}
        # An update is zero when one of its factors is. PEFT's embeddings start with the other one at zero.
        last = needed[0] if any("lora_embedding" in tensor for tensor in tensors.values()) else needed[-1]
        shown = f"{norms[last]:.4f}" if last in norms and all(norms.values()) else "0 (untrained)"
        shown = shown if all(map(math.isfinite, norms.values())) else "not finite"
        missing = [child for child in needed if child not in norms]
        shown = f"{missing[0]} is missing" if missing else shown
        table.add_row(module, str(config.rank_of(module)), f"{config.scaling_of(module):g}", shown)
    read = {tensor for tensors in updates.values() for tensor in tensors.values()}
    for name in sorted(file.shapes):
        # The original of an adapted embedding, which PEFT writes too, is not trained.
        if found.layout == PEFT and name not in read and not name.endswith(".base_layer.weight"):
            table.add_row(name.removeprefix(PREFIX), "whole", "", "")
    return table
