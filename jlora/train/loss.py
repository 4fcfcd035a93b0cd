"""The causal language model loss, whose logits never exist all at once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal

from jlora._numbers import IGNORED
from jlora._typing import AnyArray, Array, Batch, Bool, Float, Int, Params, PRNGKeyArray, PyTree
from jlora.lora import adapter_names, combine, linear, route, with_dropout
from jlora.models import Model
from jlora.models.causal import capped
from jlora.train.batch import Limits, check_form, check_numbers, model_arguments, soundness
from jlora.train.noise import sequence_lengths, with_noise
from jlora.train.objective import Objective
from jlora.weight import Weight, is_weight

LossFn: TypeAlias = Callable[[PyTree, Batch, PRNGKeyArray], tuple[Array, Array]]
"""(params, batch, key) -> (summed loss, float32 []; supervised tokens, int32 [])."""

CHUNK = {"cpu": 256, "gpu": 512}
"""Tokens whose logits are alive together, by backend: 512 x 128256 float32 logits are 263 MB.

On two CPU cores GPT-2's head and loss take 316 ms of CPU time with 256, 348 with 512, 362 with 128 (512 bfloat16 tokens;
float32: 791, 781 and 911); a new page costs about as much as its use, and the head is packed once a chunk.
"""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model whose distributions are learned from, beside the data."""

    model: Model
    """With the vocabulary of the model that learns."""
    weight: float
    """Share of the loss, in (0, 1]."""
    temperature: float


class Taught(NamedTuple):
    """The frozen trees of a step with a teacher; and the parameters of its loss."""

    student: PyTree
    teacher: Params


def causal_lm_loss(
    model: Model,
    *,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
    teacher: Teacher | None = None,
) -> "CausalLMLoss":
    """The loss of a model: summed cross-entropy of the next token, and how many tokens were supervised.

    `batch["labels"]` are at the positions of `input_ids` and shifted here, as in transformers; -100 is not supervised, nor
    is a label whose predecessor lies in another segment, nor padding (segment 0). Optional, of the same shape:

    - `segment_ids` (0 padding, 1 and more segments), `positions`.
    - `attention_mask` and `position_ids` as in transformers: 1 for tokens and 0 for padding on either side; positions that
      restart make segments where there is no mask. Every label but -100 counts beside a mask, as it does there.
    - `adapter_ids` (int32 [batch]) sends each row through its own adapter (`route`).

    Other keys are refused. `key` switches adapter dropout on; None leaves it off. Ask for the sum, not the mean: sums add up
    over micro-batches. `chunk`: see `CHUNK`.

    Ids and labels outside the vocabulary, and other numbers without a meaning, raise where the host can look at them; inside
    `jit` they make loss and gradient NaN. `make_step` looks before every step, at what lies in the host's memory.

    Args:
        label_smoothing: share of the targets that is spread over the vocabulary; transformers' `label_smoothing_factor`.
        neftune_alpha: size of the noise on the input embeddings where there is a key; 0: none. See `with_noise`.
        teacher: the loss is (1 - weight) of this one and weight of the divergence from the teacher's distribution
            (`Objective`). The step's base is then `Taught(base, the teacher's parameters)`, and its logits are made chunk by
            chunk too.
    """
    return CausalLMLoss(model, chunk, label_smoothing, neftune_alpha, teacher)


