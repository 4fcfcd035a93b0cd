"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._modules import describe, layer_paths, module_path
from jlora._tree import flatten, map_with_path
from jlora._typing import Params
from jlora.formats import Checkpoint, save_tensors
from jlora.io.names import mismatches
from jlora.lora import LoraConfig, LoraWeight, adapted_modules, add_lora, remove_lora
from jlora.lora.config import ALL_LINEAR
from jlora.lora.targets import select

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def save_adapter(directory: str | os.PathLike, params: Params, *, config: LoraConfig, base_model: str) -> None:
    """Writes the adapter of `params` so that PEFT loads it. The bytes depend on the arguments alone.

    lora_A [in, r] is stored as PEFT's (r, in), lora_B [r, out] as (out, r), float32; "all-linear" is written as the
    names it stood for, or as whole module paths where `exclude` took some out.

    Args:
        params: adapted parameters, per-layer or stacked, or the adapter half that `split` gave.
        config: the config they were adapted with.
        base_model: hub id or directory of the base, for `base_model_name_or_path`.

    Raises:
        ValueError: when `config` is not the one `params` were adapted with, or a factor is not finite.
    """
    modules = adapted_modules(params)
    _check_config(params, modules, config)
    tensors = {}
    for module, weight in modules.items():
        for name, factor in (("lora_A", weight.lora_A), ("lora_B", weight.lora_B)):
            array = np.asarray(factor, np.float32).T
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{name} of {module!r} is not finite: training has diverged, and nothing was written. Resume from an "
                    "earlier checkpoint with a lower learning rate."
                )
            tensors[f"{PREFIX}{module}.{name}.weight"] = array
    fields = config.to_peft() | {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": any(m.startswith("transformer.h.") for m in modules),  # GPT-2's Conv1D stores [in, out]
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
    }
    if config.targets == ALL_LINEAR and config.exclude:
        # Last names would take in what was excluded, and names without it would leave `exclude` nothing to exclude.
        fields |= {"target_modules": sorted(modules), "exclude_modules": None}
    elif config.targets == ALL_LINEAR:
        fields["target_modules"] = sorted({m.rpartition(".")[2] for m in modules})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / WEIGHTS, tensors)
    # Fields in order, but patterns as given: their first match wins. (PEFT's own writer sorts them too.)
    text = json.dumps({name: fields[name] for name in sorted(fields)}, indent=2)
    (directory / "adapter_config.json").write_text(text + "\n")


def _check_config(params, modules: dict[str, LoraWeight], config: LoraConfig) -> None:
    if not modules:
        raise ValueError("`save_adapter` found no adapter in these parameters. Call `add_lora` and train first.")
    wrong = [
        f"{m}: rank {w.rank}, scaling {w.scaling:g}; the config says rank {config.rank_of(m)}, scaling {config.scaling_of(m):g}"
        for m, w in modules.items()
        if (w.rank, w.scaling) != (config.rank_of(m), config.scaling_of(m))
    ]
    whole = all(leaf is not None for w in modules.values() for leaf in (w.base,))
    if whole:
        meant = set(select(remove_lora(params), config))
        if meant != set(modules):
            wrong.append(f"adapted: {describe(sorted(modules))}; the config targets: {describe(sorted(meant))}")
    if wrong:
        raise ValueError(
            "`config` is not the one these parameters were adapted with, and a reader would scale the adapter by it:\n  "
            + "\n  ".join(wrong[:10])
        )


def load_adapter(directory: str | os.PathLike, params: Params) -> dict[str, Any]:
    """Unadapted parameters with the adapter of a PEFT directory on them.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`, written by `save_adapter` or by PEFT.
        params: unadapted, per-layer or stacked.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for features that are not represented, and for missing, unexpected or mis-shaped tensors, all in
            one error: an adapter that loads in part would silently give other outputs.
    """
    directory = Path(directory)
    config = LoraConfig.load(directory)
    if not (directory / WEIGHTS).is_file():
        legacy = (directory / "adapter_model.bin").is_file()
        raise FileNotFoundError(
            f"There is no {WEIGHTS} in {str(directory)!r}."
            + (" Convert adapter_model.bin: load it in PEFT and call `save_pretrained(directory)`." if legacy else "")
        )
    # The initial factors are replaced below: the key is of no consequence.
    adapted = add_lora(params, config, key=jax.random.key(0))
    expected = {}
    for path, leaf in flatten(adapted).items():
        if isinstance(leaf, LoraWeight):
            rank, d_in, d_out = leaf.rank, leaf.lora_A.shape[-2], leaf.lora_B.shape[-1]
            for p in layer_paths(path, leaf.lora_A):
                expected[f"{PREFIX}{module_path(p)}.lora_A.weight"] = (rank, d_in)
                expected[f"{PREFIX}{module_path(p)}.lora_B.weight"] = (d_out, rank)

    file = Checkpoint(directory / WEIGHTS)
    problems = mismatches(expected, file.shapes)
    if problems:
        raise ValueError(
            f"The adapter in {str(directory)!r} does not fit these parameters:\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded. Check that it was trained on this base model."
        )

    def fill(path, leaf):
        if not isinstance(leaf, LoraWeight):
            return leaf

        def factor(name):
            paths = layer_paths(path, leaf.lora_A)
            rows = [file.read(f"{PREFIX}{module_path(p)}.{name}.weight").astype(np.float32).T for p in paths]
            return jnp.asarray(np.stack(rows) if leaf.lora_A.ndim == 3 else rows[0])

        return dataclasses.replace(leaf, lora_A=factor("lora_A"), lora_B=factor("lora_B"))

    return map_with_path(fill, adapted)


def base_model_of(directory: str | os.PathLike) -> str | None:
    """The base model that an adapter's config names."""
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter_config.json in {os.fspath(directory)!r}.")
    return json.loads(path.read_text()).get("base_model_name_or_path")
