"""What a kind of adapter is: one class, which answers all that the rest of the house asks of it.

    @kind
    class Hadamard(LowRankWeight):
        NAME = "hadamard"                 # LoraConfig(kind="hadamard")
        base: Array = frozen()            # a child that stays as it is
        w1: Array = trained()             # a child that is trained
        key: Array | None = frozen(default=None)  # a child that some values do without
        scaling: float                    # a setting

The class says how its children are drawn (`draw`), what it computes (`matmul`, `take`, `dense`; from `factors` in a
`LowRankWeight`), what it is the sum of (`parts`), and how PEFT writes it (`PEFT`). A method that is not there is a thing that
the kind cannot do: whoever asks is told so, by the kind's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform, overload

import jax
import jax.numpy as jnp

from jlora._typing import AnyArray, Array, Key, PRNGKeyArray
from jlora.weight import Weight, cast_to, is_weight, origin, rebuilt, register_node
from jlora.weight.roles import LINEAR

_CHILD, _TRAINED, _FROZEN = "child", "trained", "frozen"
_Kind = TypeVar("_Kind", bound=type)
_Adapted = TypeVar("_Adapted", bound="AdaptedWeight")


@overload
def trained() -> Any: ...
@overload
def trained(*, default: None) -> Any: ...
def trained(*, default: Any = dataclasses.MISSING) -> Any:
    """A child that `split` puts into the adapter half; float32. With the default None: some values do without."""
    return dataclasses.field(default=default, metadata={_CHILD: _TRAINED})


@overload
def frozen() -> Any: ...
@overload
def frozen(*, default: None) -> Any: ...
def frozen(*, default: Any = dataclasses.MISSING) -> Any:
    """A child that is not trained. With the default None: some values do without."""
    return dataclasses.field(default=default, metadata={_CHILD: _FROZEN})


@dataclass_transform(frozen_default=True, field_specifiers=(trained, frozen, dataclasses.field))
def kind(cls: _Kind) -> _Kind:
    """Makes a class a kind: an immutable pytree node, known by its `NAME` where it has one."""
    made: Any = dataclasses.dataclass(frozen=True, repr=False)(cls)
    fields = dataclasses.fields(made)
    made.TRAINED, made.FROZEN = (
        tuple(field.name for field in fields if field.metadata.get(_CHILD) == role) for role in (_TRAINED, _FROZEN)
    )
    made.CHILDREN = tuple(field.name for field in fields if _CHILD in field.metadata)
    made.OPTIONAL = tuple(field.name for field in fields if field.name in made.CHILDREN and field.default is None)
    made.SETTINGS = tuple(field.name for field in fields if field.name not in made.CHILDREN)
    register_node(made, data_fields=made.CHILDREN, meta_fields=made.SETTINGS)
    if made.NAME:
        KINDS[made.NAME] = made
    return made


class Unwritable(ValueError):
    """A file format does not hold a value; the message says why."""


class Site(NamedTuple):
    """A leaf that is to be adapted."""

    path: str
    leaf: Array | Weight
    """[*stack, in, out], or with the axes that `roles` names."""
    keys: tuple[PRNGKeyArray, ...]
    """One for each layer of a stacked leaf, else one."""
    stacked: bool
    roles: str
    is_embedding: bool
    rank: int
    scaling: float
    dropout: float
    options: Mapping[str, Any]
    """The other fields of the config that the kind reads."""


class Place(NamedTuple):
    """Where a weight of one layer stands, as far as its name in PEFT's files depends on it."""

    leaf: str
    """ "kernel", "embedding", "bias", "scale"."""
    updated: bool
    """Whether the module has an update: PEFT keeps the module's own parameters under "base_layer" then."""
    stored_in_out: bool
    """Whether PyTorch stores the kernel [in, out] as we do (GPT-2's Conv1D)."""


