"""LoRA adapters of llama.cpp, one GGUF file each, read: the inverse of `save_gguf_adapter`.

lora_a is stored as (rank, in), lora_b as (out, rank), its rows permuted where the base's are. Every module is scaled by
`adapter.lora.alpha / rank`, its own rank.

Reference: llama.cpp, `src/llama-adapter.cpp` and `convert_lora_to_gguf.py`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora._typing import Params, PyTree
from jlora.files.adapters import AdapterDirectory, Layout, register
from jlora.files.gguf_names import import_gguf, tensor_name, unpermuted_rows
from jlora.files.gguf_read import decoded, read_as
from jlora.files.stored import StoredAdapter, does_not_fit
from jlora.files.updates import kernel_shapes
from jlora.lora import LoraConfig, add_lora
from jlora.lora.config import MAX_ALPHA
from jlora.models import FAMILIES, GGUF_ARCHITECTURES, family_of, model_from_config
from jlora.models.config import MAX_HEADS, MAX_LAYERS
from jlora.storage.fields import check_fields, integer, one_of, positive, shown
from jlora.storage.gguf import GGUFFile
from jlora.tree.modules import modules_of
from jlora.tree.paths import module_path

HEAD_DIM = "attention.key_length"
"""The length of a head, behind the architecture's name: what undoing the order of rows takes. llama.cpp does not read it, nor does
its own converter write it."""

_BLOCK = re.compile(r"blk\.(\d{1,5})\.")
_INSIDE = re.compile(r"(.*\.(?:layers|h)\.)(\d+)\.(.+)")
_FACTOR = re.compile(r"(.+)\.weight\.(lora_[ab])")


class GGUFAdapter:
    """The factors of an adapter file, as "MODULE.lora_a" and "MODULE.lora_b" by the checkpoint's modules; what it holds besides
    has its own name.

    Raises:
        ValueError: when the file is damaged, or is no LoRA adapter of a family that there is.
        ImportError: without the package gguf.
    """

    def __init__(self, path: Path):
        self._gguf, self.file = import_gguf(), GGUFFile(path)
        where, fields = repr(str(path)), self.file.fields
        self.architecture = fields.get("general.architecture")
        if fields.get("general.type") != "adapter":
            raise ValueError(
                f"{where} holds no adapter: its `general.type` is {shown(fields.get('general.type'))}. A model is loaded with "
                "`jlora.load(file)` (--model FILE)."
            )
        if not isinstance(self.architecture, str) or self.architecture not in GGUF_ARCHITECTURES:
            raise ValueError(
                f"{where} is an adapter of the architecture {shown(self.architecture)}; jlora runs {', '.join(GGUF_ARCHITECTURES)}."
            )
        family = GGUF_ARCHITECTURES[self.architecture]
        self._layout = FAMILIES[family].gguf
        head_dim = f"{self.architecture}.{HEAD_DIM}"
        table = {
            "adapter.type": one_of("lora"),
            "adapter.lora.alpha": positive(MAX_ALPHA),
            head_dim: integer(2, MAX_HEADS),
        }
        check_fields(fields, table, where=where, required=("adapter.type", "adapter.lora.alpha"))
        if "adapter.alora.invocation_tokens" in fields:
            raise ValueError(
                f"{where} is an activated LoRA (`adapter.alora.invocation_tokens`), which jlora does not represent."
            )
        self.alpha = float(fields["adapter.lora.alpha"])
        self.head_dim: int | None = fields.get(head_dim)
        """Of the base model, where the file says it or whoever reads it has set it."""
        self._names = dict(self._renamed(family, where))
        tensors = {name: self.file.tensors[stored] for name, stored in self._names.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes: Mapping[str, str] = {name: read_as(self._gguf, tensor.type) for name, tensor in tensors.items()}

    def _renamed(self, family: str, where: str):
        """(name here, name in the file) of each tensor."""
        blocks = [int(match[1]) for name in self.file.tensors if (match := _BLOCK.match(name))]
        depth = 1 + max(blocks, default=0)
        if depth > MAX_LAYERS:
            raise ValueError(f"{where} has factors of layer {depth - 1}; a model has at most {MAX_LAYERS}.")
        fields = {"model_type": family, "num_hidden_layers": depth, "n_layer": depth, "tie_word_embeddings": False}
        model = model_from_config(fields, dtype=jnp.float32)
        modules = {tensor_name(module, model): module for module in kernel_shapes(model)}
        for name in self.file.tensors:
            match = _FACTOR.fullmatch(name)
            known = match is not None and match[1] in modules
            yield (f"{modules[match[1]]}.{match[2]}" if match is not None and known else name), name

    def read(self, name: str) -> np.ndarray:
        """One factor as it is stored, but for its rows, which are the checkpoint's where the head's length is known."""
        array = decoded(self._gguf, self.file, self._names[name])
        if self.head_dim is None or not self.is_permuted(name):
            return array
        return unpermuted_rows(array, self.head_dim)

    def is_permuted(self, name: str) -> bool:
        """Whether the rows of a factor are in llama.cpp's order."""
        return self._layout.rotates_pairs and name.endswith((".q_proj.lora_b", ".k_proj.lora_b"))

    def config(self) -> LoraConfig:
        """The config that the factors are of: those of a file say all but what dropout they were trained with."""
        ranks = {
            name.removesuffix(".lora_a"): shape[0]
            for name, shape in self.shapes.items()
            if name.endswith(".lora_a") and len(shape) == 2
        }
        if not ranks:
            raise ValueError(
                f"{str(self.file.path)!r} holds no `lora_a` of a linear kernel: there is no adapter in it."
            )
        ((rank, _),) = Counter(ranks.values()).most_common(1)
        targets, layers = _targets(ranks)
        return LoraConfig(
            rank=rank,
            alpha=self.alpha,
            targets=targets,
            layers_to_transform=layers,
            rank_pattern={module: own for module, own in ranks.items() if own != rank},
        )


