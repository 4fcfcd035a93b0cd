"""How much memory a training step will take, from shapes alone."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from jlora._processor import compiler_options
from jlora._typing import DTypeLike, Params, PyTree
from jlora.lora import LoraConfig, add_lora, combine, is_stacked, split, stack_layers
from jlora.models import Model, abstract_params, remat_without_effect, replace
from jlora.models.layers import keeping
from jlora.quant import QuantSpec, from_file, quantize_params
from jlora.quant.ggml import GGML
from jlora.train.loss import CHUNK, causal_lm_loss
from jlora.train.offload import Offloaded, is_moved
from jlora.train.step import TrainState, init_state
from jlora.tree.paths import flatten, layer_path, map_with_path, nbytes
from jlora.weight import is_adapted, is_weight, origin


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step, by what they hold."""

    weights: int
    """The frozen parameters, packed ones as packed."""
    adapter: int
    """What is trained, float32: factors, magnitudes, biases, whole modules."""
    optimizer: int
    """The optimizer's state, two float32 moments of the adapter for AdamW; of one that is offloaded, scalars."""
    gradients: int
    """Of the adapter; twice with accumulation."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    working: int
    """The largest of what is alive within one layer, unpacked kernels included, within one chunk of the loss, and of what comes
    from the host for the update."""
    host: int = 0
    """In the host's memory, not the device's: the optimizer's state where it is offloaded."""

    @property
    def peak(self) -> int:
        """Of the device."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.host


def abstract_tree(
    model: Model,
    lora: LoraConfig | None,
    *,
    dtype: DTypeLike,
    quantize: QuantSpec | Mapping[str, GGML] | None,
    stack: bool,
) -> Params:
    """The parameters as `jax.ShapeDtypeStruct` leaves, quantized, stacked and adapted; nothing is allocated.

    Args:
        quantize: how the linear kernels are; or path -> format of those that a file packs.
    """

    def packed(path, leaf):
        spec = quantize.get(path) if isinstance(quantize, Mapping) else None
        if spec is None:
            return leaf
        d_in, d_out = leaf.shape
        blocks = jnp.zeros((d_out, d_in // spec.block_size * spec.file_bytes), jnp.uint8)
        return from_file(blocks, spec, leaf.dtype.name)

    def build(params):
        params = map_with_path(packed, jax.tree.map(lambda x: x.astype(dtype), params))
        if stack:
            params = stack_layers(params)
        if isinstance(quantize, QuantSpec):
            params = quantize_params(params, quantize)
        return params if lora is None else add_lora(params, lora, key=jax.random.key(0))

    return jax.eval_shape(build, abstract_params(model))


def abstract_batch(batch_size: int, length: int, *, segments: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("input_ids", "labels") + (("segment_ids",) if segments else ())
    return {name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32) for name in names}


def abstract_state(adapter: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step as `jax.ShapeDtypeStruct` leaves, where they are kept."""
    state = jax.eval_shape(lambda a: init_state(a, tx), adapter)
    if not isinstance(tx, Offloaded):
        return state
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host) if is_moved(x) else x

    return state._replace(opt_state=jax.tree.map(placed, state.opt_state))


