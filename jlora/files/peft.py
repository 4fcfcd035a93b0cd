"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jlora._typing import Json, JsonObject, Params, PyTree
from jlora.files.adapters import CONFIG, AdapterDirectory, Layout, refuse_mixture, register
from jlora.files.stored import StoredAdapter, lora_modules
from jlora.files.updates import check_config, trained_half, without_residuals
from jlora.lora import AdaptedWeight, FullWeight, LoraConfig, adapted_leaves, add_lora
from jlora.lora.config import ALL_LINEAR, BIASES, INITS, MAX_ALPHA, NAMES
from jlora.lora.targets import without_idle
from jlora.storage import Checkpoint, save_tensors
from jlora.storage.fields import (
    check_fields,
    either,
    flag,
    integer,
    list_of,
    mapping_of,
    one_of,
    optional,
    positive,
    probability,
    shown,
    text,
)
from jlora.storage.whole import whole_files, write_text
from jlora.tree.modules import HEADS, is_embedding, module_path

PREFIX = "base_model.model."
# "ln_f.original_module.bias", "mlp.modules_to_save.default.c_fc.bias"
_WRAPPED_BIAS = re.compile(r"\.(original_module|modules_to_save(\.[^.]+)?)\.(?=(.*\.)?bias$)")


def save_adapter(directory: str | os.PathLike, params: Params, *, config: LoraConfig, base_model: str) -> None:
    """Writes the adapter of `params` so that PEFT loads it. The bytes depend on the arguments alone.

    lora_A [in, r] is stored as PEFT's (r, in), lora_B [r, out] as (out, r), float32; "all-linear" is written as the
    names it stood for, or as whole module paths where `exclude` took some out. A PiSSA adapter is written as the plain
    LoRA of twice the rank that it is on the original base, which every reader takes.

    Args:
        params: adapted parameters, per-layer or stacked, or the adapter half that `split` gave (PiSSA: not the half).
        config: the config they were adapted with.
        base_model: hub id or directory of the base, for `base_model_name_or_path`.

    Raises:
        FileExistsError: when the directory holds an adapter in mlx-lm's layout, or a model.
        ValueError: when `config` is not the one `params` were adapted with, or a factor is not finite.
    """
    refuse_mixture(directory, PEFT)
    check_config(params, config, format=PEFT.name, writer="save_adapter")
    if config.init == "pissa":
        params, config = without_residuals(params, config)
    leaves = adapted_leaves(trained_half(params))
    modules = lora_modules(leaves)
    tensors = {}
    for path, weight in leaves.items():
        for field, (name, transposed) in _stored_as(path, weight, modules).items():
            array = np.asarray(getattr(weight, field), np.float32)
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{field} of {module_path(path)!r} is not finite: training has diverged, and nothing was written. "
                    "Resume from an earlier checkpoint with a lower learning rate."
                )
            tensors[name] = array.T if transposed else array
    fields = to_peft(config) | {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": any(_is_conv1d(m) for m in modules),
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    if config.targets == ALL_LINEAR and config.exclude:
        # Last names would take in what was excluded, and names without it would leave `exclude` nothing to exclude.
        # PEFT takes whole paths whatever their layer.
        fields |= {"target_modules": sorted(modules), "exclude_modules": None, "layers_to_transform": None}
    elif config.targets == ALL_LINEAR:
        fields["target_modules"] = sorted({m.rpartition(".")[2] for m in modules})
    # Fields in order, but patterns as given: their first match wins. (PEFT's own writer sorts them too.)
    ordered = json.dumps({name: fields[name] for name in sorted(fields)}, indent=2)
    with whole_files(Path(directory), last=CONFIG, replace=True) as partial:
        save_tensors(partial / PEFT.weights, tensors)
        write_text(partial / CONFIG, ordered + "\n")


def _is_conv1d(module: str) -> bool:
    """Whether the module is GPT-2's Conv1D, which stores [in, out] as we do."""
    return module.startswith("transformer.h.")


def _stored_as(path: str, weight: AdaptedWeight, modules: set[str]) -> dict[str, tuple[str, bool]]:
    """Trained child of one layer's leaf -> (name in the file, whether it is stored transposed).

    Args:
        modules: those with a low-rank update: PEFT keeps their own parameters under "base_layer".
    """
    module = PREFIX + module_path(path)
    if isinstance(weight, FullWeight):
        layer = f"{module}.base_layer" if module_path(path) in modules else module
        kind = "bias" if path.endswith("/bias") else "weight"
        return {"value": (f"{layer}.{kind}", path.endswith("/kernel") and not _is_conv1d(module_path(path)))}
    if is_embedding(path):
        names = {"lora_A": (f"{module}.lora_embedding_A", True), "lora_B": (f"{module}.lora_embedding_B", True)}
    else:
        names = {"lora_A": (f"{module}.lora_A.weight", True), "lora_B": (f"{module}.lora_B.weight", True)}
    names["magnitude"] = (f"{module}.lora_magnitude_vector", False)
    return {field: name for field, name in names.items() if getattr(weight, field) is not None}


def read_peft_adapter(found: AdapterDirectory, params: Params) -> PyTree:
    """Unadapted parameters with the adapter of a PEFT directory on them; see `jlora.load_adapter`."""
    config, file = from_peft(found.fields), Checkpoint(found.weights)
    living, idle = without_idle(params, config)
    # What is trained is replaced below: the key is of no consequence.
    stored = _PeftAdapter(add_lora(params, living, key=jax.random.key(0)))
    ignorable = [*stored.bases(), *stored.copies(file)]
    return stored.read(file, found.path, ignorable=ignorable, also=stored.other_bases(file), hints=idle)


class _PeftAdapter(StoredAdapter):
    """A PEFT adapter, and what PEFT writes beside it."""

    def stored_as(self, path, weight):
        return _stored_as(path, weight, self.modules)

    def bases(self) -> dict[str, str]:
        """Name -> leaf path of the adapted embeddings and heads: PEFT writes their base too, in case it was resized."""
        paths = {module_path(path): path for path in self.leaves if module_path(path) in self.modules}
        return {
            f"{PREFIX}{module}.base_layer.weight": path
            for module, path in paths.items()
            if is_embedding(path) or module in HEADS
        }

    def copies(self, file: Checkpoint) -> list[str]:
        """Biases of `modules_to_save` that PEFT, with `bias` "all", wrote again from within its wrapper."""
        shapes = self.shapes()
        return [name for name in file.shapes if _WRAPPED_BIAS.search(name) and _WRAPPED_BIAS.sub(".", name) in shapes]

    def other_bases(self, file: Checkpoint) -> list[str]:
        """A line for each stored base that is not the tree's own."""
        lines = []
        for name, path in self.bases().items():
            if name not in file.shapes:
                continue
            ours = np.asarray(self.leaves[path].origin(), np.float32)
            theirs = file.read(name).astype(np.float32)
            theirs = theirs if is_embedding(path) else theirs.T
            # Either may have been rounded to bfloat16 on its way.
            if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= np.abs(ours).max() / 128:
                lines.append(
                    f"other base: {name} {theirs.shape} differs from {path!r} {ours.shape} of these parameters"
                )
        return lines


def from_peft(fields: Mapping[str, Json]) -> LoraConfig:
    """The config that the fields of a PEFT `adapter_config.json` mean; absent fields have PEFT's defaults."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"jlora reads adapters with peft_type 'LORA'; this one is {fields.get('peft_type')!r}.")
    unsupported = {k: fields[k] for k, neutral in _NEUTRAL.items() if k in fields and fields[k] not in neutral}
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init not in INITS:
        unsupported["init_lora_weights"] = init
    if unsupported:
        listed = "\n  ".join(f"{k} = {shown(v)}" for k, v in sorted(unsupported.items()))
        reason = _RANDOM_RESIDUAL if str(init).startswith("pissa_niter_") else ""
        raise ValueError(
            f"This adapter uses PEFT features that jlora does not represent:\n  {listed}\nLoading it without them "
            "would give other outputs. Merge it in PEFT (`model.merge_and_unload()`) and load the merged checkpoint."
            f"{reason}"
        )
    if fields.get("target_modules") is None:
        raise ValueError("adapter_config.json has no `target_modules`; add the list of adapted module names.")
    check_fields(fields, _PEFT, where="adapter_config.json")
    unknown = {k: v for k, v in fields.items() if k not in {*_PEFT, *_NEUTRAL, *_IDLE} and v not in (*_OFF, "")}
    if unknown:
        warnings.warn(
            f"adapter_config.json has {', '.join(f'{k} = {shown(v)}' for k, v in unknown.items())}, which neither jlora "
            "nor PEFT 0.21 knows. It is left out, as PEFT does; if it changes what is computed, the outputs are others.",
            stacklevel=2,
        )
    layers = fields.get("layers_to_transform")
    return LoraConfig(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        targets=_names(fields["target_modules"]),
        dropout=fields.get("lora_dropout", 0.0),
        use_rslora=fields.get("use_rslora") or False,
        use_dora=fields.get("use_dora") or False,
        init=init if isinstance(init, str) else "kaiming",  # pyright: ignore[reportArgumentType]: checked on creation
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        exclude=_names(fields.get("exclude_modules") or ()),
        bias=fields.get("bias") or "none",
        modules_to_save=_names(fields.get("modules_to_save") or ()),
        layers_to_transform=None if layers == [] else layers,  # PEFT reads an empty list as all layers
    )


def to_peft(config: LoraConfig) -> JsonObject:
    """PEFT's fields, as `adapter_config.json` holds them. `target_modules` is as configured; the writer that knows
    the tree replaces "all-linear" by the names it stood for."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": _as_json(config.targets),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "exclude_modules": _as_json(config.exclude) or None,
        "bias": config.bias,
        "modules_to_save": list(config.modules_to_save) or None,
        "layers_to_transform": None if (layers := config.layers()) is None else list(layers),
    }


