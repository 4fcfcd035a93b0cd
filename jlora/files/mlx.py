"""Adapters on disk in mlx-lm's layout: `adapter_config.json` and `adapters.safetensors`.

lora_a [in, rank] and lora_b [rank, out] are stored as we hold them, DoRA's magnitude as `m`. One rank and one scale are
for all modules. GPT-2's modules are called "model.h.…" there.

Reference: mlx-lm, `mlx_lm/tuner/utils.py`, `lora.py`, `dora.py`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._typing import Params
from jlora.files.peft import check_config, without_residuals
from jlora.files.stored import StoredAdapter, misfit
from jlora.files.updates import check_shapes, kernel_shapes, more_than_updates, plain_updates
from jlora.lora import LoraConfig, LoraWeight, adapted_modules, add_lora
from jlora.models import Model
from jlora.storage import Checkpoint, save_tensors
from jlora.storage.adapters import CONFIG, MLX, AdapterDirectory, refuse_mixture
from jlora.storage.mlx import SUFFIXES, MlxConfig, mlx_module, split_block
from jlora.storage.whole import whole_files, write_text
from jlora.tree.modules import HEADS, embedding_tables, linear_kernels, module_path, nearest


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
    check_config(params, config)
    if config.init == "pissa":
        params, config = without_residuals(params, config)
    modules = plain_updates(adapted_modules(params))
    _check(model, params, modules)
    rank = max(weight.rank for weight in modules.values())
    # The scale of most modules, so that most lora_b stay as they are.
    ((scale, _),) = Counter(weight.scaling for weight in modules.values()).most_common(1)
    tensors = {}
    for module, weight in modules.items():
        for suffix, array in _folded(weight, rank, scale).items():
            name = f"{mlx_module(module)}.{suffix}"
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{name!r} is not finite: training has diverged, and nothing was written. Export an earlier checkpoint."
                )
            tensors[name] = array
    num_layers, keys = MlxConfig.placed(map(mlx_module, modules), model.config.depth)
    fields = MlxConfig(
        rank=rank,
        scale=scale,
        dropout=max(weight.dropout for weight in modules.values()),
        use_dora=config.use_dora,
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


def _check(model: Model, params: Params, modules: Mapping[str, LoraWeight]) -> None:
    """Refuses what mlx-lm's adapters do not represent."""
    problems = [
        f"{name}: not a low-rank update" for name in dict.fromkeys(more_than_updates(params, modules, dora=True))
    ]
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
    check_shapes(modules, shapes)


def _embedding_problems(embeddings: list[str], *, dora: bool, tied: bool) -> Iterator[str]:
    for module in embeddings:
        if dora:
            yield f"{module}: DoRA on an embedding (mlx-lm scales its rows, one a token; PEFT and jlora its columns)"
        elif tied and not module.endswith("wpe"):
            yield f"{module}: an embedding that is also the output head (mlx-lm adapts the head with it; PEFT and jlora do not)"


def read_mlx_adapter(found: AdapterDirectory, params: Params) -> dict[str, Any]:
    """Unadapted parameters with the adapter of an mlx-lm directory on them; see `jlora.load_adapter`."""
    config, file = MlxConfig.from_json(found.fields), Checkpoint(found.weights)
    embeddings = embedding_tables(params)
    # Without keys mlx-lm means linear layers; embeddings are adapted when they are named.
    adaptable = linear_kernels(params) | ({} if config.keys is None else embeddings)
    here = {mlx_module(module): module for module in adaptable}
    depth = 1 + max((place[0] for name in here if (place := split_block(name))), default=-1)
    meant = [module for name, module in here.items() if config.means(name, depth)]
    tied = not any(name.rpartition(".")[2] in HEADS for name in here)
    idle = list(_dead_keys(config, here))
    problems = list(_embedding_problems([m for m in meant if m in embeddings], dora=config.use_dora, tied=tied))
    if not meant:
        # Nothing to compare tensors with.
        raise misfit(found.path, [*problems, *idle] or ["none of its modules is here"])
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
