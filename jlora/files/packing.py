"""How checkpoints store one weight: as floats, or packed; a row of `PACKINGS` each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jlora._typing import Array, DTypeLike, Json
from jlora.files import bnb
from jlora.files.names import FLOATS
from jlora.quant import NF4, QuantizedTensor, QuantSpec
from jlora.storage import Checkpoint
from jlora.storage.fields import shown
from jlora.storage.tensors import Tensors

TensorTypes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Tensor name -> (shape, the dtypes that it may have, by safetensors' names)."""


@runtime_checkable
class PackedWeight(Protocol):
    """What a checkpoint says of one kernel that it stores packed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that was packed, [out, in]."""
        ...

    @property
    def spec(self) -> QuantSpec:
        """The format that it is packed in."""
        ...

    def tensors(self, name: str) -> TensorTypes:
        """All that is stored for the weight called `name`."""
        ...

    def read(self, checkpoint: Any, name: str) -> QuantizedTensor:
        """The weight as it is packed, from tensors that `tensors` lists."""
        ...


class Packing(NamedTuple):
    """One way in which checkpoints store kernels packed."""

    name: str
    """In words."""
    declared: Callable[[Mapping[str, Json]], bool]
    """Whether the `quantization_config` of a config.json means this."""
    find: Callable[[Checkpoint, str], PackedWeight | None]
    """Of the kernel called so; None: it is not packed this way. Raises a ValueError for what is packed in a near way that is
    not read."""
    format: type[QuantSpec]
    """What it holds."""
    tensors: Callable[..., dict[str, np.ndarray]]
    """All that is stored for a kernel, by its name and the `QuantizedTensor` [in, out]."""
    declaration: Callable[..., Mapping[str, Json]]
    """The `quantization_config` that says so: of the spec, the dtype of what is dense, and the modules that are not packed."""


PACKINGS: tuple[Packing, ...] = (
    Packing(
        name="bitsandbytes' 4-bit NF4",
        declared=bnb.is_declared,
        find=bnb.QuantState.of,
        format=NF4,
        tensors=bnb.to_tensors,
        declaration=bnb.quantization_config,
    ),
)


def writable() -> dict[str, Packing]:
    """Name of a format -> the packing in which a checkpoint can hold it."""
    return {packing.format.name: packing for packing in PACKINGS}


def writable_said() -> str:
    """The same in words."""
    return ", ".join(f"{name} ({packing.name})" for name, packing in writable().items())


def check_declared(quantization: Json, *, where: str) -> None:
    """Raises a ValueError when the `quantization_config` of a config.json means no packing that is read."""
    says = quantization if isinstance(quantization, Mapping) else {}
    if not any(packing.declared(says) for packing in PACKINGS):
        raise ValueError(
            f"{where!r} is quantized ({shown(says.get('quant_method', quantization))}), says `quantization_config` in its "
            f"config.json; jlora reads dense checkpoints and {', '.join(packing.name for packing in PACKINGS)}. Load its dense "
            "original, with `quantize=jlora.NF4()` if it is too large."
        )


@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A weight that is stored as floats."""

    shape: tuple[int, ...]
    """As it is stored."""

    def tensors(self, name: str) -> TensorTypes:
        return {name: (self.shape, FLOATS)}

    def read(self, checkpoint: Tensors, name: str, dtype: DTypeLike) -> Array:
        return jnp.array(checkpoint.read(name)).astype(dtype)


def stored_weight(
    checkpoint: Tensors, name: str, shape: tuple[int, ...], *, transposed: bool, is_kernel: bool
) -> PackedWeight | DenseWeight:
    """How a checkpoint stores the weight called `name`.

    Args:
        shape: that the model asks for.
        transposed: whether dense kernels are stored as [out, in].

    Raises:
        ValueError: for a weight that is packed in a way that is not read, or from one of another shape.
    """
    found = []
    if is_kernel and isinstance(checkpoint, Checkpoint):
        found = [packed for packing in PACKINGS if (packed := packing.find(checkpoint, name)) is not None]
    if not found:
        return DenseWeight(shape[::-1] if transposed else shape)
    # Packed is [out, in], also of the kernels that GPT-2 stores as [in, out].
    if found[0].shape != shape[::-1]:
        raise ValueError(f"{name!r} is quantized from {found[0].shape}; config.json makes it {shape[::-1]}.")
    return found[0]
