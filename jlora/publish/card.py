"""What goes to a model hub of an adapter, a run or a checkpoint: the files that are known, and a model card."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from jlora._terminal import visible
from jlora._typing import Json
from jlora.files import run_settings
from jlora.files.adapters import CONFIG, open_adapter
from jlora.files.mlx import MLX
from jlora.files.peft import PEFT
from jlora.lora import LoraConfig
from jlora.report.markdown import code, table
from jlora.report.record import RunRecord, in_words
from jlora.storage import Checkpoint
from jlora.storage.checkpoint_files import TERMS, TOKENIZER
from jlora.storage.fields import is_number
from jlora.storage.hub_id import is_hub_id

CARD = "README.md"
CURVE = "loss.png"


class Kind(NamedTuple):
    """What may be published."""

    name: str
    """In words."""
    patterns: tuple[str, ...]
    """The files that go up, where they are there; no others do."""
    metadata: Mapping[str, Json]
    """Of the card."""
    usage: Callable[["Publication", str], Iterator[str]]
    """Lines that say how a repository of this kind is used."""


@dataclasses.dataclass(frozen=True)
class Publication:
    """A directory, or a GGUF file, that can be published."""

    root: Path
    kind: Kind
    run: RunRecord | None
    base: str | None
    """The base model's name as it is written there."""

    def files(self) -> dict[str, Path]:
        """Path in the repository -> file.

        Raises:
            ValueError: when one is a link to what is elsewhere.
        """
        if self.root.is_file():
            return {self.root.name: self.root}
        found = [path for pattern in self.kind.patterns for path in sorted(self.root.glob(pattern))]
        refuse_links(self.root, found)
        return {path.relative_to(self.root).as_posix(): path for path in found if path.is_file()}

    def left_behind(self, files: Iterable[str]) -> list[str]:
        """What lies in the directory, and in its run, and is not among `files`; directories with a slash."""
        if self.root.is_file():
            return []
        beside = list(self.root.iterdir())
        if self.run is not None and self.root.parent == self.run.directory:
            beside += [path for path in self.run.directory.iterdir() if path != self.root]
        taken = {name.split("/")[0] for name in files}
        return sorted(path.name + "/" * path.is_dir() for path in beside if path.name not in taken)


def refuse_links(root: Path, paths: Iterable[Path]) -> None:
    """Raises a ValueError for a file that lies elsewhere: whoever pushes a directory means what is in it."""
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{str(path)!r} is a link out of the directory, to {str(path.resolve())!r}, so nothing was pushed. Put a copy in "
                "its place, or remove it."
            )


def read_publication(directory: str | os.PathLike, *, run: str | os.PathLike | None = None) -> Publication:
    """What is to be published: an adapter directory, a run directory (its adapter), a checkpoint or GGUF models.

    Args:
        run: the run that it came from, for the card; found by itself for a run and its `adapter/`.

    Raises:
        FileNotFoundError: when there is nothing to publish, or a file of it is missing.
        ValueError: when it is damaged.
    """
    root = Path(directory)
    if not root.exists():
        raise FileNotFoundError(
            f"There is no {str(root)!r}. Pass an adapter, a run of `jlora finetune`, or a checkpoint."
        )
    if (root / "config.yaml").is_file() and not (root / CONFIG).is_file():
        run, root = run or root, root / "adapter"
        if not root.is_dir():
            raise FileNotFoundError(f"The run in {str(run)!r} has no adapter yet. Finish it: jlora finetune --resume.")
    elif run is None and root.name == "adapter" and (root.parent / "config.yaml").is_file():
        run = root.parent
    record = None if run is None else RunRecord.read(run)
    if root.suffix == ".gguf" or (root.is_dir() and any(root.glob("*.gguf"))):
        return Publication(root, _GGUF, record, record and record.config.get("model"))
    if (root / CONFIG).is_file():
        found = open_adapter(root)
        LoraConfig.load(root)
        Checkpoint(found.weights)
        return Publication(root, _ADAPTERS[found.layout.name], record, found.base_model)
    if (root / "config.json").is_file():
        Checkpoint(root)  # every shard is there
        return Publication(root, _CHECKPOINT, record, record and record.config.get("model"))
    raise FileNotFoundError(
        f"{str(root)!r} holds nothing to push: no adapter_config.json, no config.yaml of a run, no config.json of a "
        "checkpoint, no .gguf file."
    )


def model_card(
    publication: Publication,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    curve: bool = False,
) -> str:
    """README.md of a repository: YAML front matter, then what it is, how it came to be and how it is used.

    Paths of this machine do not go into it: local data and local bases are called by their last name.

    Args:
        base_model: hub id of the base; default: the one that is written there, if it is one.
        license: SPDX-like id of the hub; none is ever assumed.
        curve: whether `CURVE` lies beside the card.
    """
    run, kind = publication.run, publication.kind
    base = base_model or (publication.base if publication.base and is_hub_id(publication.base) else None)
    quantized = bool(run and run.config.get("quantize"))
    metadata = {
        "base_model": base,
        **{name: value for name, value in kind.metadata.items() if base or name != "base_model_relation"},
        "tags": [*kind.metadata.get("tags", ()), *(["qlora"] if quantized else []), "jlora"],
        "datasets": (run.data_sets or None) if run else None,
        "license": license,
    }
    front = yaml.safe_dump({k: v for k, v in metadata.items() if v}, sort_keys=False, allow_unicode=True)
    local = f"a local checkpoint named {_last_name(publication.base)}" if publication.base else ""
    origin = f"[{base}](https://huggingface.co/{base})" if base else local
    lines = ["---", front.rstrip(), "---", "", f"# {repo.rpartition('/')[2]}", ""]
    lines += [
        f"{kind.name[0].upper()}{kind.name[1:]}{f' of {origin}' if origin else ''}, made with jlora (LoRA for JAX).",
        "",
    ]
    lines += [*_training(run, curve)] if run else [*_settings(publication)]
    lines += ["## Use", "", *kind.usage(dataclasses.replace(publication, base=base or publication.base), repo)]
    return "\n".join(lines).rstrip() + "\n"


