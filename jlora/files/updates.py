"""What the writers of adapter formats share: what is written must be what the config says, and what the format holds."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from jlora._typing import Params, PyTree
from jlora.files.names import mismatches
from jlora.lora import (
    AdaptedWeight,
    FullWeight,
    LoraConfig,
    LoraWeight,
    adapted_leaves,
    adapted_modules,
    remove_lora,
)
from jlora.lora.targets import select, select_whole, without_idle
from jlora.models import Model, abstract_params
from jlora.quant import QuantizedTensor
from jlora.tree.modules import describe, module_path
from jlora.tree.paths import flatten, is_weight
from jlora.weight.roles import LINEAR

_LORA_FIELDS = frozenset({"base", "lora_A", "lora_B", "scaling", "dropout", "key", "roles"})
DORA_FIELDS = frozenset({"magnitude", "base_norm"})


def more_than_updates(
    params: Params, modules: Mapping[str, LoraWeight], allowed: frozenset[str] = frozenset()
) -> list[str]:
    """Paths of what is more than a low-rank update of a dense or quantized weight: parameters that are trained whole, and
    values with children that a plain LoRA lacks, but for those `allowed`."""
    other = [
        path
        for path, leaf in flatten(params).items()
        if is_weight(leaf) and not isinstance(leaf, LoraWeight | QuantizedTensor)
    ]
    return other + [module for module, weight in modules.items() if _is_more(weight, _LORA_FIELDS | allowed)]


def _is_more(weight: LoraWeight, allowed: frozenset[str]) -> bool:
    extra = [field.name for field in dataclasses.fields(weight) if field.name not in allowed]
    nested = is_weight(weight.base) and not isinstance(weight.base, QuantizedTensor)
    return nested or any(getattr(weight, name) is not None for name in extra)


def kernel_shapes(model: Model, leaves: tuple[str, ...] = ("kernel",)) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of the model's leaves of these names."""
    return {
        module_path(path): tuple(leaf.shape)
        for path, leaf in flatten(abstract_params(model)).items()
        if path.rpartition("/")[2] in leaves
    }


def check_shapes(modules: Mapping[str, LoraWeight], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError for updates that are not of the shapes of the model's weights."""
    found = {module: (w.lora_A.shape[0], w.lora_B.shape[1]) for module, w in modules.items()}
    problems = mismatches({module: shapes[module] for module in modules}, found)
    if problems:
        raise ValueError("The adapter does not fit the model:\n  " + "\n  ".join(problems))


def trained_half(params: Params) -> PyTree:
    """Adapted leaves with nothing but what is trained; None elsewhere."""
    return jax.tree.map(lambda w: w.adapter_half() if isinstance(w, AdaptedWeight) else None, params, is_leaf=is_weight)


def check_config(params: Params, config: LoraConfig, *, format: str, writer: str) -> None:
    """Refuses parameters that `config` does not describe: a reader would scale or place the adapter otherwise.

    Args:
        format: whose files are written, for the error.
        writer: the function that was called, for the error.

    Raises:
        ValueError: when nothing is adapted, a kernel is not [in, out], or `config` is not the one that the parameters were
            adapted with.
    """
    modules = adapted_modules(trained_half(params))
    if not modules:
        raise ValueError(f"`{writer}` found no adapter in these parameters. Call `add_lora` and train first.")
    unlike = [f"{m} {w.roles!r}" for m, w in modules.items() if w.roles != LINEAR]
    if unlike:
        raise ValueError(
            f"{format}'s files hold adapters of kernels [in, out] alone; these have other roles: {', '.join(unlike[:4])}. Save the "
            "adapter half of `split(params)` with Orbax, as `jlora.train` does, or the merged weights of `merge(params)`."
        )
    wrong = [
        f"{m}: rank {w.rank}, scaling {w.scaling:g}; the config says rank {config.rank_of(m)}, scaling {config.scaling_of(m):g}"
        for m, w in modules.items()
        if (w.rank, w.scaling) != (config.rank_of(m), config.scaling_of(m))
    ]
    wrong += [
        f"{m}: {'no ' if w.magnitude is None else ''}DoRA magnitude; the config says use_dora={config.use_dora}"
        for m, w in modules.items()
        if (w.magnitude is not None) != config.use_dora
    ]
    if all(leaf.base is not None for leaf in flatten(params).values() if isinstance(leaf, AdaptedWeight)):
        base = remove_lora(params)
        config, _ = without_idle(base, config)
        meant = set(select(base, config))
        if meant != set(modules):
            wrong.append(f"adapted: {describe(sorted(modules))}; the config targets: {describe(sorted(meant))}")
        whole = {path for path, w in adapted_leaves(trained_half(params)).items() if isinstance(w, FullWeight)}
        for path in sorted(whole ^ select_whole(base, config, modules))[:1]:
            has, says = ("is", "not") if path in whole else ("is not", "so")
            wrong.append(f"{path} {has} trained whole; `bias` and `modules_to_save` say {says}")
    if wrong:
        raise ValueError(
            "`config` is not the one these parameters were adapted with, and a reader would scale the adapter by it:\n  "
            + "\n  ".join(wrong[:10])
        )


def without_residuals(params: Params, config: LoraConfig) -> tuple[PyTree, LoraConfig]:
    """PiSSA as plain LoRA on the original base; with the rank, alpha grows so that the scaling stays."""

    def one(weight):
        if not isinstance(weight, LoraWeight):
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
    return jax.tree.map(one, params, is_leaf=is_weight), plain