class PeftForm(NamedTuple):
    """How PEFT writes a kind: its `adapter_config.json`, and its tensors."""

    type: str
    """`peft_type`."""
    fields: Mapping[str, tuple[str, Any]]
    """Field of `LoraConfig` -> (PEFT's field, PEFT's default). What is not here, the kind does not read."""
    unwritten: tuple[str, ...] = ()
    """Fields of `LoraConfig` that the kind reads and PEFT's files do not hold: what changes training alone."""
    tensors: Mapping[str, tuple[str, bool]] = {}
    """Trained child -> (what follows the module's path in the name of the tensor, whether it is stored transposed)."""
    neutral: Mapping[str, tuple[Any, ...]] = {}
    """PEFT's fields that change what is computed and are not represented -> the values under which they do not."""
    idle: tuple[str, ...] = ()
    """PEFT's fields that change nothing of a trained adapter."""
    training: tuple[str, ...] = ()
    """PEFT's fields that change how it trains alone, and are not represented."""
    written: Mapping[str, Any] = {}
    """Fields that are always written."""


class AdaptedWeight(Weight):
    """A frozen `base` and what is trained on top of it, or in its place.

    `split` leaves None in the place of the children that went to the other side.
    """

    NAME: ClassVar[str] = ""
    """What `LoraConfig.kind` calls it; "" for what is made otherwise."""
    PEFT: ClassVar[PeftForm | None] = None
    """How PEFT writes it; None: it does not."""
    FROZEN: ClassVar[tuple[str, ...]]
    CHILDREN: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]]
    """Children that some values do without."""
    SETTINGS: ClassVar[tuple[str, ...]]
    """Fields that are no children."""
    WHOLE: ClassVar[bool] = False
    """Whether the leaf is trained as a whole (`bias`, `modules_to_save`), rather than updated (`targets`)."""

    in_part: ClassVar[bool] = False
    """Whether the rows of some tokens are trained and no others."""

    base: Any
    dropout: float = 0.0
    """Probability that something is dropped in training, when there is a key."""
    key: Any = None
    """This step's dropout key [*stack]; put there by `with_dropout` and nowhere else."""
    roles: str = LINEAR

    # The value and its children

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def size(self) -> int:
        return self.trained_size + (0 if self.base is None else self.base.size)

    @property
    def trained_size(self) -> int:
        """Number of parameters that are trained."""
        return sum(x.size for name in self.TRAINED for x in jax.tree.leaves(getattr(self, name)))

    @property
    def unpacked_size(self):
        return self.base.unpacked_size if is_weight(self.base) else 0

    @property
    def absent(self):
        return tuple(n for n in self.CHILDREN if n not in self.OPTIONAL and getattr(self, n) is None)

    @property
    def representative(self):
        return getattr(self, self.TRAINED[0])

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading stack axes."""
        return self.representative.shape[:-2]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the value and the config it was made by must agree in: fields of the config, and `scaling`."""
        return {}

    def with_children(self: _Adapted, **children: object) -> _Adapted:
        """The same value with these children in place of its own."""
        return rebuilt(self, **children)

    def origin(self) -> Any:
        return origin(self.base)

    def cast(self, dtype):
        # The adapter half of `split` has no base.
        return self if self.base is None else self.with_children(base=cast_to(self.base, dtype))

    # The halves

    def adapter_half(self) -> "AdaptedWeight":
        return self.with_children(**dict.fromkeys(self.FROZEN))

    def base_half(self) -> "AdaptedWeight":
        return self.with_children(**dict.fromkeys(self.TRAINED))

    def joined(self, adapter: Any) -> "AdaptedWeight":
        """The value whose base half this is, given the adapter half.

        Raises:
            Misfit: when a child is in both, or in neither and not optional, or these are not halves of one kind.
        """
        adapter = _emptied(self) if adapter is None else adapter
        if jax.tree.structure(_emptied(self)) != jax.tree.structure(_emptied(adapter)):
            raise Misfit(None, f"one half has {_emptied(adapter)}, the other {_emptied(self)}")
        children = {name: (getattr(adapter, name), getattr(self, name)) for name in self.CHILDREN}
        for name, (a, b) in children.items():
            if a is not None and b is not None:
                raise Misfit(name, "both halves have")
            if a is None and b is None and name not in self.OPTIONAL:
                raise Misfit(name, "neither half has")
        return self.with_children(**{name: b if a is None else a for name, (a, b) in children.items()})

    def mask(self) -> "AdaptedWeight":
        """The same structure holding booleans: True for what is trained."""
        children = {
            name: jax.tree.map(lambda _, name=name: name in self.TRAINED, getattr(self, name)) for name in self.CHILDREN
        }
        return self.with_children(**children)

    # Dropout

    def with_key(self, key: Key[Array, "*stack"]) -> "AdaptedWeight":
        """The same value with this step's dropout key."""
        if "key" not in self.FROZEN:
            raise TypeError(
                f"A {type(self).__name__} with `dropout` {self.dropout} needs a place for its key. Give the class a field "
                "`key: Array | None = frozen(default=None)`."
            )
        return self.with_children(key=key)

    def drop(self, x: AnyArray) -> AnyArray:
        """x after this step's dropout of its elements."""
        if self.key is None or self.dropout == 0.0:
            return x
        kept = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))

    # How it is made

    @classmethod
    def draw(cls, key: PRNGKeyArray, d_in: int, d_out: int, rank: int) -> dict[str, Array]:
        """The trained children of one kernel [in, out], float32, under which it computes what it did."""
        raise NotImplementedError(f"{cls.__name__} does not say how its children are drawn (`draw`).")

    @classmethod
    def adapt(cls, site: Site) -> "AdaptedWeight":
        """The leaf of a site, adapted; it computes what it did."""
        if site.roles != LINEAR or site.is_embedding:
            what = "an embedding" if site.is_embedding else f"a kernel with the roles {site.roles!r}"
            raise ValueError(
                f"`kind` {cls.NAME!r} adapts kernels [in, out]; {site.path!r} is {what}. Use kind='lora' there, or name it in "
                "`exclude`."
            )
        d_in, d_out = site.leaf.shape[-2:]
        drawn = [cls.draw(key, d_in, d_out, site.rank) for key in site.keys]
        children = jax.tree.map(lambda *rows: jnp.stack(rows), *drawn) if site.stacked else drawn[0]
        given = {"scaling": site.scaling, "dropout": site.dropout} | dict(site.options)
        settings = {name: given[name] for name in cls.SETTINGS if name in given}
        make: Any = cls  # every kind is a dataclass of these fields
        return make(base=site.leaf, **children, **settings)

    # How it is written

    def peft_tensors(self, place: Place) -> Mapping[str, tuple[str, bool]]:
        """Trained child of one layer's weight -> (what follows the module's path in PEFT's name, whether it is transposed).

        Raises:
            Unwritable: when PEFT's files do not hold such a value.
        """
        if self.PEFT is None:
            raise Unwritable(f"PEFT's files do not hold a {type(self).__name__}")
        return self.PEFT.tensors

    @classmethod
    def peft_suffixes(cls) -> dict[str, str]:
        """What follows the module's path in the name of one of PEFT's tensors -> trained child."""
        return {suffix: child for child, (suffix, _) in (cls.PEFT.tensors.items() if cls.PEFT else ())}

    # Several adapters side by side

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters it holds side by side."""
        return ()

    def alone(self, name: str) -> Any:
        """The weight with the adapter of that name only."""
        return self

    def choosing(self, ids: Array) -> "AdaptedWeight":
        """The weight with a choice among its adapters."""
        return self

    def __repr__(self):
        parts = [f"base={self.base!r}", *(f"{n}={_shown(getattr(self, n))}" for n in self.TRAINED)]
        parts += [f"{name}={getattr(self, name)!r}" for name in self.SETTINGS]
        return f"{type(self).__name__}({', '.join(parts)})"


class Misfit(ValueError):
    """Two values are not the halves of one."""

    def __init__(self, child: str | None, problem: str):
        super().__init__(problem)
        self.child = child


def _emptied(w: Any) -> Any:
    return w.with_children(**dict.fromkeys(w.CHILDREN)) if is_weight(w) and w.TRAINED else w


def _shown(x: Any) -> str:
    return "None" if x is None else f"{jnp.dtype(x.dtype).name}{list(x.shape)}" if hasattr(x, "shape") else repr(x)


KINDS: dict[str, type[AdaptedWeight]] = {}
"""By name; the classes put themselves here (`kind`)."""


def kind_named(name: str) -> type[AdaptedWeight]:
    """Raises a ValueError for a name that no kind has."""
    if name not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}; got {name!r}.")
    return KINDS[name]


def kind_of_peft(peft_type: Any) -> type[AdaptedWeight] | None:
    """The first kind that PEFT writes under this `peft_type`."""
    return next((cls for cls in KINDS.values() if cls.PEFT is not None and cls.PEFT.type == peft_type), None)