@dataclasses.dataclass(frozen=True)
class CausalLMLoss:
    """Made by `causal_lm_loss`; a `LossFn`."""

    model: Model
    chunk: int | None
    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0
    teacher: Teacher | None = None

    def combine(self, adapter: PyTree, base: PyTree) -> PyTree:
        """What the loss is called with, of the two arguments of a step."""
        if self.teacher is None:
            return combine(adapter, base)
        return Taught(combine(adapter, base.student), base.teacher)

    @property
    def objective(self) -> Objective:
        if self.teacher is None:
            return Objective(self.label_smoothing)
        return Objective(self.label_smoothing, self.teacher.weight, self.teacher.temperature)

    @property
    def limits(self) -> Limits:
        config = self.model.config
        return Limits(config.vocab_size, config.max_length if config.learned_positions else None)

    def check(self, batch: Batch, *, wait: bool = False) -> None:
        """Refuses a batch before a step. `wait`: look at arrays on an accelerator too, which holds the host until it is there.

        Raises:
            ValueError: for a key, a shape, a dtype or a number that has no meaning here, with the edit to make.
        """
        check_form(batch, self.limits)
        check_numbers(batch, self.limits, wait=wait)

    def __call__(self, params: PyTree, batch: Batch, key: PRNGKeyArray | None) -> tuple[Array, Array]:
        self.check(batch, wait=True)
        model, frozen = self.model, None
        if self.teacher is not None:
            params, frozen = params
        if key is not None:
            params = with_dropout(params, key)
        sound = soundness(batch, self.limits)
        if "adapter_ids" in batch:
            sound *= _known(batch["adapter_ids"], len(adapter_names(params)))
            params = route(params, batch["adapter_ids"])
        arguments = model_arguments(batch)
        ids = jnp.asarray(batch["input_ids"], jnp.int32)
        guide = None if self.teacher is None else _guide(self.teacher.model, frozen, ids, arguments)
        if key is not None and self.neftune_alpha > 0:
            masks = {name: arguments[name] for name in ("segment_ids", "attention_mask") if name in arguments}
            params = with_noise(params, model, sequence_lengths(ids, **masks), self.neftune_alpha, key)
        # Without `mutable` it is an array, which Flax does not say.
        hidden: Array = model.apply({"params": params}, ids, head=False, **arguments)  # pyright: ignore
        weight, transpose = model.output_head(params)
        if is_weight(weight) and weight.per_row:
            raise ValueError(
                "The loss takes the tokens of all rows together, and cannot send them through a head that differs by row. Leave "
                "`lm_head` out of the adapters' targets, or choose one adapter for the whole batch."
            )
        targets, supervised = next_tokens(jnp.asarray(batch["labels"], jnp.int32), arguments.get("segment_ids"))
        flat = hidden.reshape(-1, hidden.shape[-1])
        size = self.chunk or CHUNK.get(jax.default_backend(), CHUNK["gpu"])
        loss = cross_entropy(
            flat,
            weight,
            targets.reshape(-1),
            supervised.reshape(-1),
            transpose=transpose,
            chunk=size,
            cap=model.config.logit_cap,
            objective=self.objective,
            guide=guide,
        )
        return loss * sound, jnp.sum(supervised, dtype=jnp.int32)


def _known(adapter_ids: AnyArray, adapters: int) -> Array:
    """1 or NaN, as `soundness`: `route` cannot refuse traced numbers, and takes the nearest adapter."""
    if not isinstance(adapter_ids, Tracer):
        return jnp.ones(())
    return jnp.where(jnp.all((adapter_ids >= -1) & (adapter_ids < adapters)), 1.0, jnp.nan)


def next_tokens(
    labels: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None
) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """(the token each position predicts, whether that prediction is supervised)."""
    # Shifting the labels rather than slicing the hidden states keeps shapes whole.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    supervised = targets != IGNORED
    if segment_ids is not None:
        following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        supervised &= (following == segment_ids) & (segment_ids != 0)
    return targets, supervised


class Guide(NamedTuple):
    """Where a teacher's logits come from."""

    hidden: Float[Array, "tokens width"]
    weight: Any
    """Of its output head, an array or a `Weight`."""
    transpose: bool
    cap: float | None


def _guide(model: Model, params: Any, ids: Array, arguments: dict[str, Any]) -> Guide:
    params = jax.lax.stop_gradient(params)
    hidden: Any = model.apply({"params": params}, ids, head=False, **arguments)
    return Guide(hidden.reshape(-1, hidden.shape[-1]), *model.output_head(params), model.config.logit_cap)