_PEFT = {
    "peft_type": one_of("LORA"),
    "r": integer(),
    "lora_alpha": positive(MAX_ALPHA),
    "target_modules": NAMES,
    "exclude_modules": optional(NAMES),
    "modules_to_save": optional(NAMES),
    "lora_dropout": probability(),
    "use_rslora": optional(flag()),
    "use_dora": optional(flag()),
    "init_lora_weights": either(flag(), text()),
    "rank_pattern": optional(mapping_of(integer())),
    "alpha_pattern": optional(mapping_of(positive(MAX_ALPHA))),
    "bias": optional(one_of(*BIASES)),
    "layers_to_transform": optional(either(integer(0), list_of(integer(0)))),
    "base_model_name_or_path": optional(text()),
}
"""Fields of PEFT's `adapter_config.json` that are read."""

_IDLE = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "runtime_config"),
    *(
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
    ),
)
"""Fields of PEFT 0.21 that change nothing of a trained adapter."""

# Fields of PEFT 0.21 that change the outputs, with the values under which they do not.
_OFF = (None, False, [], {})
_NEUTRAL = {
    "lora_bias": _OFF,
    "ensure_weight_tying": _OFF,  # here a tied head keeps the base embedding
    "trainable_token_indices": _OFF,
    "target_parameters": _OFF,
    "layer_replication": _OFF,
    "layers_pattern": (*_OFF, "", "layers", "h", ["layers"], ["h"]),  # where the layers of our families are anyway
    "alora_invocation_tokens": _OFF,
    "use_qalora": _OFF,
    "use_bdlora": _OFF,
    "arrow_config": _OFF,
    "kasa_config": _OFF,
    "monteclora_config": _OFF,
    "velora_config": _OFF,
}

_RANDOM_RESIDUAL = (
    " (The base that a 'pissa_niter_N' adapter goes onto is a residual that PEFT takes from a random projection, anew at every "
    "load: only the process that trained it has the right one. Merge there, or write plain LoRA with `save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…)`.)"
)


def _names(value):
    return value if isinstance(value, str) else tuple(value)


def _as_json(value):
    return value if isinstance(value, str) else list(value)


PEFT = register(
    Layout(
        name="PEFT",
        weights="adapter_model.safetensors",
        marks=("peft_type",),
        base="base_model_name_or_path",
        read=read_peft_adapter,
        config=lambda found: from_peft(found.fields),
        module=lambda name: name.removeprefix(PREFIX),
        revision="revision",
        assumed=True,
        legacy=(
            (
                "adapter_model.bin",
                "Convert adapter_model.bin: load it in PEFT and call `save_pretrained(directory)`.",
            ),
        ),
    )
)
