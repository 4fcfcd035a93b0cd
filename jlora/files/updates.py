"""What the writers of adapter formats share that hold low-rank updates and nothing else."""

from collections.abc import Mapping

from jlora._typing import Params
from jlora.files.names import mismatches
from jlora.lora import AdaptedWeight, LoraWeight
from jlora.lora.kinds import as_lora
from jlora.models import Model, abstract_params
from jlora.tree.modules import module_path
from jlora.tree.paths import flatten
from jlora.weight import Inseparable, is_adapted


def plain_updates(modules: Mapping[str, AdaptedWeight]) -> dict[str, LoraWeight]:
    """Each weight as the plain LoRA, or DoRA, on its original that it is, whatever its kind.

    Raises:
        ValueError: for one that is none.
    """
    found = {}
    for module, weight in modules.items():
        try:
            found[module] = as_lora(weight)
        except Inseparable as error:
            raise ValueError(
                f"Files of this format hold low-rank updates; {module!r} is {error} and cannot be written."
            ) from None
    return found


def more_than_updates(params: Params, modules: Mapping[str, LoraWeight], *, dora: bool = False) -> list[str]:
    """Paths of what is more than a low-rank update: parameters that are trained whole and, unless `dora`, magnitudes."""
    whole = [path for path, leaf in flatten(params).items() if is_adapted(leaf) and leaf.WHOLE]
    return whole + [module for module, weight in modules.items() if weight.magnitude is not None and not dora]


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
