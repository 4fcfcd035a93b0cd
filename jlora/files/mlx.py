"""Adapters on disk in mlx-lm's layout: `adapter_config.json` and `adapters.safetensors`.

lora_a [in, rank] and lora_b [rank, out] are stored as we hold them, DoRA's magnitude as `m`. One rank and one scale are
for all modules. GPT-2's modules are called "model.h.…" there.

Reference: mlx-lm, `mlx_lm/tuner/utils.py` (`linear_to_lora_layers`, `load_adapters`), `mlx_lm/tuner/lora.py` and `dora.py`.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from jlora._typing import Json, JsonObject, Params, PyTree
from jlora.files.adapters import CONFIG, AdapterDirectory, Layout, refuse_mixture, register
from jlora.files.finite import refuse_not_finite
from jlora.files.names import check_shapes
from jlora.files.stored import StoredAdapter, does_not_fit
from jlora.files.updates import PlainUpdates, kernel_shapes, plain_updates
from jlora.lora import LoraConfig, LoraWeight, add_lora
from jlora.models import Model
from jlora.storage import Checkpoint, save_tensors
from jlora.storage.fields import MAX_SIZE, is_integer, list_of, positive, probability, shown, text
from jlora.storage.whole import whole_files, write_text
from jlora.tree.modules import HEADS, modules_of, nearest
from jlora.tree.paths import module_path

SUFFIXES: Mapping[str, str] = {"lora_A": "lora_a", "lora_B": "lora_b", "magnitude": "m"}
"""Trained child -> what follows the module's path and a dot."""

_KINDS: Mapping[str, bool] = {"lora": False, "dora": True}
"""`fine_tune_type` -> whether it is DoRA."""

_PARAMETERS = ("rank", "scale", "dropout", "keys", "alpha")
"""What `lora_parameters` may hold. `alpha` is left over from early versions; mlx-lm never reads it."""

_BLOCK = re.compile(r"(?:.*?\.)?(?:layers|h)\.(\d+)\.(.+)")


def mlx_module(module: str) -> str:
    """A checkpoint's module path as mlx-lm's: GPT-2's "transformer" is called "model" there.

    >>> mlx_module("transformer.h.3.attn.c_attn"), mlx_module("lm_head")
    ('model.h.3.attn.c_attn', 'lm_head')
    """
    return re.sub(r"^transformer\.", "model.", module)


def checkpoint_module(module: str) -> str:
    """The inverse of `mlx_module`.

    >>> checkpoint_module("model.h.3.attn.c_attn"), checkpoint_module("model.layers.3.mlp.up_proj")
    ('transformer.h.3.attn.c_attn', 'model.layers.3.mlp.up_proj')
    """
    return re.sub(r"^model\.(?=(h|wte|wpe|ln_f)(\.|$))", "transformer.", module)


def split_block(module: str) -> tuple[int, str] | None:
    """(number of the block, path inside it), or None outside the blocks.

    >>> split_block("model.layers.3.mlp.up_proj"), split_block("lm_head")
    ((3, 'mlp.up_proj'), None)
    """
    match = _BLOCK.fullmatch(module)
    return None if match is None else (int(match[1]), match[2])


