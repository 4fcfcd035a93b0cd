"""`LoraConfig`: which kernels are adapted, and how; PEFT's fields under PEFT's meaning."""

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from jlora.lora.kinds import KINDS, AdaptedWeight, Unwritable, kind_named, kind_of_peft
from jlora.storage import Checkpoint
from jlora.storage.adapters import MLX, open_adapter
from jlora.storage.fields import (
    MAX_SIZE,
    anything,
    check_fields,
    either,
    flag,
    integer,
    is_integer,
    list_of,
    mapping_of,
    one_of,
    optional,
    positive,
    probability,
    shown,
    text,
    wrong_fields,
)
from jlora.storage.mlx import MlxConfig, updated_modules
from jlora.tree.modules import ALL_LINEAR, pattern_matches

INITS = ("kaiming", "gaussian", "pissa")
BIASES = ("none", "lora_only", "all")


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
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    """lora_A from U(-1/sqrt(in), 1/sqrt(in)) or N(0, 1/rank); lora_B is zero (in embeddings always: lora_A zero, lora_B from
    N(0, 1)). "pissa": the largest singular values of the kernel, which is trained from their rest (dense kernels only;
    Meng et al. 2024, arXiv:2404.02948); written to files as a plain update of twice the rank."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rank by module path: the first key, a regular expression, that matches the path or its end wins."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Alpha by module path, as `rank_pattern`."""
    exclude: str | Sequence[str] = ()
    """Modules not to adapt, by the rules of `targets`."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases to train as they are: none, those of the adapted modules, or all there are."""
    modules_to_save: Sequence[str] = ()
    """Modules to train whole, such as "lm_head" or "embed_tokens" (an embedding that is also the output head is trained as
    embedding only, as in PEFT). PEFT's rule: every module whose path ends with a name, "norm" thus "input_layernorm" too."""
    layers_to_transform: int | Sequence[int] | None = None
    """Adapt these layers only (not with a regular expression in `targets`: put the layer numbers into it). A target
    that is a whole module path is adapted whatever its layer, as in PEFT."""

    def __post_init__(self):
        saved = self.modules_to_save
        plain = {name: _tuple(getattr(self, name)) for name in ("targets", "exclude")}
        plain["modules_to_save"] = (saved,) if isinstance(saved, str) else _tuple(saved)
        plain |= {n: _dict(getattr(self, n)) for n in ("rank_pattern", "alpha_pattern")}
        plain["layers_to_transform"] = self.layers()
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
            if field.name not in {"kind", *self._read, *_OF_EVERY_KIND} and getattr(self, field.name) != default:
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
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                yield f"`{name}` must be a regular expression; got {shown(expression)} ({error})."
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
        return {name: getattr(self, name) for name in ("kind", *self._read, *_OF_EVERY_KIND)}

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
        """The config of a saved adapter, PEFT's or mlx-lm's, from its `adapter_config.json`.

        mlx-lm's names modules by the number of blocks from the end, so what it means is read from the names of its tensors.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: for a file that is not a JSON object, and for a feature that jlora does not represent, by its
                PEFT or mlx-lm name.
        """
        found = open_adapter(directory)
        if found.layout == MLX:
            return cls.from_mlx(found.fields, Checkpoint(found.weights).shapes)
        return cls.from_peft(found.fields)

    @classmethod
    def from_mlx(cls, fields: Mapping[str, Any], tensors: Iterable[str]) -> "LoraConfig":
        """From the fields of an mlx-lm `adapter_config.json` and the names of the adapter's tensors."""
        config = MlxConfig.from_json(fields)
        targets, layers = config.targets(updated_modules(tensors))
        if not targets:
            raise ValueError(f"{MLX.weights} holds no `lora_a`: there is no adapter in it. Write or download it again.")
        return cls(
            rank=config.rank,
            alpha=config.alpha,
            targets=targets,
            dropout=config.dropout,
            use_dora=config.use_dora,
            layers_to_transform=layers,
        )

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> "LoraConfig":
        """From the fields of a PEFT `adapter_config.json`; absent fields have PEFT's defaults.

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
        _warn_of_unknown(fields, {*checks, *form.neutral, *form.idle, *_NEUTRAL, *_IDLE}, form.training)
        given = {name: _from_json(name, fields.get(peft, default)) for name, (peft, default) in names.items()}
        return cls(kind=kind.NAME, **given)

    def to_peft(self) -> dict[str, Any]:
        """PEFT's fields, as `adapter_config.json` holds them. `target_modules` is as configured; the writer that knows
        the tree replaces "all-linear" by the names it stood for.

        Raises:
            Unwritable: for a kind that PEFT does not have.
        """
        form = self.weight.PEFT
        if form is None:
            raise Unwritable(f"PEFT's files do not hold adapters of kind {self.kind!r} ({self.weight.__name__})")
        fields = {
            peft: _to_json(name, getattr(self, name)) for name, (peft, _) in {**form.fields, **_OF_EVERY_KIND}.items()
        }
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
    if name == "layers_to_transform":
        return None if value is None else list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _tuple(value: Any) -> Any:
    """Names and numbers in a tuple; text, and what is neither, as it is."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return tuple(value) if is_list else () if value is None else value


def _dict(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else {} if value is None else value


MAX_ALPHA = 1e9
_NAMES = either(text(), list_of(text()))
_CONTAINERS = {
    "targets": _NAMES,
    "exclude": _NAMES,
    "modules_to_save": _NAMES,
    "rank_pattern": mapping_of(anything()),
    "alpha_pattern": mapping_of(anything()),
}
"""Of `LoraConfig`; what is in them, `_problems` says more of."""

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
    "targets": _NAMES,
    "exclude": optional(_NAMES),
    "modules_to_save": optional(_NAMES),
    "layers_to_transform": optional(either(integer(0), list_of(integer(0)))),
}
"""What PEFT's files may hold of each field here, under whatever name a kind writes it."""

_PLAIN = ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern")
"""Fields that a kind reads which no file holds."""
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


def _first_match(pattern: Mapping[str, Any], module: str, default):
    for key, value in pattern.items():
        if pattern_matches(key, module):
            return value
    return default
