"""What the writers of adapter formats share that hold low-rank updates and nothing else."""

import dataclasses
from collections.abc import Mapping

from jlora._typing import Params
from jlora.files.names import mismatches
from jlora.lora import LoraWeight
from jlora.models import Model, abstract_params
from jlora.quant import QuantizedTensor
from jlora.tree.modules import module_path
from jlora.tree.paths import flatten, is_weight

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