def updated_modules(tensors: Iterable[str]) -> list[str]:
    """mlx-lm's paths of the modules with a `lora_a`, in the order of their names."""
    return sorted(name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlxConfig:
    """The fields of mlx-lm's `adapter_config.json` that its loader reads."""

    rank: int
    scale: float
    """The update is multiplied by it: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    dropout: float
    use_dora: bool
    num_layers: int
    """Relative keys mean the last so many blocks; 0 or less: all."""
    keys: tuple[str, ...] | None
    """Paths inside a block, or whole paths from the model's root; None: every linear layer of the blocks."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Json]) -> "MlxConfig":
        """Reads the fields of an `adapter_config.json`; those of the training run (data, iterations, …) are left alone.

        Raises:
            ValueError: for what is missing, out of range or not represented, all in one error, by mlx-lm's names.
        """
        problems = list(_problems(fields))
        if problems:
            raise ValueError(
                "This adapter_config.json is not one of mlx-lm's that jlora can read:\n  " + "\n  ".join(problems)
            )
        parameters = fields["lora_parameters"]
        keys = parameters.get("keys")
        return cls(
            rank=parameters["rank"],
            scale=float(parameters["scale"]),
            dropout=float(parameters["dropout"]),
            use_dora=_KINDS[fields.get("fine_tune_type", "lora")],
            num_layers=fields["num_layers"],
            keys=None if keys is None else tuple(keys),
        )

    def to_json(self) -> JsonObject:
        """The fields, as mlx-lm's loader reads them."""
        return {
            "fine_tune_type": next(kind for kind, is_dora in _KINDS.items() if is_dora == self.use_dora),
            "num_layers": self.num_layers,
            "lora_parameters": {
                "rank": self.rank,
                "scale": self.scale,
                "dropout": self.dropout,
                "keys": None if self.keys is None else list(self.keys),
            },
        }

    @property
    def alpha(self) -> float:
        """The alpha that gives `scale`: without the rounding of a division where that gives it too (16, not 15.999999999999998)."""
        short = float(f"{self.scale * self.rank:.12g}")
        return short if short / self.rank == self.scale else self.scale * self.rank

    def means(self, module: str, depth: int) -> bool:
        """Whether a linear layer of a model with `depth` blocks is adapted; `module` is its path in mlx-lm."""
        place = split_block(module)
        if self.keys is not None and module in self.keys:
            return True
        return (
            place is not None
            and (self.num_layers <= 0 or place[0] >= depth - self.num_layers)
            and (self.keys is None or place[1] in self.keys)
        )

    def targets(self, modules: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
        """PEFT's `target_modules` and `layers_to_transform` for adapted modules (mlx-lm's paths): the paths inside a block
        where the config has these, else whole paths of the checkpoint."""
        inside, whole, blocks = set(), set(), set()
        for module in modules:
            place = split_block(module)
            if place is None or (self.keys is not None and module in self.keys):
                whole.add(checkpoint_module(module))
            else:
                blocks.add(place[0])
                inside.add(place[1])
        # The blocks are the model's last: with the first one among them they are all.
        return (*sorted(inside), *sorted(whole)), None if 0 in blocks or not blocks else tuple(sorted(blocks))

    @staticmethod
    def placed(modules: Iterable[str], depth: int) -> tuple[int, tuple[str, ...]]:
        """(`num_layers`, `keys`) that mean these modules (mlx-lm's paths) of a model with `depth` blocks, and no others.

        Paths inside a block where the last blocks are adapted alike, else whole paths, which mlx-lm finds in any block.
        """
        modules = list(modules)
        blocks: dict[int, set[str]] = {}
        outside = []
        for module in modules:
            place = split_block(module)
            if place is None:
                outside.append(module)
            else:
                blocks.setdefault(place[0], set()).add(place[1])
        alike = len({frozenset(inside) for inside in blocks.values()}) == 1
        if alike and sorted(blocks) == list(range(depth - len(blocks), depth)):
            return len(blocks), (*sorted(next(iter(blocks.values()))), *sorted(outside))
        return depth, tuple(sorted(modules))


def _problems(fields: Mapping[str, Json]):
    kind = fields.get("fine_tune_type", "lora")
    if not isinstance(kind, str) or kind not in _KINDS:
        yield (
            f"fine_tune_type = {shown(kind)}; jlora reads 'lora' and 'dora'."
            + (" 'full' is a whole model: fuse it (`mlx_lm.fuse`) and load the checkpoint." if kind == "full" else "")
        )
        return
    layers = fields.get("num_layers")
    if not is_integer(layers) or abs(layers) > MAX_SIZE:
        renamed = " Early versions called it `lora_layers`: rename it." if "lora_layers" in fields else ""
        yield f"num_layers must be a number of blocks, -1 for all; got {shown(layers)}.{renamed}"
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        yield f"lora_parameters must be an object with rank, scale, dropout and keys; got {shown(parameters)}."
        return
    rank, scale, dropout, keys = (parameters.get(name) for name in ("rank", "scale", "dropout", "keys"))
    if not is_integer(rank) or not 1 <= rank <= MAX_SIZE:
        yield f"lora_parameters.rank must be an integer of at least 1; got {shown(rank)}."
    if not positive().holds(scale):
        yield f"lora_parameters.scale must be a positive number; got {shown(scale)}."
    if not probability().holds(dropout):
        yield f"lora_parameters.dropout must be in [0, 1); got {shown(dropout)}."
    if keys is not None and not (list_of(text(), least=1).holds(keys)):
        yield f"lora_parameters.keys must be a list of module paths, or null for every linear layer; got {shown(keys)}."
    unknown = sorted(set(parameters) - set(_PARAMETERS))
    if unknown:
        yield f"lora_parameters has {', '.join(unknown)}, which jlora does not represent."


def save_mlx_adapter(
    directory: str | os.PathLike, params: Params, *, config: LoraConfig, model: Model, base_model: str | None = None
) -> None:
    """Writes the adapter of `params` so that mlx-lm loads it (`mlx_lm.generate --model BASE --adapter-path DIRECTORY`).

    mlx-lm has one rank and one scale for all modules, so where a config has patterns, factors of a lower rank are padded
    with zeros and lora_b takes up the ratio of the scalings. Layers that are not the model's last are named by whole
    paths. A PiSSA adapter is written as the plain LoRA of twice the rank that it is on the original base.

    The base is the same checkpoint: as it is, or converted by `mlx_lm.convert`. Where the adapter was trained on an NF4
    base, mlx-lm has none of these: `mlx_lm.convert -q` rounds to affine groups of 64, not to NF4, and so differently
    from what the adapter made up for; the dense checkpoint is the nearer base. Of GPT-2 mlx-lm reads only checkpoints
    with the hub's names ("h.0.attn.c_attn.weight", no "transformer." before it).

    Args:
        params: adapted parameters, per-layer or stacked, or the adapter half that `split` gave (PiSSA: not the half).
        config: the config they were adapted with.
        model: the base model.
        base_model: hub id or directory of the base, for the config's `model`; mlx-lm itself takes it from the command.

    Raises:
        FileExistsError: when the directory holds an adapter in PEFT's layout, or a model.
        ValueError: when nothing is adapted, `config` is not the one the parameters were adapted with, a factor is not
            finite, or the adapter has what mlx-lm's do not represent: biases or modules trained whole, DoRA on an embedding,
            an adapted embedding that is also the output head. Nothing is written then.
    """
    refuse_mixture(directory, MLX)
    updates = plain_updates(params, config, format=MLX.name, writer="save_mlx_adapter")
    _check(model, updates)
    modules = updates.modules
    rank = max(weight.rank for weight in modules.values())
    # The scale of most modules, so that most lora_b stay as they are.
    ((scale, _),) = Counter(weight.scaling for weight in modules.values()).most_common(1)
    tensors = {}
    for module, weight in modules.items():
        for suffix, array in _folded(weight, rank, scale).items():
            name = f"{mlx_module(module)}.{suffix}"
            refuse_not_finite(name, array)
            tensors[name] = array
    num_layers, keys = MlxConfig.placed(map(mlx_module, modules), model.config.depth)
    fields = MlxConfig(
        rank=rank,
        scale=scale,
        dropout=max(weight.dropout for weight in modules.values()),
        use_dora=updates.config.use_dora,
        num_layers=num_layers,
        keys=keys,
    ).to_json()
    fields |= {MLX.base: base_model} if base_model else {}
    with whole_files(Path(directory), last=CONFIG, replace=True) as partial:
        save_tensors(partial / MLX.weights, tensors)
        write_text(partial / CONFIG, json.dumps(fields, indent=4, sort_keys=True) + "\n")


def _folded(weight: LoraWeight, rank: int, scale: float) -> dict[str, np.ndarray]:
    """Suffix -> float32 array of one module, its factors padded to `rank` and lora_b multiplied by scaling / scale."""
    a, b = (np.asarray(factor, np.float32) for factor in (weight.lora_A, weight.lora_B))
    missing = rank - weight.rank
    arrays = {
        SUFFIXES["lora_A"]: np.pad(a, ((0, 0), (0, missing))),
        SUFFIXES["lora_B"]: np.pad(b * np.float32(weight.scaling / scale), ((0, missing), (0, 0))),
    }
    if weight.magnitude is not None:
        arrays[SUFFIXES["magnitude"]] = np.asarray(weight.magnitude, np.float32)
    return arrays


def _check(model: Model, updates: PlainUpdates) -> None:
    """Refuses what mlx-lm's adapters do not represent."""
    modules = updates.modules
    problems = [f"{name}: not a low-rank update" for name in (*updates.whole, *updates.nested)]
    embeddings = kernel_shapes(model, ("embedding",))
    shapes = kernel_shapes(model) | embeddings
    problems += [f"{module}: not a module of this model" for module in modules if module not in shapes]
    dora = any(weight.magnitude is not None for weight in modules.values())
    tied = model.config.tie_word_embeddings
    problems += _embedding_problems([m for m in modules if m in embeddings], dora=dora, tied=tied)
    if problems:
        raise ValueError(
            "An mlx-lm adapter holds low-rank updates of linear layers and embeddings, and does not represent:\n  "
            + "\n  ".join(problems[:10])
            + "\nWrite the merged model with `save_pretrained`, which mlx-lm loads."
        )
    check_shapes(updates.shapes, shapes)


def _embedding_problems(embeddings: list[str], *, dora: bool, tied: bool) -> Iterator[str]:
    for module in embeddings:
        if dora:
            yield f"{module}: DoRA on an embedding (mlx-lm scales its rows, one a token; PEFT and jlora its columns)"
        elif tied and not module.endswith("wpe"):
            yield f"{module}: an embedding that is also the output head (mlx-lm adapts the head with it; PEFT and jlora do not)"


def read_mlx_adapter(found: AdapterDirectory, params: Params) -> PyTree:
    """Unadapted parameters with the adapter of an mlx-lm directory on them; see `jlora.load_adapter`."""
    config, file = MlxConfig.from_json(found.fields), Checkpoint(found.weights)
    there = modules_of(params)
    embeddings = there.embeddings
    # Without keys mlx-lm means linear layers; embeddings are adapted when they are named.
    adaptable = {**there.kernels, **({} if config.keys is None else embeddings)}
    here = {mlx_module(module): module for module in adaptable}
    depth = 1 + max((place[0] for name in here if (place := split_block(name))), default=-1)
    meant = [module for name, module in here.items() if config.means(name, depth)]
    tied = not any(name.rpartition(".")[2] in HEADS for name in here)
    idle = list(_dead_keys(config, here))
    problems = list(_embedding_problems([m for m in meant if m in embeddings], dora=config.use_dora, tied=tied))
    if not meant:
        # Nothing to compare tensors with.
        raise does_not_fit(found.path, [*problems, *idle] or ["none of its modules is here"])
    lora = LoraConfig(
        rank=config.rank, alpha=config.alpha, targets=meant, dropout=config.dropout, use_dora=config.use_dora
    )
    # What is trained is replaced below: the key is of no consequence.
    return _MlxAdapter(add_lora(params, lora, key=jax.random.key(0))).read(file, found.path, also=problems, hints=idle)


def _dead_keys(config: MlxConfig, modules: Mapping[str, str]) -> Iterator[str]:
    """A line for each key that names no module, which mlx-lm passes over."""
    there = set(modules) | {place[1] for name in modules if (place := split_block(name))}
    for key in config.keys or ():
        if key not in there:
            yield f"key: {key!r} in lora_parameters.keys names no module.{nearest(key, modules)}"


class _MlxAdapter(StoredAdapter):
    """An mlx-lm adapter."""

    def stored_as(self, path, weight):
        module = mlx_module(module_path(path))
        names = {field: (f"{module}.{suffix}", False) for field, suffix in SUFFIXES.items()}
        return {field: name for field, name in names.items() if getattr(weight, field) is not None}


def from_mlx(fields: Mapping[str, Json], tensors: Iterable[str]) -> LoraConfig:
    """The config that the fields of an mlx-lm `adapter_config.json` and the names of the adapter's tensors mean.

    The fields name modules by the number of blocks from the end, so what they mean is read from the names.
    """
    config = MlxConfig.from_json(fields)
    targets, layers = config.targets(updated_modules(tensors))
    if not targets:
        raise ValueError(f"{MLX.weights} holds no `lora_a`: there is no adapter in it. Write or download it again.")
    return LoraConfig(
        rank=config.rank,
        alpha=config.alpha,
        targets=targets,
        dropout=config.dropout,
        use_dora=config.use_dora,
        layers_to_transform=layers,
    )


MLX = register(
    Layout(
        name="mlx-lm",
        weights="adapters.safetensors",
        marks=("fine_tune_type", "lora_parameters"),
        base="model",
        read=read_mlx_adapter,
        config=lambda found: from_mlx(found.fields, Checkpoint(found.weights).shapes),
        children=lambda kind: {f".{suffix}": child for child, suffix in SUFFIXES.items()},
        module=checkpoint_module,
    )
)