def predict(
    model: Model,
    params: Params,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    length: int,
    accumulate: int = 1,
) -> Memory:
    """Predicts the memory of `make_step(causal_lm_loss(model), tx, accumulate=accumulate)`; nothing is compiled or allocated.

    Args:
        params: arrays or `jax.ShapeDtypeStruct` leaves; of an unadapted tree all of it is trained.
        batch_size: rows of a micro-batch.
        length: tokens of a row.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    adapter, base = halves(params)
    on_cpu = jax.default_backend() == "cpu"
    stacked = is_stacked(params)
    if remat_without_effect(model, stacked=stacked, length=length):
        model = replace(model, remat="none")
    saved = _saved(model, adapter, base, batch_size, length)
    # What a layer would keep if it recomputed nothing is also what lives while its gradient is computed; XLA:CPU makes less of it.
    if on_cpu and model.remat == "none":
        one_layer = saved // model.config.depth
    else:
        with contextlib.nullcontext() if on_cpu else keeping():
            one_layer = _saved(replace(model, remat="none"), adapter, base, batch_size, length) // model.config.depth
    # Of the head's weight, XLA:CPU's products make a rearranged copy each while they run, outside the compiler's plan.
    extra = 2 * nbytes(model.output_head(params)[0]) if on_cpu else 0
    if on_cpu and model.dtype == jnp.bfloat16 and not stacked:
        saved += saved // 2  # some products are kept as they were before they were rounded
    elif on_cpu and model.dtype in (jnp.bfloat16, jnp.float16):
        one_layer *= 2  # its products are float32 until they are rounded
        if model.dtype == jnp.bfloat16 and not compiler_options():
            # XLA:CPU carries what a scan keeps in float32, and takes the conversion of a dense stack out of the loop.
            saved, extra = 2 * saved, extra + 2 * _dense_stacks(base)
    tokens = batch_size * length
    chunk = min(tokens, CHUNK.get(jax.default_backend(), CHUNK["gpu"]))
    # Logits, their exponentials and their gradient, which is cast for the product.
    head = chunk * model.config.vocab_size * (3 * 4)
    state = jax.eval_shape(tx.init, adapter)
    host = sum(nbytes(x) for x in jax.tree.leaves(state) if is_moved(x)) if isinstance(tx, Offloaded) else 0
    return Memory(
        weights=nbytes(base),
        adapter=nbytes(adapter),
        optimizer=nbytes(state) - host,
        gradients=nbytes(adapter) * (2 if accumulate > 1 else 1),
        activations=saved,
        working=max(max(one_layer + _unpacked(base, model.dtype), head) + extra, host - saved),
        host=host,
    )


def halves(params: Params) -> tuple[PyTree, PyTree]:
    """(what is trained, what is frozen): all of an unadapted tree, and None."""
    return split(params) if any(map(is_adapted, flatten(params).values())) else (params, None)


def _saved(model: Model, adapter: PyTree, base: PyTree, batch_size: int, length: int) -> int:
    """Bytes that the forward pass of the loss keeps, the parameters themselves left out."""
    batch = abstract_batch(batch_size, length)

    def residuals(adapter, base, batch):
        return jax.vjp(lambda a: causal_lm_loss(model)(combine(a, base), batch, None)[0], adapter)[1]

    given: dict[tuple, int] = {}
    for leaf in jax.tree.leaves((adapter, base)):
        given[leaf.shape, leaf.dtype] = given.get((leaf.shape, leaf.dtype), 0) + 1
    total = 0
    for leaf in jax.tree.leaves(jax.eval_shape(residuals, adapter, base, batch)):
        left = given.get((leaf.shape, leaf.dtype), 0)
        if left:
            given[leaf.shape, leaf.dtype] = left - 1
        else:
            total += leaf.size * leaf.dtype.itemsize
    return total


def _unpacked(base: PyTree, dtype: DTypeLike) -> int:
    """Bytes of the two largest quantized kernels, unpacked."""
    sizes = sorted(w.unpacked_size for w in flatten(base).values() if is_weight(w))
    return sum(sizes[-2:]) * jnp.dtype(dtype).itemsize


def _dense_stacks(base: PyTree) -> int:
    """Bytes of the dense kernels that lie in stacked layers."""
    kernels = [origin(leaf) for path, leaf in flatten(base).items() if layer_path(path, 0)]
    return sum(nbytes(kernel) for kernel in kernels if not is_weight(kernel))


def planned(compiled: Any) -> int:
    """Peak bytes in the plan of a compiled step: arguments, results that are not donated arguments, and temporaries."""
    plan = compiled.memory_analysis()
    assert plan is not None  # every backend that jlora runs on makes one
    return plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one for want of memory: Python's, or XLA's of any backend."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
