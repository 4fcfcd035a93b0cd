"""One jitted training step: gradient of the adapter alone, accumulated by tokens, applied by optax."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlora._processor import compiler_options
from jlora._typing import Array, Batch, Int, PRNGKeyArray, PyTree
from jlora.lora import combine
from jlora.train.loss import LossFn
from jlora.train.loss_scale import loss_scale
from jlora.train.offload import Offloaded, to_host
from jlora.tree.paths import path_string


class TrainState(NamedTuple):
    """Everything a step changes."""

    step: Int[Array, ""]
    """Steps done, int32."""
    adapter: PyTree
    opt_state: optax.OptState


Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps


def init_state(adapter: PyTree, tx: Optimizer) -> TrainState:
    """The state before the first step. Every leaf is an array of its own: steps donate their state, and yours stays usable
    (some optimizers begin with the parameters themselves, or with one array in several places).

    Raises:
        ValueError: when there is nothing to train, or the optimizer cannot begin with the adapter.
    """
    if not jax.tree.leaves(adapter):
        raise ValueError("`init_state` got no trainable leaves. Pass the adapter half of `jlora.split(params)`.")
    adapter, tx = _owned(adapter), _optimizer(tx)
    try:
        opt_state = tx.init(adapter)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`tx.init` fails on the adapter: {error}. The parameters are a tree of arrays, with None where nothing is trained; "
            "optimizers of another kind of tree (such as `optax.lookahead`, of `LookaheadParams`) are not for `make_step`."
        ) from error
    opt_state = _owned(_as_updated(tx, adapter, opt_state))
    return TrainState(jnp.zeros((), jnp.int32), adapter, to_host(opt_state) if isinstance(tx, Offloaded) else opt_state)


def _owned(tree: PyTree) -> PyTree:
    """Copies of all leaves, none of them weakly typed: a step gives strong types back, and would be compiled again for them."""
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True), tree)


def _as_updated(tx: optax.GradientTransformationExtraArgs, adapter: PyTree, opt_state: PyTree) -> PyTree:
    """The state with the dtypes that updates give it: gradients are float32 at least, and so are moments of a bfloat16 adapter
    from the first step on. It would be compiled again for them."""
    if all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapter)):
        return opt_state
    grads = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), adapter)

    def loss(adapter):
        return (
            jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(adapter)])),
            jnp.int32(1),
            grads,
        )

    extra = {"value": jnp.zeros(()), "grad": grads, **_functions(loss)}
    try:
        after = jax.eval_shape(lambda s: _updated(tx, grads, TrainState(jnp.int32(0), adapter, s), extra)[1], opt_state)
    except (ValueError, TypeError):
        return opt_state  # the step itself says what is wrong
    return jax.tree.map(lambda x, like: x.astype(like.dtype), opt_state, after)


def _optimizer(tx: Optimizer) -> optax.GradientTransformationExtraArgs:
    """`tx` as a transformation that takes extra arguments."""
    if isinstance(tx, optax.MultiSteps):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)  # pyright: ignore[reportArgumentType]
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"`tx` must be an optax transformation; got {tx!r}. Call its maker: `optax.adamw(1e-4)`.")
    return optax.with_extra_args_support(tx)


def make_step(loss_fn: LossFn, tx: Optimizer, *, accumulate: int = 1, grad_norms: bool = False) -> "Step":
    """`step(state, base, batch, key) -> (state, metrics)`, jitted; donates `state`, never `base`.

    The loss is differentiated with respect to `state.adapter`; `base` (the frozen half of `split`, or None for full
    fine-tuning) gets no gradient, moment or copy. With `accumulate=k` the batch's rows are cut into k micro-batches, whose
    summed losses and gradients are divided by their supervised tokens once: the result is that of the whole batch.

    A loss with a method `check(batch)`, as `causal_lm_loss` makes them, is asked before every step; it looks at what lies in
    the host's memory and never waits for a device. Inside another `jit`, and in `step.lower(…).compile()`, nothing can be
    looked at; such a loss then is NaN. One with a method `combine(adapter, base)` is called with what that gives.

    Args:
        loss_fn: (params, batch, key) -> (summed loss, supervised tokens).
        tx: any optax transformation, clipping included. Those that ask for them get `value` (the mean loss), `grad`, and
            `value_fn` and `grad_fn` of the adapter on this batch: polyak_sgd, lbfgs, momo, sam, reduce_on_plateau. With
            `dynamic_loss_scale` outermost the loss is scaled before it is differentiated, for models in float16.
        accumulate: micro-batches in a batch; must divide its rows.
        grad_norms: tell the norm of each gradient too.

    Returns:
        metrics, float32 []: "loss" (nats a supervised token), "tokens" (supervised), "grad_norm" (before `tx`); and, if asked
        for, "grad_norms", float32 [leaves of the adapter].
        A batch without supervised tokens has loss 0 and a zero gradient.

    Raises:
        ValueError: on the first call, when `accumulate` does not divide the rows, when `tx` asks for what a step does not
            have, or leaves some gradients as they are (`optax.masked` does: adding them would climb).
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` must be at least 1; got {accumulate}.")
    tx = _optimizer(tx)
    join = getattr(loss_fn, "combine", combine)

    def summed(adapter, base, batch, key):
        loss, tokens = loss_fn(join(adapter, base), batch, key)
        return loss, jnp.asarray(tokens)  # of a loss of one's own, perhaps a number of Python

    def gradient(adapter, base, batch, key, scale):
        if scale is None:
            return jax.value_and_grad(summed, has_aux=True)(adapter, base, batch, key)
        loss, pull, tokens = jax.vjp(lambda a: summed(a, base, batch, key), adapter, has_aux=True)
        # What is scaled is the mean, as in torch: a sum's own gradient could overflow.
        factor = scale / jnp.maximum(tokens, 1)
        return (loss, tokens), jax.tree.map(lambda g: g / factor, pull(factor)[0])

    def accumulated(adapter, base, batch, key, scale):
        if accumulate == 1:
            return gradient(adapter, base, batch, key, scale)
        micro = _micro_batches(dict(batch), accumulate)
        start = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(gradient, adapter, base, jax.tree.map(lambda x: x[0], micro), key, scale),
        )

        def body(total, inputs):
            index, batch = inputs
            part = gradient(adapter, base, batch, jax.random.fold_in(key, index), scale)
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(body, start, (jnp.arange(accumulate), micro))[0]

    def mean(adapter, base, batch, key, scale):
        (loss, tokens), grads = accumulated(adapter, base, batch, key, scale)
        weight = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
        return loss * weight, tokens, jax.tree.map(lambda g: g * weight, grads)

    def step(state: TrainState, base: PyTree, batch: Batch, key: PRNGKeyArray):
        scaling = loss_scale(state.opt_state)
        scale = None if scaling is None else scaling.scale
        loss, tokens, grads = mean(state.adapter, base, batch, key, scale)
        metrics = {"loss": loss, "tokens": tokens.astype(jnp.float32), "grad_norm": optax.tree.norm(grads)}
        if grad_norms:
            metrics["grad_norms"] = jnp.stack([optax.tree.norm(g) for g in jax.tree.leaves(grads)])
        again = functools.partial(mean, base=base, batch=batch, key=key, scale=scale)
        extra = {"value": loss, "grad": grads, **_functions(again)}
        updates, opt_state = _updated(tx, grads, state, extra)
        return TrainState(state.step + 1, optax.apply_updates(state.adapter, updates), opt_state), metrics

    jit = functools.partial(jax.jit, step, donate_argnums=0)
    return Step(jit(compiler_options=compiler_options()), jit(), getattr(loss_fn, "check", None))


class Step:
    """A jitted step whose batch is looked at before; everything else of it (`lower`, `trace`, …) is the jitted one's."""

    def __init__(self, jitted: Callable, inner: Callable, check: Callable[[Batch], None] | None):
        """`inner`: the same, as a part of another program, where `jax.jit` takes no compiler options."""
        self._jitted, self._inner, self._check = jitted, inner, check
        functools.update_wrapper(self, jitted, updated=())

    def __call__(
        self, state: TrainState, base: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        if self._check is not None:
            self._check(batch)
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((state, base, batch, key)))
        return (self._inner if traced else self._jitted)(state, base, batch, key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def _micro_batches(batch: dict[str, Array], accumulate: int) -> dict[str, Array]:
    """The rows of every array, cut: [batch, …] -> [accumulate, batch / accumulate, …]."""
    counts = {name: jnp.shape(x)[0] if jnp.ndim(x) else 0 for name, x in batch.items()}
    rows = next(iter(counts.values()))
    if len(set(counts.values())) > 1:
        raise ValueError(f"`accumulate` cuts the rows of every array of a batch; got {counts} rows. Give each its own.")
    if rows % accumulate:
        raise ValueError(f"`accumulate` must divide the rows of a batch; got {rows} rows and accumulate={accumulate}.")
    return jax.tree.map(lambda x: x.reshape(accumulate, rows // accumulate, *x.shape[1:]), batch)


def _functions(mean: Callable[[PyTree], tuple[Array, Array, PyTree]]) -> dict[str, Callable]:
    """What line searches and SAM evaluate at other parameters; traced by those alone that use it."""

    @jax.custom_vjp
    def value(adapter):
        return mean(adapter)[0]

    # The loss of a batch is a scan over micro-batches, whose gradient is taken within: it is not differentiated again.
    def forward(adapter):
        loss, _, grads = mean(adapter)
        return loss, grads

    value.defvjp(forward, lambda grads, g: (jax.tree.map(lambda x: g * x, grads),))

    # A line search refuses extra arguments that its function does not take.
    def value_fn(adapter, grad_fn=None):
        return value(adapter)

    return {"value_fn": value_fn, "grad_fn": lambda adapter, index: mean(adapter)[2]}


def _updated(
    tx: optax.GradientTransformationExtraArgs, grads: PyTree, state: TrainState, extra: dict[str, PyTree]
) -> tuple[PyTree, PyTree]:
    """(updates, optimizer state).

    Raises:
        ValueError: when `tx` fails, or leaves some gradients as they are.
    """
    taken = inspect.signature(tx.update).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in taken.values()):
        extra = {name: value for name, value in extra.items() if name in taken}
    try:
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter, **extra)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`tx.update` fails: {error}. A training step gives an optimizer {', '.join(extra) or 'no extra arguments'} and the "
            "adapter as a tree of arrays (None where nothing is trained). Those that need more, such as `optax.lookahead` (two "
            "copies) and `optax.contrib.sophia` (second derivatives), are not for it."
        ) from error
    raw = [
        path_string(path)
        for (path, g), u in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(updates), strict=True)
        if u is g
    ]
    if raw and len(raw) < len(jax.tree.leaves(grads)):
        raise ValueError(
            f"`tx` leaves the gradients of {len(raw)} parameters as they are ({raw[0]!r} first), and adding them would raise the "
            'loss. `optax.masked` does so; freeze with `optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)`.'
        )
    return updates, opt_state
