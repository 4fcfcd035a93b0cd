"""`QuantizedTensor`: packed codes and their scales, standing for a dense weight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jlora._typing import Array, DTypeLike, Float, UInt8
from jlora.quant.blockwise import in_blocks
from jlora.quant.formats import NF4
from jlora.quant.matmul import implementation, quantized_matmul
from jlora.quant.scales import NestedAbsmax, Scales
from jlora.quant.spec import QuantSpec
from jlora.weight import Parts, Weight, register_node
from jlora.weight.roles import LINEAR, check_roles, inverse, order, sizes

_DATA = ("codes", "scales")
_META = ("kernel_shape", "spec", "logical_dtype", "roles", "axes")


@functools.partial(register_node, data_fields=_DATA, meta_fields=_META)
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedTensor(Weight):
    """Stands for a dense weight [*stack, in, out] (or [n]) that is stored as blockwise codes.

    The codes are in the order of the transposed weight [out, in], row-major, which is PyTorch's, bitsandbytes' and ggml's:
    blocks run along `in`, 4-bit codes lie two to a byte with the first in the high nibble (`spec.layout`). Where `in` divides
    into blocks the arrays keep their rows, so that they can be sharded along either side; elsewhere they are flat.
    Every array may carry leading stack axes; the static fields describe the trailing ones.
    """

    codes: UInt8[Array, "*stack d_out packed"] | UInt8[Array, "*stack packed"]
    scales: Scales
    """Of the blocks; its `blocks` is [*stack, out, blocks], or [*stack, blocks] where the codes are flat."""
    kernel_shape: tuple[int, ...]
    """(in, out), or (n,)."""
    spec: QuantSpec
    """The format, with its settings."""
    logical_dtype: str
    """Dtype of the weight that was quantized, and of `dense()`; products decode to the dtype of the other operand."""
    roles: str = LINEAR
    """What each of the trailing axes is for (see `jlora.quantize`). What is packed is always [in, out]."""
    axes: tuple[int, ...] | None = None
    """Sizes of the axes that `roles` names, stack axes left out; None: `kernel_shape`."""

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def absmax(self) -> Array:
        """Scale of each block as it is stored."""
        return self.scales.blocks

    @property
    def has_rows(self) -> bool:
        """Whether the arrays keep the rows of [out, in]."""
        return keeps_rows(self.kernel_shape, self.block_size)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading stack axes."""
        return self.codes.shape[: self.codes.ndim - (2 if self.has_rows else 1)]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *(self.axes or self.kernel_shape))

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.logical_dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of every stored array: the codes, and all that the scales are made of."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        return 8 * self.nbytes / self.size

    @property
    def packed_roles(self):
        return None if self.axes is None else self.roles

    @property
    def unpacked_size(self):
        return math.prod(self.kernel_shape)

    def parts(self):
        return Parts(self, roles=self.roles)

    def _flat_scales(self) -> Scales:
        return self.scales.without_rows() if self.has_rows else self.scales

    def factors(self) -> Float[Array, "*stack parts"]:
        """What the value of a code is multiplied by in each block or sub-block, float32; flattened where the codes have rows."""
        return self._flat_scales().decode(self.spec.unit)

    def minimum(self) -> Float[Array, "*stack parts"] | None:
        """What is added then, alike; None: nothing."""
        return self._flat_scales().minimum()

    def rows(self, dtype: DTypeLike) -> Array:
        """The dense weight as it is stored, transposed: [*stack, out, in] (or [n]).

        Decoded in float32 and rounded once to `dtype`, as bitsandbytes does.
        """
        stack, spec = self.stack, self.spec
        blocks = in_blocks(self.codes.reshape(*stack, -1), self.block_size * spec.layout.bits // 8)
        codes = in_blocks(spec.layout.unpack(blocks).reshape(*stack, -1), self.block_size // spec.sub_blocks)
        values = spec.decode(codes) * self.factors()[..., None]
        minimum = self.minimum()
        values = values if minimum is None else values + minimum[..., None]
        flat = values.astype(dtype).reshape(*stack, -1)
        return flat[..., : math.prod(self.kernel_shape)].reshape(*stack, *self.kernel_shape[::-1])

    def matmul(self, x, *, transpose, out_dtype):
        self._check_linear("multiplied by")
        flat = x.reshape(-1, x.shape[-1])
        name = implementation(flat.shape[0], jax.default_backend())
        y = quantized_matmul(name, transpose, x.dtype, jnp.dtype(out_dtype), flat, self)
        return y.reshape(*x.shape[:-1], y.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]: a partial `custom_vjp` is typed as object

    def take(self, ids):
        self._check_linear("looked up in")
        d_in, d_out = self.kernel_shape
        # Element (id, o) of [in, out] is number o * in + id of the stored order.
        at = jnp.clip(ids, 0, d_in - 1)[..., None] + d_in * jnp.arange(d_out)
        part = at // (self.block_size // self.spec.sub_blocks)
        codes = self.spec.layout.pick(self.codes.reshape(-1), at, self.block_size)
        values, minimum = self.spec.decode(codes) * self.factors()[part], self.minimum()
        return (values if minimum is None else values + minimum[part]).astype(self.dtype)

    def dense(self, dtype=None):
        rows = self.rows(dtype or self.dtype)
        if len(self.kernel_shape) == 1:
            return rows
        kernel = jnp.swapaxes(rows, -1, -2)
        return kernel if self.axes is None else unfold(kernel, self.roles, self.axes)

    def linear(self) -> "QuantizedTensor":
        """The same bytes as a kernel [*stack, in, out]."""
        return dataclasses.replace(self, roles=LINEAR, axes=None)

    def _check_linear(self, verb: str) -> None:
        if self.axes is not None:
            raise ValueError(
                f"Only kernels [in, out] are {verb} directly; this one has the axes {self.shape} with roles {self.roles!r}. "
                "Call the function that uses it through `jlora.wrap`."
            )

    def cast(self, dtype):
        return dataclasses.replace(self, logical_dtype=jnp.dtype(dtype).name)

    def __repr__(self):
        # The name of that class says its format.
        inner = "" if isinstance(self, NF4Tensor) else f"{self.spec.name}, "
        flags = "".join(f", {name}" for name, on in vars(self.spec).items() if on is True)
        return f"{type(self).__name__}({inner}shape={self.shape}, dtype={self.logical_dtype}, block_size={self.block_size}{flags})"


@functools.partial(register_node, data_fields=_DATA, meta_fields=_META)
@dataclasses.dataclass(frozen=True, repr=False)
class NF4Tensor(QuantizedTensor):
    """A `QuantizedTensor` of format "nf4"; its bytes are those of bitsandbytes' `Params4bit`."""

    @property
    def double_quant(self) -> bool:
        return isinstance(self.scales, NestedAbsmax)

    @property
    def nested_absmax(self) -> Array | None:
        """Double quantization: scale of each 256 absmax codes."""
        return self.scales.nested if isinstance(self.scales, NestedAbsmax) else None

    @property
    def nested_offset(self) -> Array | None:
        """Double quantization: mean of the absmax."""
        return self.scales.offset if isinstance(self.scales, NestedAbsmax) else None


def fold(w: Array, roles: str) -> tuple[Array, tuple[int, ...]]:
    """A kernel whose trailing axes `roles` names as [*stack, in, out], and the sizes of its in- and out-axes as they were."""
    lead = w.ndim - len(roles)
    stack = w.shape[: lead + roles.count("b")]
    kernel = jnp.transpose(w, (*range(lead), *(lead + axis for axis in order(roles))))
    d_in = math.prod(sizes(roles, "i", w.shape))
    return kernel.reshape(*stack, d_in, -1), w.shape[len(stack) :]


def unfold(kernel: Array, roles: str, axes: tuple[int, ...]) -> Array:
    """The inverse of `fold`."""
    stack = kernel.shape[:-2]
    sides = roles.lstrip("b")
    unfolded = kernel.reshape(*stack, *sizes(sides, "i", axes), *sizes(sides, "o", axes))
    return jnp.transpose(unfolded, (*range(len(stack)), *(len(stack) + axis for axis in inverse(order(sides)))))


def keeps_rows(kernel_shape: tuple[int, ...], block_size: int) -> bool:
    """Whether the arrays are [*, out, …]: no block straddles two rows."""
    return len(kernel_shape) == 2 and kernel_shape[0] % block_size == 0


def quantize_kernel(w: Array, spec: QuantSpec, roles: str) -> QuantizedTensor:
    """`quantize` of a kernel whose trailing axes `roles` names."""
    kernel, axes = fold(w, check_roles(roles))
    q = quantize_rows(jnp.swapaxes(kernel, -1, -2), spec)
    return q if roles.lstrip("b") == LINEAR else dataclasses.replace(q, roles=roles.lstrip("b"), axes=axes)


@functools.partial(jax.jit, static_argnames="spec")
def quantize_rows(rows: Array, spec: QuantSpec) -> QuantizedTensor:
    """`quantize` of a weight that is given transposed, [*stack, out, in] or [n], as PyTorch stores it."""
    kernel_shape = rows.shape[-2:][::-1]
    stack = rows.shape[: -len(kernel_shape)]
    blocks = in_blocks(rows.astype(jnp.float32).reshape(*stack, -1), spec.block_size)
    codes, scales = spec.quantize(blocks)
    codes = spec.layout.pack(codes).reshape(*stack, -1)
    codes = codes[..., : spec.layout.nbytes(math.prod(kernel_shape), spec.block_size)]
    if keeps_rows(kernel_shape, spec.block_size):
        codes, scales = codes.reshape(*stack, kernel_shape[1], -1), scales.in_rows(kernel_shape[1])
    kind = NF4Tensor if isinstance(spec, NF4) else QuantizedTensor
    return kind(codes, scales, kernel_shape, spec, rows.dtype.name)
