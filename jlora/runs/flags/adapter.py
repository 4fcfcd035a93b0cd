"""The adapter that is trained, as flags that several commands have."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from jlora._typing import JsonObject
from jlora.lora import LoraConfig
from jlora.lora.config import ALL_LINEAR, Bias, Init, Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    """`LoraConfig` as flags; the defaults are its own."""

    full: bool = False
    """No adapter: train every parameter, in float32 (16 bytes each with AdamW), and write a checkpoint, OUTPUT/model."""
    kind: Kind = "lora"
    """What is put onto the adapted kernels: loha updates them by an elementwise product of two low-rank products, miss by one
    block of `rank` rows, repeated (it has no alpha)."""
    rank: int = LoraConfig.rank
    """Rank of the update."""
    alpha: float = LoraConfig.alpha
    """The update is scaled by alpha / rank."""
    dropout: float = LoraConfig.dropout
    """Dropout on the input of the update."""
    targets: Sequence[str] = (ALL_LINEAR,)
    """Module names to adapt, such as q_proj v_proj; or one regular expression for whole module paths."""
    exclude: Sequence[str] = ()
    """Module names not to adapt."""
    layers_to_transform: Sequence[int] | None = None
    """Adapt these layers only."""
    bias: Bias = LoraConfig.bias
    """Biases to train as they are: none, those of the adapted modules, or all."""
    modules_to_save: Sequence[str] = ()
    """Modules to train whole, such as lm_head."""
    use_rslora: bool = LoraConfig.use_rslora
    """Scale the update by alpha / sqrt(rank)."""
    use_dora: bool = LoraConfig.use_dora
    """Also train the norm of every column of the updated kernels (DoRA)."""
    init: Init = LoraConfig.init
    """Initialization of lora_A; pissa: of both factors, from the largest singular values of the kernel, of which the rest is
    kept as a second, frozen pair."""

    def __post_init__(self):
        for name in ("targets", "exclude", "modules_to_save"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))

    def problems(self) -> Iterator[str]:
        if self.full:
            for field in dataclasses.fields(AdapterFlags):
                if field.name != "full" and (value := getattr(self, field.name)) != field.default:
                    yield f"`{field.name}` has no effect with `full`, which trains no adapter; got {value!r}. Leave it out."

    def lora(self) -> LoraConfig:
        """The adapter's own config.

        Raises:
            ValueError: for an option out of its range.
        """
        fields: JsonObject = {name: getattr(self, name) for name in _names()}
        fields["targets"] = _targets(self.targets)
        return LoraConfig(**fields)


def _names() -> list[str]:
    """Of the flags that are `LoraConfig`'s."""
    return [field.name for field in dataclasses.fields(AdapterFlags) if field.name != "full"]


def _targets(names: Sequence[str]) -> str | Sequence[str]:
    """One word that is "all-linear" or has characters no module name has is meant as PEFT's string form."""
    if len(names) == 1 and (names[0] == ALL_LINEAR or re.search(r"[\\*+?()\[\]|^$]", names[0])):
        return names[0]
    return names
