"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._typing import Params, PyTree
from jlora.files.adapters import CONFIG, AdapterDirectory, Layout, refuse_mixture, register
from jlora.files.stored import StoredAdapter
from jlora.files.updates import check_config, trained_half, without_residuals
from jlora.lora import AdaptedWeight, LoraConfig, adapted_leaves, add_lora
from jlora.lora.config import ALL_LINEAR, BIASES, INITS, MAX_ALPHA, NAMES
from jlora.lora.kinds import KINDS, PeftForm, Place, Unwritable, kind_of_peft
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
from jlora.tree.modules import HEADS, is_embedding, modules_of
from jlora.tree.paths import flatten, module_path

PREFIX = "base_model.model."
# "ln_f.original_module.bias", "mlp.modules_to_save.default.c_fc.bias"
_WRAPPED_BIAS = re.compile(r"\.(original_module|modules_to_save(\.[^.]+)?)\.(?=(.*\.)?bias$)")


def save_adapter(directory: str | os.PathLike, params: Params, *, config: LoraConfig, base_model: str) -> None:
    """Writes the adapter of `params` so that PEFT loads it. The bytes depend on the arguments alone.

    Every kind says itself how PEFT writes it: lora_A [in, r] is stored as PEFT's (r, in), lora_B [r, out] as (out, r), all
    float32. (PEFT itself loads LoHa and MiSS onto linear layers alone, and refuses GPT-2's.) "all-linear" is written as the
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
    leaves = check_config(params, config, format=PEFT.name, writer="save_adapter")
    if config.init == "pissa":
        params, config = without_residuals(params, config)
        leaves = adapted_leaves(trained_half(params))
    modules = {module_path(path) for path, weight in leaves.items() if not weight.WHOLE}
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
        "base_model_name_or_path": base_model, "inference_mode": True, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if config.kind == "lora":  # the one kind that PEFT has for layers that store [in, out]
        fields["fan_in_fan_out"] = any(_is_conv1d(m) for m in modules)
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
        modules: those with an update.
    """
    module = module_path(path)
    place = Place(path.rpartition("/")[2], updated=module in modules, stored_in_out=_is_conv1d(module))
    try:
        tensors = weight.peft_tensors(place)
    except Unwritable as error:
        raise ValueError(f"An adapter in PEFT's layout cannot hold {path!r}: {error}.") from None
    return {child: (f"{PREFIX}{module}{suffix}", transposed) for child, (suffix, transposed) in tensors.items()}


def read_peft_adapter(found: AdapterDirectory, params: Params) -> PyTree:
    """Unadapted parameters with the adapter of a PEFT directory on them; see `jlora.load_adapter`."""
    config, file = from_peft(found.fields), Checkpoint(found.weights)
    living, idle = without_idle(modules_of(params), config)
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
        paths = {row.module: row.leaf_path for row in self.rows if not row.leaf.WHOLE}
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
        lines, leaves = [], flatten(self.adapted)
        for name, path in self.bases().items():
            if name not in file.shapes:
                continue
            ours = np.asarray(leaves[path].origin(), np.float32)
            theirs = file.read(name).astype(np.float32)
            theirs = theirs if is_embedding(path) else theirs.T
            # Either may have been rounded to bfloat16 on its way.
            if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= np.abs(ours).max() / 128:
                lines.append(
                    f"other base: {name} {theirs.shape} differs from {path!r} {ours.shape} of these parameters"
                )
        return lines


def from_peft(fields: Mapping[str, Any]) -> LoraConfig:
    """The config that the fields of a PEFT `adapter_config.json` mean; absent fields have PEFT's defaults.

    Raises:
        ValueError: for a `peft_type` that is no kind here, and for features that are not represented, by their PEFT name.
    """
    kind = kind_of_peft(fields.get("peft_type"))
    if kind is None or kind.PEFT is None:
        there = " or ".join(repr(c.PEFT.type) for c in KINDS.values() if c.PEFT is not None)
        raise ValueError(f"jlora reads adapters with peft_type {there}; this one is {fields.get('peft_type')!r}.")
    form = kind.PEFT
    _refuse_unrepresented(fields, {**form.neutral, **_NEUTRAL})
    if fields.get("target_modules") is None:
        raise ValueError("adapter_config.json has no `target_modules`; add the list of adapted module names.")
    names = {**form.fields, **_OF_EVERY_KIND}
    checks = {peft: _FIELDS[name] for name, (peft, _) in names.items()}
    check_fields(fields, checks | {"base_model_name_or_path": optional(text())}, where="adapter_config.json")
    _warn_of_unknown(fields, known_fields(kind), form.training)
    given = {name: _from_json(name, fields.get(peft, default)) for name, (peft, default) in names.items()}
    return LoraConfig(kind=kind.NAME, **given)