def cross_entropy(
    hidden: Float[Array, "tokens d_model"],
    weight: Array | Weight,
    targets: Int[Array, " tokens"],
    supervised: Bool[Array, " tokens"],
    *,
    transpose: bool,
    chunk: int,
    cap: float | None = None,
    objective: Objective = Objective(),  # noqa: B008 (it is frozen)
    guide: Guide | None = None,
) -> Float[Array, ""]:
    """Summed cross-entropy of `linear(hidden, weight, transpose=transpose)` against `targets`, over supervised tokens.
    `cap` bounds the logits: `capped`. With an `objective` that of it, with a `guide` against the teacher's logits too.

    Supervised tokens are brought to the front and taken `chunk` at a time; chunks without any are not computed. The
    gradient is taken in the forward pass, while a chunk's logits are there, so they are made once: 4 rather than 6
    floating point operations a token and head weight, for a residual of the size of `hidden`. Supervised targets must be in the
    vocabulary: the caller checks.

    Reference: the idea is Liger Kernel's fused linear cross-entropy, arXiv:2410.10989.
    """
    tokens = hidden.shape[0]
    chunk = min(chunk, tokens)
    order = jnp.argsort(~supervised, stable=True)
    pad = -tokens % chunk
    order = jnp.pad(order, (0, pad), constant_values=tokens)  # out of range: taken as zero rows

    def rows_of(hidden):
        return jnp.take(hidden, order, axis=0, mode="fill", fill_value=0).reshape(-1, chunk, hidden.shape[1])

    ids = jnp.take(targets, order, mode="fill", fill_value=0).reshape(-1, chunk)
    live = jnp.take(supervised, order, mode="fill", fill_value=False).reshape(-1, chunk)
    plan = _Plan(objective, transpose, cap, *((None, None) if guide is None else guide[2:]))
    frozen = None if guide is None else (rows_of(guide.hidden), guide.weight)
    return _chunked(plan, rows_of(hidden), weight, jnp.where(live, ids, 0), live, frozen)


class _Plan(NamedTuple):
    """What is fixed when a loss is compiled."""

    objective: Objective
    transpose: bool
    cap: float | None
    guide_transpose: bool | None
    guide_cap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan, rows, weight, ids, live, guide):
    needed = [False] * (1 + len(jax.tree.leaves(weight)))
    return _scan_chunks(plan, rows, weight, ids, live, guide, needed)[0]


def _scan_chunks(plan, rows, weight, ids, live, guide, needed: list[bool]):
    """(loss, [gradient of the rows, gradients of the weight's leaves...], each None where it is not needed)."""
    leaves, treedef = jax.tree.flatten(weight)

    def chosen(values):
        return [value for value, need in zip(values, needed, strict=True) if need]

    def compute(x, y, mask, told):
        given = [x, *leaves]

        def logits_of(*moving):
            moving = iter(moving)
            x, *mixed = [next(moving) if need else value for value, need in zip(given, needed, strict=True)]
            y = linear(x, jax.tree.unflatten(treedef, mixed), transpose=plan.transpose, out_dtype=jnp.float32)
            return capped(y, plan.cap)

        logits, pull = jax.vjp(logits_of, *chosen(given))
        teacher = None
        if told is not None:
            teacher = linear(told, guide[1], transpose=plan.guide_transpose, out_dtype=jnp.float32)
            teacher = capped(teacher, plan.guide_cap)
        losses, gradient = plan.objective(logits, y, teacher)
        return jnp.sum(jnp.where(mask, losses, 0.0)), list(pull(jnp.where(mask[:, None], gradient, 0.0)))

    def body(carry, chunk):
        x, y, mask, told = chunk
        skipped = jnp.zeros(()), [jnp.zeros_like(value) for value in chosen([x, *leaves])]
        loss, grads = jax.lax.cond(jnp.any(mask), compute, lambda *_: skipped, x, y, mask, told)
        # A chunk's rows have gradients of their own; those of the weight are summed.
        dx, dw = grads[: needed[0]], grads[needed[0] :]
        return (carry[0] + loss, [a + b for a, b in zip(carry[1], dw, strict=True)]), dx

    start = jnp.zeros(()), [jnp.zeros_like(leaf) for leaf, need in zip(leaves, needed[1:], strict=True) if need]
    (loss, dw), dx = jax.lax.scan(body, start, (rows, ids, live, guide and guide[0]))
    found = iter([*dx, *dw])
    return loss, [next(found) if need else None for need in needed]


def _chunked_fwd(plan, rows, weight, ids, live, guide):
    primals, treedef = jax.tree.flatten(weight, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    weight = jax.tree.unflatten(treedef, [p.value for p in primals])
    guide = jax.tree.map(lambda p: p.value, guide, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    needed = [p.perturbed for p in (rows, *primals)]
    loss, (drows, *dleaves) = _scan_chunks(plan, rows.value, weight, ids.value, live.value, guide, needed)
    return loss, (drows, jax.tree.unflatten(treedef, dleaves))


def _chunked_bwd(plan, residuals, g):
    drows, dweight = jax.tree.map(lambda x: (g * x).astype(x.dtype), residuals)
    return drows, dweight, None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
