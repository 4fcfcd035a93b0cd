"""The chunked loss, the product under it and the attention: gradients, dtypes, and what must not be computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxprs import walk
from transformers.trainer_pt_utils import LabelSmoother

from jlora.data import IGNORED
from jlora.lora import LoraWeight, linear
from jlora.models.attention import attention
from jlora.models.causal import capped
from jlora.models.gpt2 import gelu
from jlora.train.loss import Guide, cross_entropy, next_tokens
from jlora.train.objective import Objective
from jlora.weight import einsum

TOKENS, WIDTH, VOCAB, RANK = 23, 16, 41, 3
pytestmark = pytest.mark.usefixtures("quick_compilation")

SHARES = (1.0, 0.5, 0.0)
# Of the largest element. bfloat16 keeps 8 bits: hidden states, logits' gradients and the result are each rounded once.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1.5e-2}


def close(got, expected, dtype):
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    return np.abs(got - expected).max() <= TOLERANCE[dtype] * max(np.abs(expected).max(), 1e-6)


def head_of(kind, dtype):
    """(weight, transpose) of a head of each kind; a LoRA factor B that is not zero."""
    keys = jax.random.split(jax.random.key(1), 3)
    kernel = jax.random.normal(keys[0], (WIDTH, VOCAB)).astype(dtype)
    if kind == "transposed":
        return kernel.T, True
    if kind == "kernel":
        return kernel, False
    a, b = jax.random.normal(keys[1], (WIDTH, RANK)), jax.random.normal(keys[2], (RANK, VOCAB))
    return LoraWeight(base=kernel, lora_A=a, lora_B=b, scaling=0.5), False


def example(share, dtype):
    """(hidden, targets, supervised)"""
    hidden = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH)).astype(dtype)
    targets = jax.random.randint(jax.random.key(2), (TOKENS,), 0, VOCAB)
    supervised = jnp.asarray(np.random.default_rng(0).random(TOKENS) < share)
    return hidden, jnp.where(supervised, targets, IGNORED), supervised


def plain_loss(hidden, weight, targets, supervised, *, transpose):
    """All logits at once, in float32, by autodiff."""
    logits = linear(hidden, weight, transpose=transpose, out_dtype=jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(supervised, picked, 0.0))


def torch_loss(objective, logits, targets, supervised, teacher):
    """Of PyTorch and transformers, summed over the supervised tokens."""
    labels = torch.tensor(np.where(supervised, targets, IGNORED)).long()[None]
    smoothed = LabelSmoother(objective.label_smoothing)({"logits": logits[None]}, labels, num_items_in_batch=1)
    if teacher is None:
        return smoothed
    ours, theirs = ((x / objective.temperature).log_softmax(-1)[supervised] for x in (logits, teacher))
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    weight = objective.teacher_weight
    return (1 - weight) * smoothed + weight * objective.temperature**2 * divergence


@pytest.mark.parametrize(
    ("objective", "guided"),
    [
        (Objective(label_smoothing=0.2), False),
        (Objective(teacher_weight=0.7, temperature=2.0), True),
        (Objective(label_smoothing=0.1, teacher_weight=0.5, temperature=0.5), True),
    ],
    ids=["smoothed", "taught", "both"],
)
def test_other_objectives_are_torch_s_and_no_logits_are_whole(objective, guided):
    hidden, targets, supervised = example(0.5, jnp.float32)
    weight, _ = head_of("kernel", jnp.float32)
    keys = jax.random.split(jax.random.key(3))
    wider = jax.random.normal(keys[0], (TOKENS, 2 * WIDTH)), jax.random.normal(keys[1], (VOCAB, 2 * WIDTH))
    guide = Guide(*wider, transpose=True, cap=5.0) if guided else None

    def loss(hidden, weight, guide):
        kinds = {"transpose": False, "chunk": 5, "objective": objective, "guide": guide}
        return cross_entropy(hidden, weight, targets, supervised, **kinds)

    # What is fixed of the guide is no array.
    taught = jax.value_and_grad(lambda h, w, arrays: loss(h, w, guide and guide._replace(**arrays)), (0, 1))
    arrays = guide and {"hidden": guide.hidden, "weight": guide.weight}
    value, gradients = jax.jit(taught)(hidden, weight, arrays)
    leaves = [torch.tensor(np.array(x), requires_grad=True) for x in (hidden, weight)]
    teacher = guide and torch.tensor(np.array(capped(linear(wider[0], wider[1], transpose=True), 5.0)))
    expected = torch_loss(objective, leaves[0] @ leaves[1], np.array(targets), np.array(supervised), teacher)
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    for ours, leaf in zip(gradients, leaves, strict=True):
        assert close(ours, leaf.grad, jnp.float32)
    jaxpr = jax.make_jaxpr(taught)(hidden, weight, arrays)
    assert not [e for e in walk(jaxpr.jaxpr) for out in e.outvars if out.aval.shape[-2:] == (TOKENS, VOCAB)]


def dots(fn, *args):
    return [e for e in walk(jax.make_jaxpr(fn)(*args).jaxpr) if e.primitive.name == "dot_general"]


@functools.cache
def plain_gradients(transpose):
    """Compiled once for all chunk sizes."""
    return jax.jit(jax.value_and_grad(functools.partial(plain_loss, transpose=transpose), (0, 1)))


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["transposed", "kernel", "lora"])
@pytest.mark.parametrize("chunk", [5, TOKENS, 64])
def test_chunked_loss_and_its_gradients_are_the_plain_ones(chunk, kind, dtype):
    weight, transpose = head_of(kind, dtype)
    chunked = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, transpose=transpose, chunk=chunk), (0, 1)))
    for share in SHARES:
        hidden, targets, supervised = example(share, dtype)
        loss, grads = chunked(hidden, weight, targets, supervised)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (hidden, weight))
        expected_loss, expected = plain_gradients(transpose)(*wide, targets, supervised)
        assert loss.dtype == jnp.float32 and close(loss, expected_loss, dtype), share
        for got, like, want in zip(*map(jax.tree.leaves, (grads, (hidden, weight), expected)), strict=True):
            assert got.dtype == like.dtype and close(got, want, dtype), share


def test_nothing_supervised_is_zero_and_never_nan():
    weight, transpose = head_of("lora", jnp.float32)
    # Not even through rows that could not be trained on.
    hidden, targets, supervised = example(0.0, jnp.float32)
    hidden = hidden.at[0].set(jnp.inf)
    loss, grads = jax.value_and_grad(cross_entropy, (0, 1))(
        hidden, weight, targets, supervised, transpose=transpose, chunk=4
    )
    assert loss == 0.0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_only_supervised_rows_get_a_gradient():
    weight, transpose = head_of("kernel", jnp.float32)
    hidden, targets, supervised = example(0.5, jnp.float32)
    grad = jax.grad(cross_entropy)(hidden, weight, targets, supervised, transpose=transpose, chunk=4)
    assert ((np.abs(grad).max(axis=1) > 0) == np.asarray(supervised)).all()


def test_a_label_counts_when_its_predecessor_is_in_its_segment():
    labels = jnp.array([[5, 6, 7, IGNORED, 9, 3, 4, 8]])
    targets, supervised = next_tokens(labels, None)
    assert targets[0].tolist() == [6, 7, IGNORED, 9, 3, 4, 8, IGNORED]
    assert supervised[0].tolist() == [True, True, False, True, True, True, True, False]
    # Two segments, then padding: the 9 starts the second, and the 4 and 8 are padding.
    _, supervised = next_tokens(labels, jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]]))
    assert supervised[0].tolist() == [True, True, False, False, True, False, False, False]


@pytest.mark.parametrize("kind", ["transposed", "kernel"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_no_more_logits_exist_than_those_of_a_chunk(kind, dtype):
    weight, transpose = head_of(kind, dtype)
    chunk = 4

    def loss(hidden):
        return cross_entropy(hidden, weight, targets, supervised, transpose=transpose, chunk=chunk)

    hidden, targets, supervised = example(0.5, dtype)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(hidden).jaxpr
    outs = [v.aval for e in walk(jaxpr) for v in e.outvars]
    # The frozen head itself may be passed around, but nothing may be made of its gradient.
    sizes = [a.size for a in outs if jnp.issubdtype(a.dtype, jnp.floating) and VOCAB in a.shape]
    assert max(sizes) == chunk * VOCAB
    for dot in (e for e in walk(jaxpr) if e.primitive.name == "dot_general"):
        assert dot.outvars[0].aval.size < WIDTH * VOCAB
        assert {v.aval.dtype for v in dot.invars} == {jnp.dtype(dtype)}, "T4: mixed operands are slow on every backend"
        assert dot.outvars[0].aval.dtype == jnp.float32


SPECS = {"ti,io->to": ((7, 5), (5, 6)), "ti,oi->to": ((7, 5), (6, 5)), "bsi,bij->bsj": ((2, 3, 5), (2, 5, 4))}


@pytest.mark.few(3)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_einsum_gradients_are_those_of_jnp_einsum(spec, dtype):
    a, b = (jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in enumerate(SPECS[spec]))

    def scalar(product):
        return lambda a, b: jnp.sum(jnp.sin(product(a, b).astype(jnp.float32)))

    got = jax.grad(scalar(lambda a, b: einsum(spec, jnp.dtype(jnp.float32), a, b)), (0, 1))(a, b)
    wide = (a.astype(jnp.float32), b.astype(jnp.float32))
    expected = jax.grad(scalar(lambda a, b: jnp.einsum(spec, a, b, precision="highest")), (0, 1))(*wide)
    assert all(x.dtype == dtype and close(x, y, dtype) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("trained", [0, 1])
def test_a_frozen_operand_costs_no_product_and_no_residual(trained):
    x, w = jnp.ones((7, 5), jnp.bfloat16), jnp.ones((5, 6), jnp.bfloat16)
    frozen_shape = (w, x)[trained].shape

    def loss(a, b):
        return jnp.sum(einsum("ti,io->to", jnp.dtype(jnp.bfloat16), a, b).astype(jnp.float32))

    made = dots(jax.grad(loss, trained), x, w)
    assert len(made) == 2
    for dot in made:
        assert dot.outvars[0].aval.shape != frozen_shape
        assert [v.aval.dtype for v in dot.invars] == [jnp.bfloat16] * 2
    _, pull = jax.vjp(lambda v: loss(*((v, w) if trained == 0 else (x, v))), (x, w)[trained])
    # What is kept: the frozen operand, never the trained one.
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size]
    assert frozen_shape in shapes and (x, w)[trained].shape not in shapes


def test_an_update_is_two_thin_products():
    weight, _ = head_of("lora", jnp.bfloat16)
    x = jnp.ones((TOKENS, WIDTH), jnp.bfloat16)

    def loss(x, a, b):
        value = LoraWeight(base=weight.base, lora_A=a, lora_B=b, scaling=0.5)
        return jnp.sum(linear(x, value).astype(jnp.float32))

    made = dots(jax.grad(loss, (0, 1, 2)), x, weight.lora_A, weight.lora_B)
    assert not any(sorted(e.outvars[0].aval.shape) == [WIDTH, VOCAB] for e in made)
    assert all([v.aval.dtype for v in e.invars] == [jnp.bfloat16] * 2 for e in made)


@pytest.mark.few(5)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2)], ids=str)
@pytest.mark.parametrize(("seq", "kv_len"), [(7, None), (7, 10), (1, 5)], ids=str)
def test_attention_and_its_gradients_are_those_of_softmax(seq, kv_len, heads, dtype):
    n_heads, kv_heads = heads
    keys = jax.random.split(jax.random.key(3), 4)
    length = kv_len or seq
    shapes = [(2, seq, n_heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8)]
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=False))
    mask = None if kv_len is None else jax.random.bernoulli(keys[3], 0.6, (2, seq, length)).at[..., 0].set(True)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, n_heads // kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / jnp.sqrt(8.0)
        seen = jnp.tril(jnp.ones((seq, length), bool))[None] if mask is None else mask
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhst,bthd->bshd", weights, v)

    def run(fn, *args):
        out, pull = jax.vjp(fn, *args)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))

    got = jax.jit(lambda *args: run(lambda *a: attention(*a, mask), *args))(q, k, v)
    expected = jax.jit(lambda *args: run(plain, *args))(*(x.astype(jnp.float32) for x in (q, k, v)))
    # A bfloat16 weight and a bfloat16 score gradient are rounded before they are multiplied; with few of them the sums
    # that cancel keep that error.
    scale = 3 if dtype == jnp.bfloat16 else 2
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        assert np.abs(np.asarray(x, np.float32) - y).max() <= scale * TOLERANCE[dtype] * max(np.abs(y).max(), 1.0)


def test_a_query_that_sees_no_key_has_no_gradient_through_its_scores():
    q, k, v = (jax.random.normal(key, (1, 3, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    mask = jnp.ones((1, 3, 3), bool).at[0, 1].set(False)
    out = attention(q, k, v, mask)
    assert np.allclose(out[0, 1], v[0].mean(axis=0), atol=1e-6)
    dq = jax.grad(lambda q: jnp.sum(attention(q, k, v, mask) ** 2))(q)
    assert (dq[0, 1] == 0).all() and (dq[0, 0] != 0).all()


@pytest.mark.slow
def test_gelu_is_the_tanh_form_and_keeps_its_input_alone():
    x = jnp.linspace(-6, 6, 101)
    for fn in (lambda f: f(x), lambda f: jax.grad(lambda x: jnp.sum(f(x)))(x)):
        assert np.allclose(fn(gelu), fn(lambda x: jax.nn.gelu(x, approximate=True)), atol=1e-6)
    wide = jnp.ones((4, 8), jnp.bfloat16)
    _, pull = jax.vjp(gelu, wide)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull) if leaf.size > 1] == [((4, 8), jnp.bfloat16)]