def _targets(modules: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """PEFT's `target_modules` and `layers_to_transform`: paths inside a block where all are adapted alike, else whole ones."""
    inside: dict[int, set[str]] = {}
    for module in modules:
        match = _INSIDE.fullmatch(module)
        if match is None:
            return tuple(modules), None
        inside.setdefault(int(match[2]), set()).add(match[3])
    if len({frozenset(names) for names in inside.values()}) > 1:
        return tuple(modules), None
    return tuple(sorted(next(iter(inside.values())))), tuple(sorted(inside))


class _StoredFactors(StoredAdapter):
    def stored_as(self, path, weight):
        module = module_path(path)
        return {"lora_A": (f"{module}.lora_a", True), "lora_B": (f"{module}.lora_b", True)}


def read_gguf_adapter(found: AdapterDirectory, params: Params) -> PyTree:
    """Unadapted parameters with the adapter of a GGUF file on them; see `jlora.load_adapter`."""
    file = GGUFAdapter(found.path)
    problems = []
    if found.model is not None:
        own = family_of(found.model.config).gguf.architecture
        if own != file.architecture:
            problems.append(f"architecture: {file.architecture!r}, should be {own!r}")
        file.head_dim = found.model.config.kv_shape[1]
    config = file.config()
    there = modules_of(params).kernels
    foreign = [name for name in file.shapes if name.rpartition(".")[0] not in there]
    if foreign or problems:
        raise does_not_fit(
            found.path, [*problems, *(f"unexpected: {name} {file.shapes[name]}" for name in foreign[:20])]
        )
    permuted = [name for name in file.shapes if file.is_permuted(name)]
    if permuted and file.head_dim is None:
        raise ValueError(
            f"{str(found.path)!r} does not say how long a head of its base model is, which the order of the rows of "
            f"{permuted[0]!r} depends on. Pass the model: `jlora.load_adapter(file, params, model=model)`."
        )
    wrong = [
        f"shape: {name} is {file.shapes[name]}, whose rows do not divide into heads of {file.head_dim}"
        for name in permuted
        if file.head_dim is not None and file.shapes[name][0] % file.head_dim
    ]
    # What is trained is replaced below: the key is of no consequence.
    stored = _StoredFactors(add_lora(params, config, key=jax.random.key(0)))
    return stored.read(file, found.path, also=wrong)


GGUF = register(
    Layout(
        name="GGUF",
        weights="",
        marks=(),
        base="base_model",
        read=read_gguf_adapter,
        config=lambda found: GGUFAdapter(found.path).config(),
        module=lambda name: name,
        children=lambda kind: {".lora_a": "lora_A", ".lora_b": "lora_B"},
        open=GGUFAdapter,
        is_file=True,
    )
)