def known_fields(kind: type[AdaptedWeight]) -> set[str]:
    """PEFT's fields of a kind that are read, or refused, or change nothing of what is computed."""
    form = kind.PEFT or PeftForm("", {})
    read = {peft for peft, _ in (*form.fields.values(), *_OF_EVERY_KIND.values())}
    return {*read, *form.neutral, *form.idle, *_NEUTRAL, *_IDLE}


def to_peft(config: LoraConfig) -> dict[str, Any]:
    """PEFT's fields, as `adapter_config.json` holds them. `target_modules` is as configured; the writer that knows
    the tree replaces "all-linear" by the names it stood for.

    Raises:
        Unwritable: for a kind that PEFT does not have.
    """
    form = config.weight.PEFT
    if form is None:
        raise Unwritable(f"PEFT's files do not hold adapters of kind {config.kind!r} ({config.weight.__name__})")
    fields = {
        peft: _to_json(name, getattr(config, name)) for name, (peft, _) in {**form.fields, **_OF_EVERY_KIND}.items()
    }
    if not config.tokens:
        fields.pop(_TOKENS, None)  # most adapters have none, and their files are as they were before there were any
    return {"peft_type": form.type} | fields | dict(form.written)


def _refuse_unrepresented(fields: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    unsupported = {k: fields[k] for k, values in neutral.items() if k in fields and fields[k] not in values}
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


def _warn_of_unknown(fields: Mapping[str, Any], known: set[str], training: Iterable[str]) -> None:
    odd = {k: v for k, v in fields.items() if k not in known and v not in (*_OFF, "", 0)}
    idle = {k: v for k, v in odd.items() if k in training}
    unknown = {k: v for k, v in odd.items() if k not in training}
    if idle:
        warnings.warn(
            f"adapter_config.json has {', '.join(f'{k} = {shown(v)}' for k, v in idle.items())}, which changes how PEFT trains and "
            "nothing of what is computed afterwards. jlora has no such thing: it is left out.",
            stacklevel=3,
        )
    if unknown:
        warnings.warn(
            f"adapter_config.json has {', '.join(f'{k} = {shown(v)}' for k, v in unknown.items())}, which neither jlora "
            "nor PEFT 0.21 knows. It is left out, as PEFT does; if it changes what is computed, the outputs are others.",
            stacklevel=3,
        )


def _from_json(name: str, value: Any) -> Any:
    """A field here, from PEFT's value of it, which may be null for the neutral one."""
    if name in ("targets", "exclude", "modules_to_save"):
        return _names(value or ())
    if name == "init":
        return value if isinstance(value, str) else "kaiming"
    if name == _TOKENS:
        return value or ()
    if name == "layers_to_transform":
        return None if value == [] else value  # PEFT reads an empty list as all layers
    neutral = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    return value or neutral[name] if name in neutral else value


def _to_json(name: str, value: Any) -> Any:
    if name == "init":
        return True if value == "kaiming" else value
    if name == "targets":
        return _as_json(value)
    if name in ("exclude", "modules_to_save"):
        return _as_json(value) or None
    if name == _TOKENS:
        plain = {k: list(v) for k, v in value.items()} if isinstance(value, Mapping) else list(value)
        return plain or None
    if name == "layers_to_transform":
        return None if value is None else list(value)
    return dict(value) if isinstance(value, Mapping) else value


_FIELDS = {
    "rank": integer(),
    "alpha": positive(MAX_ALPHA),
    "dropout": probability(),
    "use_rslora": optional(flag()),
    "use_dora": optional(flag()),
    "init": either(flag(), text()),
    "rank_pattern": optional(mapping_of(integer())),
    "alpha_pattern": optional(mapping_of(positive(MAX_ALPHA))),
    "bias": optional(one_of(*BIASES)),
    "targets": NAMES,
    "exclude": optional(NAMES),
    "modules_to_save": optional(NAMES),
    "trainable_token_indices": optional(either(list_of(integer(0)), mapping_of(list_of(integer(0))))),
    "layers_to_transform": optional(either(integer(0), list_of(integer(0)))),
}
"""What PEFT's files may hold of each field here, under whatever name a kind writes it."""

_TOKENS = "trainable_token_indices"
_OF_EVERY_KIND = {
    "targets": ("target_modules", None),
    "exclude": ("exclude_modules", None),
    "modules_to_save": ("modules_to_save", None),
    "layers_to_transform": ("layers_to_transform", None),
}
"""Field here -> (PEFT's field, its default), as in `PeftForm.fields`."""
_OFF = (None, False, [], {})
_IDLE = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "base_model_name_or_path",
)
_NEUTRAL = {
    "layers_pattern": (*_OFF, "", "layers", "h", ["layers"], ["h"])  # where the layers of our families are anyway
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
        children=lambda kind: kind.peft_suffixes(),
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
