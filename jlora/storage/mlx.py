"""mlx-lm's `adapter_config.json` and names.

Reference: mlx-lm, `mlx_lm/tuner/utils.py` (`linear_to_lora_layers`, `load_adapters`), `mlx_lm/tuner/lora.py` and `dora.py`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.storage.fields import MAX_SIZE, is_integer, list_of, positive, probability, shown, text

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
    def from_json(cls, fields: Mapping[str, Any]) -> "MlxConfig":
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

    def to_json(self) -> dict[str, Any]:
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


def _problems(fields: Mapping[str, Any]):
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