def _last_name(name: str | None) -> str:
    return code(Path(name).name) if name else ""


def _training(run: RunRecord, curve: bool) -> Iterator[str]:
    links = [f"[{data}](https://huggingface.co/datasets/{data})" for data in run.data_sets]
    named = run.config.get("data")
    shown = ", ".join(links) or ", ".join(filter(None, map(_last_name, named if isinstance(named, list) else [named])))
    yield from ("## Training", "", f"Data: {shown}" if shown else "", "")
    yield from table(("", ""), ((name, _plain(value)) for name, value in run.hyperparameters))
    if run.losses or run.evaluations:
        yield from table(("loss (nats a token)", "step", "loss", "perplexity"), run.loss_table)
    if curve:
        yield from (f"![training and evaluation loss by step]({CURVE})", "")


def _plain(value: object) -> str:
    """A value in a cell of a table."""
    return str(value) if isinstance(value, bool) or is_number(value) else code(in_words(value)).replace("|", "\\|")


def _settings(publication: Publication) -> Iterator[str]:
    """Of an adapter without a run: what its own config says."""
    if publication.kind not in _ADAPTERS.values():
        return
    fields = LoraConfig.load(publication.root).as_read()
    rows = ((n.replace("_", " "), _plain(v)) for n, v in fields.items() if v not in (None, (), {}, False, "none", 0.0))
    yield from ("## Adapter", "", *table(("", ""), rows))


def _python(*lines: str) -> Iterator[str]:
    yield from ("```python", *lines, "```", "")


def _use_in_jlora(publication: Publication, repo: str) -> Iterator[str]:
    yield from ("With jlora:", "")
    yield from _python(
        "import jlora",
        "from huggingface_hub import snapshot_download",
        "",
        f"model, params = jlora.load({_base(publication)})",
        f'params = jlora.load_adapter(snapshot_download("{repo}"), params)',
    )


def _base(publication: Publication) -> str:
    """The base in a line of code; never the last name of a path alone, which might be another model's on the hub."""
    name = publication.base or "./base"
    return json.dumps(name if is_hub_id(name) else f"path/to/{Path(name).name}")


def _use_peft(publication: Publication, repo: str) -> Iterator[str]:
    yield from ("With PEFT:", "")
    yield from _python(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_base(publication)})",
        f'model = PeftModel.from_pretrained(base, "{repo}")',
        f"tokenizer = AutoTokenizer.from_pretrained({_base(publication)})",
    )
    yield from _use_in_jlora(publication, repo)


def _use_mlx(publication: Publication, repo: str) -> Iterator[str]:
    base = shlex.quote(json.loads(_base(publication)))
    yield from ("With mlx-lm:", "", "```sh", f"hf download {repo} --local-dir adapter")
    yield from (
        f"mlx_lm.generate --model {base} --adapter-path adapter --prompt '…'",
        "```",
        "",
    )
    yield from _use_in_jlora(publication, repo)


def _use_checkpoint(publication: Publication, repo: str) -> Iterator[str]:
    yield from ("With transformers:", "")
    yield from _python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    )
    yield from ("With jlora:", "")
    yield from _python("import jlora", "", f'model, params = jlora.load("{repo}")')


def _use_gguf(publication: Publication, repo: str) -> Iterator[str]:
    yield from ("With llama.cpp:", "", "```sh", f"hf download {repo} --local-dir model")
    for name in publication.files():
        if name.endswith(".gguf"):
            yield f"llama-cli -m {shlex.quote(visible(f'model/{name}'))}"
    yield from ("```", "")


_ADAPTERS: Mapping[str, Kind] = {
    PEFT.name: Kind(
        "LoRA adapter",
        (CONFIG, PEFT.weights, run_settings.FILE, *TOKENIZER),
        {"base_model_relation": "adapter", "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]},
        _use_peft,
    ),
    MLX.name: Kind(
        "LoRA adapter in mlx-lm's layout",
        (CONFIG, MLX.weights, run_settings.FILE, *TOKENIZER),
        {"base_model_relation": "adapter", "library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["lora"]},
        _use_mlx,
    ),
}
_CHECKPOINT = Kind(
    "checkpoint",
    (
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        run_settings.FILE,
        *TOKENIZER,
        *TERMS,
    ),
    {"library_name": "transformers", "pipeline_tag": "text-generation"},
    _use_checkpoint,
)
_GGUF = Kind("GGUF model", ("*.gguf", "Modelfile"), {"pipeline_tag": "text-generation", "tags": ["gguf"]}, _use_gguf)
