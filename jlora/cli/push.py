"""`jlora push`."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from jlora._terminal import console, say
from jlora.data import is_hub_data
from jlora.files import run_settings
from jlora.files.adapters import CONFIG, open_adapter
from jlora.files.run_settings import RunSettings
from jlora.publish.card import CARD, CURVE, Publication, model_card, read_publication, refuse_links
from jlora.publish.hub import push_files
from jlora.report import plot_history
from jlora.storage.hub_id import check_name, is_hub_id
from jlora.storage.whole import Content, size_of

Extra = Literal["metrics", "config", "checkpoints"]

_EXTRAS: Mapping[Extra, tuple[str, ...]] = {
    "metrics": ("metrics.jsonl",),
    "config": ("config.yaml", "run.json"),
    "checkpoints": ("checkpoints/**/*",),
}
"""--include -> files of a run, which do not go up unless they are asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Publish an adapter, a run's adapter or a checkpoint on the Hugging Face hub, with a model card."""

    directory: Positional[Annotated[str, arg(metavar="DIR")]]
    """An adapter directory, a run of `jlora finetune`, a merged or quantized checkpoint, or a GGUF file or directory."""
    repo: Positional[Annotated[str, arg(metavar="REPO")]]
    """Repository such as user/name; it is created if it is not there, and added to if it is."""
    private: bool = False
    """Create it private; one that is there and public is refused."""
    revision: str | None = None
    """Branch to commit to, instead of the default one; created if it is not there."""
    message: str | None = None
    """Of the commit."""
    license: str | None = None
    """License for the model card, such as apache-2.0 or mit; without this flag the card names none."""
    base_model: str | None = None
    """Hub id of the base model, where what is written there is a local path: goes into the card and adapter_config.json."""
    run: str | None = None
    """Run of `jlora finetune` that a checkpoint came from, for the card."""
    include: tuple[Extra, ...] = ()
    """Further files of the run, which hold paths of this machine: metrics, config, checkpoints (with optimizer state)."""
    overwrite_card: bool = False
    """Write the model card anew, also where a README.md is there already or in the repository."""
    dry_run: bool = False
    """Show every file that would go up, and the card, and contact nobody."""


def run(options: Push) -> None:
    check_name(options.repo)
    if options.base_model is not None:
        check_name(options.base_model)
    publication = read_publication(options.directory, run=options.run)
    own_card = publication.root / CARD
    written_here = own_card.is_file() and not options.overwrite_card
    with tempfile.TemporaryDirectory() as scratch:
        files = contents(options, publication, Path(scratch))
        if written_here:
            refuse_links(publication.root, [own_card])
            files[CARD] = own_card
        else:
            files[CARD] = model_card(
                publication, options.repo, base_model=options.base_model, license=options.license, curve=CURVE in files
            ).encode()
        terminal = console(soft_wrap=True)
        terminal.print(_plan(options, files, publication))
        if written_here:
            say(terminal, f"{CARD} is the one in {options.directory}; --overwrite-card writes one from the run")
        if publication.base and not is_hub_id(publication.base) and options.base_model is None:
            said = f"the base model is a local path, {publication.base}: others need --base-model HUB/ID to use this"
            say(terminal, said)
        if options.dry_run:
            card = files[CARD]
            terminal.rule(CARD, align="left")
            say(
                terminal,
                (card if isinstance(card, bytes) else card.read_bytes()).decode(errors="backslashreplace"),
                end="",
            )
            terminal.rule("nothing was sent", align="left")
            return
        pushed = push_files(
            options.repo,
            files,
            message=options.message or f"Upload {publication.kind.name} with jlora",
            private=options.private,
            revision=options.revision,
            # A card that is generated gives way to one that somebody has put there.
            keep=() if options.overwrite_card or written_here else (CARD,),
        )
    say(terminal, "pushed: ", (pushed.url, "bold"))
    if pushed.kept:
        say(terminal, f"{CARD} of the repository was kept; --overwrite-card replaces it")


def contents(options: Push, publication: Publication, scratch: Path) -> dict[str, Content]:
    """Path in the repository -> what goes up, but for the card."""
    files: dict[str, Content] = dict(publication.files())
    if options.base_model is not None and CONFIG in files:
        found = open_adapter(publication.root)
        fields = dict(found.fields) | {found.layout.base: options.base_model}
        files[CONFIG] = (json.dumps(fields, indent=2) + "\n").encode()
    settings = RunSettings.read(publication.root) if run_settings.FILE in files else None
    if settings is not None:  # data of this machine are not told, and raw text always is of this machine
        names = () if settings.template is None else ("data", "eval_data")
        told = {name: value for name in names if (value := getattr(settings, name)) and _is_public(value)}
        settings = dataclasses.replace(settings, **{"data": None, "eval_data": None} | told)
        files[run_settings.FILE] = settings.to_json()
    record = publication.run
    if record is None:
        if options.include:
            raise ValueError(
                "`--include` means files of a run, and there is none. Push the run directory, or give --run."
            )
        return files
    if record.losses:
        plot_history(record.directory / "metrics.jsonl", scratch / CURVE)
        files[CURVE] = scratch / CURVE
    for extra in options.include:
        found = [p for pattern in _EXTRAS[extra] for p in sorted(record.directory.glob(pattern)) if p.is_file()]
        if not found:
            raise FileNotFoundError(f"`--include {extra}`: there are none in {str(record.directory)!r}.")
        refuse_links(record.directory, found)
        files |= {path.relative_to(record.directory).as_posix(): path for path in found}
    return files


def _is_public(data: str | Sequence[str]) -> bool:
    return all(is_hub_data(name) for name in ([data] if isinstance(data, str) else data))


def _plan(options: Push, files: Mapping[str, Content], publication: Publication) -> Table:
    """What goes up, and what stays."""
    where = (
        f"{options.repo}{f' ({options.revision})' if options.revision else ''}{', private' if options.private else ''}"
    )
    table = Table(box=None, pad_edge=False, header_style="dim", title=f"to {where}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("from", style="dim", overflow="fold")
    for name, content in sorted(files.items()):
        source = "written for this" if isinstance(content, bytes) or name == CURVE else str(content)
        table.add_row(name, f"{size_of(content):,}", source)
    table.add_row("total", f"{sum(map(size_of, files.values())):,}", "")
    for name in publication.left_behind(files):
        table.add_row(name, "stays here", "", style="dim")
    return table
