"""`LoraConfig`: which kernels are adapted, and how; PEFT's fields under PEFT's meaning."""

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from jlora._typing import Json
from jlora.lora.kinds import KINDS, AdaptedWeight, kind_named
from jlora.storage.fields import (
    MAX_SIZE,
    anything,
    either,
    flag,
    is_integer,
    list_of,
    mapping_of,
    positive,
    probability,
    shown,
    text,
    wrong_fields,
)
from jlora.tree.modules import ALL_LINEAR, pattern_matches

Init: TypeAlias = Literal["kaiming", "gaussian", "pissa"]
Bias: TypeAlias = Literal["none", "lora_only", "all"]
Kind: TypeAlias = Literal["lora", "loha", "miss"]
"""Those that are here; a class of one's own brings its `NAME`."""
INITS, BIASES = get_args(Init), get_args(Bias)
OF_EVERY_KIND = ("targets", "exclude", "modules_to_save", "layers_to_transform")
"""Fields that every kind reads: which leaves are adapted."""
_PLAIN = ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern")
"""Fields besides that a kind reads which no file holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Hyperparameters of an adapter. Immutable and hashable; not needed at run time, the wrapped tree is self-contained.

    A *module path* is a kernel's checkpoint path with dots: "model.layers.3.self_attn.q_proj", "transformer.h.0.mlp.c_fc".

    Example:
        >>> config = LoraConfig(rank=16, alpha=32.0, targets=("q_proj", "v_proj"), rank_pattern={r"layers\\.0\\..*": 4})
        >>> config.rank_of("model.layers.0.self_attn.q_proj"), config.scaling_of("model.layers.0.self_attn.q_proj")
        (4, 8.0)

    Raises:
        ValueError: for a field out of its range, naming it.

    Reference: PEFT `LoraConfig`; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """

    kind: str | type[AdaptedWeight] = "lora"
    """What stands in the place of an adapted kernel: "lora", "loha" (an elementwise product of two low-rank products) or
    "miss" (one block of `rank` rows, repeated); or a class of your own, see `jlora.lora.kinds`. A field that a kind does not
    read must be left at its default."""
    rank: int = 8
    """Rank r of the update."""
    alpha: float = 16.0
    """The update is scaled by `alpha / rank` (`alpha / sqrt(rank)` with `use_rslora`)."""
    targets: str | Sequence[str] = ALL_LINEAR
    """"all-linear": every linear kernel but the output head; another string: a regular expression that matches a whole
    module path; a list: module paths or their last parts ("q_proj", "embed_tokens"), never regular expressions. Embeddings
    are adapted when they are named; an output head that is tied to one keeps the original, as in PEFT."""
    dropout: float = 0.0
    """Probability that an input element of the update is dropped during training."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)`."""
    use_dora: bool = False
    """DoRA: also train the norm of every column of the updated kernel (Liu et al. 2024, arXiv:2402.09353)."""
    init: Init = "kaiming"
    """lora_A from U(-1/sqrt(in), 1/sqrt(in)) or N(0, 1/rank); lora_B is zero (in embeddings always: lora_A zero, lora_B from
    N(0, 1)). "pissa": the largest singular values of the kernel, which is trained from their rest (dense kernels only;
    Meng et al. 2024, arXiv:2404.02948); written to files as a plain update of twice the rank."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rank by module path: the first key, a regular expression, that matches the path or its end wins."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Alpha by module path, as `rank_pattern`."""
    exclude: str | Sequence[str] = ()
    """Modules not to adapt, by the rules of `targets`."""
    bias: Bias = "none"
    """Biases to train as they are: none, those of the adapted modules, or all there are."""
    modules_to_save: Sequence[str] = ()
    """Modules to train whole, such as "lm_head" or "embed_tokens" (an embedding that is also the output head is trained as
    embedding only, as in PEFT). PEFT's rule: every module whose path ends with a name, "norm" thus "input_layernorm" too."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    """Tokens whose rows of the embedding are trained, of all others nothing; a head that is tied to it has the same rows. Or
    for each module by name, {"embed_tokens": ids, "lm_head": ids}."""
    layers_to_transform: int | Sequence[int] | None = None
    """Adapt these layers only (not with a regular expression in `targets`: put the layer numbers into it). A target
    that is a whole module path is adapted whatever its layer, as in PEFT."""

    def __post_init__(self):
        saved = self.modules_to_save
        plain = {name: _tuple(getattr(self, name)) for name in ("targets", "exclude")}
        plain["modules_to_save"] = (saved,) if isinstance(saved, str) else _tuple(saved)
        plain |= {n: _dict(getattr(self, n)) for n in ("rank_pattern", "alpha_pattern")}
        plain["layers_to_transform"] = self.layers()
        tokens = self.trainable_token_indices
        named = isinstance(tokens, Mapping)
        plain["trainable_token_indices"] = {k: _tuple(v) for k, v in tokens.items()} if named else _tuple(tokens)
        plain["kind"] = self.kind if isinstance(self.kind, str) else self.kind.NAME
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        problems = list(wrong_fields(plain, _CONTAINERS)) or list(self._problems())
        if problems:
            raise ValueError("LoraConfig is not usable:\n  " + "\n  ".join(problems))

    def _problems(self):
        if self.kind not in KINDS:
            yield f"`kind` must be one of {', '.join(map(repr, KINDS))}; got {self.kind!r}."
            return
        for field in dataclasses.fields(self):
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.name not in {"kind", *self._read, *OF_EVERY_KIND} and getattr(self, field.name) != default:
                yield (
                    f"`{field.name}` means nothing to kind {self.kind!r}; got {shown(getattr(self, field.name))}. Leave it out."
                )
        ranks = {"rank": self.rank} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        for name, value in ranks.items():
            if not is_integer(value) or not 1 <= value <= MAX_SIZE:
                yield f"`{name}` must be an integer of at least 1; got {shown(value)}. Common values are 4 to 64."
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, value in alphas.items():
            if not positive(MAX_ALPHA).holds(value):
                yield f"`{name}` must be a positive number; got {shown(value)}. A common choice is twice the rank."
        if not probability().holds(self.dropout):
            yield f"`dropout` must be in [0, 1); got {shown(self.dropout)}. Use 0.05, or 0.0 for none."
        flags = {name: getattr(self, name) for name in ("use_rslora", "use_dora")}
        yield from wrong_fields(flags, dict.fromkeys(flags, flag()))
        if self.init not in INITS:
            yield f"`init` must be one of {', '.join(map(repr, INITS))}; got {self.init!r}."
        if self.bias not in BIASES:
            yield f"`bias` must be one of {', '.join(map(repr, BIASES))}; got {self.bias!r}."
        if not all(isinstance(name, str) and name for name in self.modules_to_save):
            yield f"`modules_to_save` must hold module names such as 'lm_head'; got {self.modules_to_save!r}."
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            yield f"`targets` must name at least one module; got {self.targets!r}. Use 'all-linear' or ('q_proj', 'v_proj')."
        expressions = {f"{name}[{k!r}]": k for name in ("rank_pattern", "alpha_pattern") for k in getattr(self, name)}
        expressions |= {n: v for n in ("targets", "exclude") if isinstance(v := getattr(self, n), str)}
        for name, expression in expressions.items():
            try:
                with warnings.catch_warnings(action="ignore"):  # of what is refused where it is compared
                    re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                yield f"`{name}` must be a regular expression; got {shown(expression)} ({error})."
        for name, tokens in self.tokens.items():
            if not tokens or len(set(tokens)) < len(tokens) or not all(is_integer(i) and i >= 0 for i in tokens):
                where = f"[{name!r}]" if name else ""
                yield f"`trainable_token_indices{where}` must hold token ids from 0, each once; got {shown(tokens)}."
        layers = self.layers()
        if layers is not None:
            if not layers or not all(is_integer(i) and i >= 0 for i in layers):
                yield f"`layers_to_transform` must hold layer numbers from 0; got {self.layers_to_transform!r}."
            if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
                yield (
                    f"`layers_to_transform` goes with a list in `targets` or 'all-linear', as in PEFT; got the regular "
                    f"expression {self.targets!r}. Put the layer numbers into the expression."
                )

    def _values(self) -> tuple:
        """What makes two configs equal. The order of a pattern counts: its first match wins."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(tuple(v.items()) if isinstance(v, Mapping) else v for v in values)

    def __eq__(self, other):
        return self._values() == other._values() if isinstance(other, LoraConfig) else NotImplemented

    def __hash__(self):
        return hash(self._values())

    def layers(self) -> tuple[int, ...] | None:
        """`layers_to_transform` as numbers; None: all layers."""
        given = self.layers_to_transform
        return None if given is None else _tuple(given) if isinstance(given, Iterable) else (given,)  # pyright: ignore

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Module name -> `trainable_token_indices`; "" for the input embedding, whatever it is called."""
        given: Any = self.trainable_token_indices
        return dict(given) if isinstance(given, Mapping) else {"": given} if given else {}

    @property
    def weight(self) -> type[AdaptedWeight]:
        """The class that `kind` means."""
        return kind_named(str(self.kind))

    @property
    def _read(self) -> tuple[str, ...]:
        """The fields that the kind reads, besides those that every kind does."""
        form = self.weight.PEFT
        return _PLAIN if form is None else (*form.fields, *form.unwritten)

    def as_read(self) -> dict[str, Any]:
        """The fields that mean something to this kind."""
        return {name: getattr(self, name) for name in ("kind", *self._read, *OF_EVERY_KIND)}

    def options(self) -> dict[str, Any]:
        """The fields that this kind reads and not every kind has."""
        return {name: getattr(self, name) for name in self._read if name not in (*_PLAIN, "bias")}

    def setting_of(self, name: str, module: str) -> Any:
        """A field of the config, or "scaling", as it is for a module path."""
        at = {"rank": self.rank_of, "alpha": self.alpha_of, "scaling": self.scaling_of}.get(name)
        return getattr(self, name) if at is None else at(module)

    def rank_of(self, module: str) -> int:
        """Rank for a module path."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha for a module path."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """Scaling for a module path; 1 for a kind that has no alpha."""
        if "alpha" not in self._read:
            return 1.0
        rank = self.rank_of(module)
        return float(self.alpha_of(module)) / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "LoraConfig":
        """The config of a saved adapter, PEFT's or mlx-lm's, from its `adapter_config.json`, or of a GGUF file.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: for a file that is not a JSON object, and for a feature that jlora does not represent, by its
                PEFT or mlx-lm name.
        """
        (reader,) = _READERS
        return reader(directory)


