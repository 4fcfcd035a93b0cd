"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._typing import Params
from jlora.files.stored import StoredAdapter
from jlora.lora import AdaptedWeight, LoraConfig, adapted_leaves, add_lora, map_adapted, remove_lora
from jlora.lora.config import ALL_LINEAR
from jlora.lora.kinds import Place, Unwritable
from jlora.lora.targets import select, select_whole, without_idle
from jlora.storage import Checkpoint, save_tensors
from jlora.storage.adapters import CONFIG, PEFT, AdapterDirectory, refuse_mixture
from jlora.storage.whole import whole_files, write_text
from jlora.tree.modules import HEADS, describe, is_embedding, module_path
from jlora.tree.paths import flatten
from jlora.weight import is_adapted
from jlora.weight.roles import LINEAR

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
    check_config(params, config)
    if config.init == "pissa":
        params, config = without_residuals(params, config)
    leaves = adapted_leaves(_trained_half(params))
    modules = _updated(leaves)
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
    fields = config.to_peft() | {
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
    text = json.dumps({name: fields[name] for name in sorted(fields)}, indent=2)
    with whole_files(Path(directory), last=CONFIG, replace=True) as partial:
        save_tensors(partial / PEFT.weights, tensors)
        write_text(partial / CONFIG, text + "\n")


def without_residuals(params: Params, config: LoraConfig) -> tuple[Any, LoraConfig]:
    """PiSSA as plain LoRA on the original base; with the rank, alpha grows so that the scaling stays."""

    def one(weight):
        if weight.WHOLE:
            return weight
        if weight.base is None:
            raise ValueError(
                "A PiSSA adapter is written as an update of the original base, which the adapter half of `split` does not "
                "have. Pass `combine(adapter, base)`."
            )
        return weight.without_residual()

    growth = math.sqrt(2) if config.use_rslora else 2
    plain = dataclasses.replace(
        config,
        init="kaiming",
        rank=2 * config.rank,
        alpha=growth * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return map_adapted(one, params), plain


def _trained_half(params: Params) -> Any:
    return map_adapted(lambda w: w.adapter_half(), params, lambda leaf: None)


def _updated(leaves: Mapping[str, AdaptedWeight]) -> dict[str, AdaptedWeight]:
    """Module -> weight of those with an update, among adapted leaves by per-layer path."""
    return {module_path(path): weight for path, weight in leaves.items() if not weight.WHOLE}


def _is_conv1d(module: str) -> bool:
    """Whether the module is GPT-2's Conv1D, which stores [in, out] as we do."""
    return module.startswith("transformer.h.")


def _stored_as(path: str, weight: AdaptedWeight, modules: Collection[str]) -> dict[str, tuple[str, bool]]:
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


def check_config(params: Params, config: LoraConfig) -> None:
    """Raises a ValueError where the config is not the one the parameters were adapted with, or PEFT's files hold no such thing."""
    leaves = adapted_leaves(_trained_half(params))
    modules = _updated(leaves)
    if not modules:
        raise ValueError("`save_adapter` found no adapter in these parameters. Call `add_lora` and train first.")
    for path, weight in leaves.items():
        _stored_as(path, weight, modules)
    unlike = [f"{m} {w.roles!r}" for m, w in modules.items() if w.roles != LINEAR]
    if unlike:
        raise ValueError(
            f"PEFT's files hold adapters of kernels [in, out] alone; these have other roles: {', '.join(unlike[:4])}. Save the "
            "adapter half of `split(params)` with Orbax, as `jlora.train` does, or the merged weights of `merge(params)`."
        )
    wrong = [
        f"{m}: {w.NAME!r}; the config says kind={config.kind!r}" for m, w in modules.items() if w.NAME != config.kind
    ]
    wrong += [
        f"{m}: {name}={value!r}; the config says {name}={says!r}"
        for m, w in modules.items()
        for name, value in w.settings.items()
        if value != (says := config.setting_of(name, m))
    ]
    if all(leaf.base is not None for leaf in flatten(params).values() if is_adapted(leaf)):
        base = remove_lora(params)
        config, _ = without_idle(base, config)
        meant = set(select(base, config))
        if meant != set(modules):
            wrong.append(f"adapted: {describe(sorted(modules))}; the config targets: {describe(sorted(meant))}")
        whole = {path for path, w in leaves.items() if w.WHOLE}
        for path in sorted(whole ^ select_whole(base, config, modules))[:1]:
            has, says = ("is", "not") if path in whole else ("is not", "so")
            wrong.append(f"{path} {has} trained whole; `bias` and `modules_to_save` say {says}")
    if wrong:
        raise ValueError(
            "`config` is not the one these parameters were adapted with, and a reader would scale the adapter by it:\n  "
            + "\n  ".join(wrong[:10])
        )


def read_peft_adapter(found: AdapterDirectory, params: Params) -> dict[str, Any]:
    """Unadapted parameters with the adapter of a PEFT directory on them; see `jlora.load_adapter`."""
    config, file = LoraConfig.from_peft(found.fields), Checkpoint(found.weights)
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
        paths = {row.module: row.stored for row in self.rows if not row.leaf.WHOLE}
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
