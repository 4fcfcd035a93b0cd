"""What the writers of adapter formats share: what is written must be what the config says, and what the format holds."""

import dataclasses
import math
from typing import NamedTuple

import jax

from jlora._typing import Params, PyTree
from jlora.lora import AdaptedWeight, LoraConfig, LoraWeight, adapted_leaves, adapted_modules, map_adapted, remove_lora
from jlora.lora.kinds import as_lora
from jlora.lora.targets import meant
from jlora.models import Model, abstract_params
from jlora.tree.modules import describe, modules_of
from jlora.tree.paths import flatten, module_path
from jlora.weight import Inseparable, is_adapted, is_weight
from jlora.weight.roles import LINEAR


class PlainUpdates(NamedTuple):
    """An adapter as low-rank updates of its base, and what it is besides."""

    modules: dict[str, LoraWeight]
    """Module path -> the plain LoRA, or DoRA, on the original weight that its update is, whatever its kind."""
    config: LoraConfig
    """The one that describes them."""
    whole: list[str]
    """Per-layer paths of the parameters that are trained whole."""
    nested: list[str]
    """Modules with an update of an update."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (in, out)."""
        return {module: (w.lora_A.shape[0], w.lora_B.shape[1]) for module, w in self.modules.items()}


def plain_updates(params: Params, config: LoraConfig, *, format: str, writer: str) -> PlainUpdates:
    """The adapter of `params` for a format of low-rank updates.

    Raises:
        ValueError: as `check_config`; for an update that is not of low rank.
    """
    half = check_config(params, config, format=format, writer=writer)
    if config.init == "pissa":
        params, config = without_residuals(params, config)
    modules, nested = {}, []
    for module, weight in adapted_modules(params).items():
        if is_adapted(weight.base):
            nested.append(module)
            continue
        try:
            modules[module] = as_lora(weight)
        except Inseparable as error:
            raise ValueError(
                f"Files of this format hold low-rank updates; {module!r} is {error} and cannot be written."
            ) from None
    return PlainUpdates(modules, config, [path for path, w in half.items() if w.WHOLE], nested)


def kernel_shapes(model: Model, leaves: tuple[str, ...] = ("kernel",)) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of the model's leaves of these names."""
    return {
        module_path(path): tuple(leaf.shape)
        for path, leaf in flatten(abstract_params(model)).items()
        if path.rpartition("/")[2] in leaves
    }


def trained_half(params: Params) -> PyTree:
    """Adapted leaves with nothing but what is trained; None elsewhere."""
    return map_adapted(lambda w: w.adapter_half(), params, lambda leaf: None)


def check_config(params: Params, config: LoraConfig, *, format: str, writer: str) -> dict[str, AdaptedWeight]:
    """Per-layer path -> adapted weight without its base; refuses parameters that `config` does not describe: a reader would scale
    or place the adapter otherwise.

    Args:
        format: whose files are written, for the error.
        writer: the function that was called, for the error.

    Raises:
        ValueError: when nothing is adapted, a kernel is not [in, out], or `config` is not the one that the parameters were
            adapted with.
    """
    half = adapted_leaves(trained_half(params))
    modules = {module_path(path): w for path, w in half.items() if not w.WHOLE}
    if not modules:
        raise ValueError(f"`{writer}` found no adapter in these parameters. Call `add_lora` and train first.")
    several = [m for m, w in modules.items() if w.adapters]
    if several:
        raise ValueError(
            f"{format}'s files hold one adapter; {several[0]!r} holds several side by side. Save each tree of "
            "`unstack_adapters(params)`."
        )
    unlike = [f"{m} {w.roles!r}" for m, w in modules.items() if w.roles != LINEAR]
    if unlike:
        raise ValueError(
            f"{format}'s files hold adapters of kernels [in, out] alone; these have other roles: {', '.join(unlike[:4])}. Save the "
            "adapter half of `split(params)` with Orbax, as `jlora.train` does, or the merged weights of `merge(params)`."
        )
    wrong = [
        f"{m}: a {type(w).__name__}; the config says kind={config.kind!r}"
        for m, w in modules.items()
        if w.NAME != config.kind
    ]
    wrong += [
        f"{m}: {name}={value!r}; the config says {name}={says!r}"
        for m, w in modules.items()
        for name, value in w.settings.items()
        if value != (says := config.setting_of(name, m))
    ]
    if all(leaf.base is not None for leaf in jax.tree.leaves(params, is_leaf=is_weight) if is_adapted(leaf)):
        meant_modules, meant_whole = meant(modules_of(remove_lora(params)), config)
        if meant_modules != set(modules):
            wrong.append(f"adapted: {describe(sorted(modules))}; the config targets: {describe(sorted(meant_modules))}")
        whole = {path for path, w in half.items() if w.WHOLE}
        for path in sorted(whole ^ meant_whole)[:1]:
            has, says = ("is", "not") if path in whole else ("is not", "so")
            wrong.append(f"{path} {has} trained whole; `bias` and `modules_to_save` say {says}")
    if wrong:
        raise ValueError(
            "`config` is not the one these parameters were adapted with, and a reader would scale the adapter by it:\n  "
            + "\n  ".join(wrong[:10])
        )
    return half


def without_residuals(params: Params, config: LoraConfig) -> tuple[PyTree, LoraConfig]:
    """PiSSA as plain LoRA on the original base; with the rank, alpha grows so that the scaling stays."""

    def without_residual(weight):
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
    return map_adapted(without_residual, params), plain