ConfigReader: TypeAlias = Callable[[str | os.PathLike], LoraConfig]
_READERS: list[ConfigReader] = []


def reads_configs(reader: ConfigReader) -> ConfigReader:
    """Makes `reader` what `LoraConfig.load` calls: files are known on a higher floor than this one."""
    _READERS[:] = [reader]
    return reader


def _tuple(value: object) -> Any:
    """Names and numbers in a tuple; text, and what is neither, as it is."""
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return tuple(value)
    return () if value is None else value


def _dict(value: object) -> Any:
    return dict(value) if isinstance(value, Mapping) else {} if value is None else value


MAX_ALPHA = 1e9
NAMES = either(text(), list_of(text()))
"""One module name, or a list of them."""
_CONTAINERS = {
    "targets": NAMES,
    "exclude": NAMES,
    "modules_to_save": NAMES,
    "rank_pattern": mapping_of(anything()),
    "alpha_pattern": mapping_of(anything()),
    "trainable_token_indices": either(list_of(anything()), mapping_of(list_of(anything()))),
}
"""Of `LoraConfig`; what is in them, `_problems` says more of."""


def _first_match(pattern: Mapping[str, Json], module: str, default):
    for key, value in pattern.items():
        if pattern_matches(key, module):
            return value
    return default
