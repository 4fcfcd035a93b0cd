"""What the model graphs share: modules over the seam, norms, the two ways to run layers."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora._typing import Array, DTypeLike, Float
from jlora.lora import embed, linear
from jlora.models.context import Context, alternatives
from jlora.weight import as_dense

Remat = Literal["none", "attention", "dots", "layer"]
"""What the backward pass calculates again, from least to most: nothing, the attention weights, all of a layer but the outputs of
its linear modules, all of a layer. (Norms, and activations between products, it always does.)"""

INIT_STD = 0.02  # GPT-2's and Llama's `initializer_range`


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Any:
    """The module's parameter, whatever kind of value it is.

    `nn.Module.param` compares shapes leaf by leaf and would refuse a `Weight` where it initialized an array.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


def vector(module: nn.Module, name: str, init: Callable, size: int, dtype: DTypeLike) -> Float[Array, " size"]:
    """A bias or a scale in `dtype`, whatever kind of value the parameter is."""
    return as_dense(parameter(module, name, init, (size,)), dtype)


class Linear(nn.Module):
    """`x @ kernel + bias` through the seam; kernel [in, out]."""

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = parameter(self, "kernel", nn.initializers.normal(INIT_STD), (x.shape[-1], self.features))
        y = linear(x, kernel)
        if self.use_bias:
            y = y + vector(self, "bias", nn.initializers.zeros, self.features, y.dtype)
        return y


class Embed(nn.Module):
    """Rows of an embedding [vocab, d_model], in `dtype`."""

    vocab: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids):
        table = parameter(self, "embedding", nn.initializers.normal(INIT_STD), (self.vocab, self.features))
        return embed(ids, table).astype(self.dtype)


class Head(nn.Module):
    """Holds an untied head's kernel [d_model, vocab]."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self):
        return parameter(self, "kernel", nn.initializers.normal(INIT_STD), self.shape)


_KEEPS = contextvars.ContextVar("keeps", default=False)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """What is traced in it keeps for the backward pass what `recomputed` would calculate again."""
    token = _KEEPS.set(True)
    try:
        yield
    finally:
        _KEEPS.reset(token)


def recomputed(*, static_argnums: int | tuple[int, ...] = ()) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """`jax.checkpoint` of a few operations by an element: calculating them again costs less than keeping them."""

    def decorate(function: Callable[..., Array]) -> Callable[..., Array]:
        again, kept = (
            jax.checkpoint(function, static_argnums=static_argnums, policy=policy)
            for policy in (None, jax.checkpoint_policies.everything_saveable)
        )
        return functools.wraps(function)(lambda *arguments: (kept if _KEEPS.get() else again)(*arguments))

    return decorate


@recomputed(static_argnums=1)
def normed(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """Divided by the root of the mean square, float32; again in the backward pass, as with `gelu`."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = vector(self, "scale", nn.initializers.ones, x.shape[-1], x.dtype)
        return scale * normed(x, self.eps).astype(x.dtype)


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = vector(self, "scale", nn.initializers.ones, x.shape[-1], jnp.float32)
        bias = vector(self, "bias", nn.initializers.zeros, x.shape[-1], jnp.float32)
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        return (normed(centered, self.eps) * scale + bias).astype(x.dtype)


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


@recomputed()
def gelu(x: Float[Array, "*batch d_ff"]) -> Float[Array, "*batch d_ff"]:
    """The tanh form, computed in float32.

    Its backward pass starts from `x` again. Autodiff would keep three arrays like it, 8.6 MB a layer with 512 bfloat16
    tokens, whose writing costs more than a second tanh: 48 against 54 ms of CPU time a layer, float32 118 against 121.
    """
    return gelu_tanh(x.astype(jnp.float32)).astype(x.dtype)


@recomputed(static_argnums=0)
def gated(
    activation: Callable[[Array], Array], gate: Float[Array, "*batch d_ff"], up: Float[Array, "*batch d_ff"]
) -> Float[Array, "*batch d_ff"]:
    """`activation(gate) * up`, computed in float32 and rounded once; from `gate` and `up` again in the backward pass.

    XLA:CPU has no vectorized exponential of bfloat16.
    """
    return (activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class Layers(nn.Module):
    """Layers one after the other, each with its own subtree "0", "1", …"""

    block: Callable[..., nn.Module]
    kinds: Sequence[int]

    @nn.compact
    def __call__(self, x, cache, contexts):
        caches = []
        for i, kind in enumerate(self.kinds):
            x, cache_i = self.block(name=str(i))(x, None if cache is None else cache[i], contexts[kind])
            caches.append(cache_i)
        return x, None if cache is None else caches


_OUTPUT = "linear"  # the name of the outputs of linear modules, by which they are kept
_POLICIES: Mapping[str, Callable | None] = {
    "dots": jax.checkpoint_policies.save_only_these_names(_OUTPUT),
    "layer": None,
}
"""What is kept of a layer beside its input, where the layer is what is calculated again.

Outputs are named rather than found as products: a `LoraWeight`'s are several, of float32 sums that nothing needs later.
"""


def _rematerialized(layer: Any, remat: Remat, **options: Any) -> Any:
    return nn.remat(layer, policy=_POLICIES[remat], **options) if remat in _POLICIES else layer


def _naming_outputs(remat: Remat) -> contextlib.AbstractContextManager:
    """In it the outputs of linear modules have their name, if that is asked for: other programs stay as they are."""

    def named(call, arguments, options, context):
        y = call(*arguments, **options)
        return checkpoint_name(y, _OUTPUT) if isinstance(context.module, Linear) else y

    return nn.intercept_methods(named) if remat == "dots" else contextlib.nullcontext()


def run_layers(
    parent: nn.Module,
    name: str,
    block: type[nn.Module],
    remat: Remat,
    x,
    cache,
    contexts: Sequence[Context],
    kinds: Sequence[int],
    **kwargs,
):
    """Runs a block a layer in the form that the parameters have: unrolled per layer, or one `nn.scan` over a stack.

    Args:
        parent: the module whose compact method calls this; holds the layers' parameters under `name`.
        block: module class; called as `block(**kwargs)(x, cache, context) -> (x, cache)`.
        remat: what is calculated again in the backward pass.
        cache: None, a list of `KVCache`, or one stacked `KVCache`.
        contexts, kinds: of `contexts_of`.

    Returns:
        (x, updated cache)
    """
    stacked = not parent.is_initializing() and "0" not in parent.variables["params"][name]
    if remat == "attention":
        contexts = [context.replace(recompute=True) for context in contexts]
    if not stacked:
        block = _rematerialized(block, remat)
        layers = Layers(lambda name: block(**kwargs, name=name), tuple(kinds), name=name)
        with _naming_outputs(remat):
            return layers(x, cache, contexts)
    differing = alternatives(contexts) if len(contexts) > 1 else {}

    def layer(block, x, own, context, differing):
        cache, kind = own
        chosen = jax.tree.map(lambda alternatives: alternatives[kind], differing)
        with _naming_outputs(remat):
            return block(x, cache, context.replace(**chosen))

    scanned = nn.scan(
        # The choice is rematerialized with the layer, or every layer would keep its mask.
        _rematerialized(layer, remat, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": False},
        in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        out_axes=0,
        length=len(kinds),
    )
    own = cache, jnp.asarray(kinds) if differing else None
    return scanned(block(**kwargs, name=name), x, own, contexts[0], differing)
