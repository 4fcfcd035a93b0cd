"""The training step: what it computes, and what must not exist in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import walk
from steps import GPT2, LLAMA, RANK, build, make_batch

import jlora
from jlora._processor import compiler_options
from jlora.lora import adapted_modules
from jlora.models import model_from_config
from jlora.train.loss import cross_entropy
from jlora.train.memory import abstract_tree
from jlora.tree.paths import flatten
from jlora.weight import einsum

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "fields", [pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow), pytest.param(LLAMA, id="llama")]
)
@pytest.mark.parametrize("stack", [False, True])
def test_accumulated_micro_batches_are_one_batch(fields, stack):
    model, adapter, base = build(fields, stack=stack)
    tx = optax.sgd(1.0)
    results = []
    for k in (1, 2, 3):
        step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx, accumulate=k)
        state, metrics = step(jlora.train.init_state(adapter, tx), base, make_batch(), jax.random.key(0))
        results.append((state.adapter, metrics))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[0], other)
    assert float(results[0][1]["tokens"]) == (make_batch()["labels"][:, 1:] != -100).sum()
    with pytest.raises(ValueError, match="must divide the rows"):
        step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx, accumulate=4)
        step(jlora.train.init_state(adapter, tx), base, make_batch(), jax.random.key(0))


def plain_loss(model, params, batch):
    logits = model.apply({"params": params}, batch["input_ids"])[:, :-1]
    targets = batch["labels"][:, 1:]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(targets != -100, picked, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [5, 16, 66, 512])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_chunked_loss_is_the_plain_one(chunk, share):
    model, adapter, base = build(LLAMA)
    batch = make_batch(share=share)
    loss_fn = jlora.train.causal_lm_loss(model, chunk=chunk)

    def ours(adapter):
        return loss_fn(jlora.combine(adapter, base), batch, None)[0]

    got = jax.jit(jax.value_and_grad(ours))(adapter)
    want = jax.jit(jax.value_and_grad(lambda a: plain_loss(model, jlora.combine(a, base), batch)))(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)
    assert share > 0 or float(got[0]) == 0.0


@pytest.mark.few(1)
@pytest.mark.parametrize("transpose", [False, True])
def test_head_gradients_dense_and_adapted(transpose):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(31, 8) if transpose else (8, 31)), jnp.float32)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((head.shape[0], 2), (2, head.shape[1])))
    adapted = jlora.LoraWeight(base=head, lora_A=a, lora_B=b, scaling=0.5)
    targets, live = jnp.asarray(rng.integers(0, 31, 20)), jnp.asarray(rng.random(20) < 0.7)

    def chunked(hidden, weight):
        return cross_entropy(hidden, weight, targets, live, transpose=transpose, chunk=6)

    def plain(hidden, weight):
        dense = weight if isinstance(weight, jax.Array) else weight.base + 0.5 * weight.lora_A @ weight.lora_B
        logits = hidden @ (dense.T if transpose else dense)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1)[:, 0]
        return -jnp.sum(jnp.where(live, picked, 0.0))

    for weight in (head, adapted):
        got, want = (jax.value_and_grad(f, argnums=(0, 1))(hidden, weight) for f in (chunked, plain))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("remat", ["none", "layer"])
def test_nothing_of_a_frozen_kernel_is_made(stack, accumulate, remat):
    """No product, scan output, gradient or moment has a base kernel's shape, stacked or not."""
    model, adapter, base = build(LLAMA, stack=stack, remat=remat)
    tx = jlora.train.adamw(1e-3, weight_decay=0.01, max_grad_norm=1.0, b1=0.9, b2=0.999)
    state = jlora.train.init_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx, accumulate=accumulate)
    kernels = {leaf.base.shape[-2:] for leaf in flatten(base).values() if isinstance(leaf, jlora.LoraWeight)}
    forbidden = {s for k in kernels for t in (k, k[::-1]) for s in (t, (2, *t), (accumulate, *t))}
    forbidden |= {(113, 40), (40, 113)}
    jaxpr = jax.make_jaxpr(step)(state, base, make_batch(), jax.random.key(0)).jaxpr
    made = [
        (eqn.primitive.name, out.aval.shape)
        for eqn in walk(jaxpr)
        # Slicing a stack and naming its rows makes no new weight; everything else would.
        if eqn.primitive.name
        not in ("pjit", "jit", "squeeze", "dynamic_slice", "reshape", "optimization_barrier", "copy")
        for out in eqn.outvars
        if tuple(getattr(out.aval, "shape", ())) in forbidden
    ]
    assert not made
    assert not {x.shape for x in jax.tree.leaves(state)} & forbidden


@pytest.mark.slow
def test_memory_grows_by_activations_and_adapter_only():
    """Twice the layers: the temporary memory of a step grows by less than one layer's dense weights."""
    fields = LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
    temps, layer_bytes = [], 0
    for depth in (2, 4):
        model = model_from_config(fields | {"num_hidden_layers": depth}, dtype=jnp.float32, remat="layer")
        config = jlora.LoraConfig(rank=RANK)
        adapter, base = jlora.split(abstract_tree(model, config, dtype=jnp.float32, quantize=None, stack=True))
        tx = optax.adam(1e-3)
        step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
        ids = np.zeros((1, 8), np.int32)
        state = jax.eval_shape(lambda adapter, tx=tx: jlora.train.init_state(adapter, tx), adapter)
        compiled = step.lower(state, base, {"input_ids": ids, "labels": ids}, jax.random.key(0)).compile()
        plan = compiled.memory_analysis()
        temps.append(plan.temp_size_in_bytes)
        adapted = [leaf.base for leaf in flatten(base).values() if isinstance(leaf, jlora.LoraWeight)]
        layer_bytes = sum(4 * kernel.size // depth for kernel in adapted)
        assert plan.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), (
            "it is donated"
        )
    assert layer_bytes > 2**20 and (temps[1] - temps[0]) / 2 < layer_bytes / 4


def test_the_base_is_bit_identical_after_training_and_yours_stays_usable():
    model, adapter, base = build(GPT2)
    before = jax.tree.map(np.array, base)
    tx = optax.adam(1e-2)
    state = jlora.train.init_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    losses = []
    for _ in range(5):
        state, metrics = step(state, base, make_batch(), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, base)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter)), "the caller's adapter was donated"
    assert step._cache_size() == 1


@pytest.mark.slow
def test_full_fine_tuning_is_the_same_step():
    model, adapter, base = build(GPT2)
    params = jlora.merge(jlora.combine(adapter, base))
    tx = optax.sgd(0.1)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    batch = make_batch()
    state, metrics = step(jlora.train.init_state(params, tx), None, batch, jax.random.key(0))
    tokens = float(metrics["tokens"])
    grads = jax.grad(lambda p: plain_loss(model, p, batch) / tokens)(params)
    jax.tree.map(lambda p, g, n: np.testing.assert_allclose(p - 0.1 * g, n, atol=1e-5), params, grads, state.adapter)


@pytest.mark.few(1)
@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_packed_loss_is_the_sum_of_the_unpacked(fields):
    """Each of mask, positions and border label is needed; GPT-2's learned positions show the second."""
    model, adapter, base = build(fields)
    params = jlora.combine(adapter, base)
    loss_fn = jlora.train.causal_lm_loss(model)
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 113, (1, 4)), rng.integers(0, 113, (1, 5))
    alone = sum(float(loss_fn(params, {"input_ids": x, "labels": x}, None)[0]) for x in (first, second))
    ids = np.concatenate([first, second, np.zeros((1, 2), int)], axis=1)
    batch = {"input_ids": ids, "labels": ids, "segment_ids": np.array([[1] * 4 + [2] * 5 + [0] * 2])}
    packed, tokens = loss_fn(params, batch, None)
    np.testing.assert_allclose(float(packed), alone, rtol=1e-5)
    assert int(tokens) == 3 + 4
    without_positions = batch | {"positions": np.arange(11)[None]}
    moved = abs(float(loss_fn(params, without_positions, None)[0]) - alone) > 1e-3
    assert moved == (fields is GPT2)
    no_mask = {k: v for k, v in batch.items() if k != "segment_ids"}
    assert abs(float(loss_fn(params, no_mask, None)[0]) - alone) > 1e-3


@pytest.mark.slow
def test_dropout_needs_a_key_and_is_the_same_in_every_form():
    for fields in (GPT2, LLAMA):
        losses = []
        for stack, remat in ((False, "none"), (True, "none"), (True, "layer"), (False, "layer")):
            model, adapter, base = build(fields, stack=stack, remat=remat, dropout=0.3)
            loss_fn = jlora.train.causal_lm_loss(model)
            params = jlora.combine(adapter, base)
            losses.append(
                [float(loss_fn(params, make_batch(), k)[0]) for k in (None, jax.random.key(1), jax.random.key(2))]
            )
        np.testing.assert_allclose(losses, [losses[0]] * 4, rtol=1e-5)
        assert len({round(x, 4) for x in losses[0]}) == 3


@pytest.mark.slow
def test_mask_for_optax_over_the_whole_tree():
    """partition with set_to_zero leaves the base alone; masked alone adds raw gradients to it."""
    model, adapter, base = build(GPT2)
    params = jlora.combine(adapter, base)
    mask = jlora.adapter_mask(params)
    grads = jax.grad(lambda p: plain_loss(model, p, make_batch()))(params)
    moved = {}
    for name, tx in {
        "partition": optax.partition({True: optax.sgd(0.1), False: optax.set_to_zero()}, mask),
        "masked": optax.masked(optax.sgd(0.1), mask),
    }.items():
        updates, _ = tx.update(grads, tx.init(params), params)
        _, moved_base = jlora.split(optax.apply_updates(params, updates))
        moved[name] = any(
            bool((a != b).any()) for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(moved_base), strict=True)
        )
    assert moved == {"partition": False, "masked": True}


@pytest.mark.slow
def test_bfloat16_products_have_operands_of_one_dtype():
    """A mixed bfloat16 x float32 product in the backward pass is slow on every backend."""
    model, adapter, base = build(LLAMA, dtype=jnp.bfloat16)
    loss_fn = jlora.train.causal_lm_loss(model)
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: loss_fn(jlora.combine(a, base), make_batch(), None)[0]))(adapter)
    dots = [eqn for eqn in walk(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) > 20
    assert all(eqn.invars[0].aval.dtype == eqn.invars[1].aval.dtype == jnp.bfloat16 for eqn in dots)


def test_einsum_gradients_are_jax_s():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 7), (7, 3)))
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(einsum("ti,io->to", jnp.dtype("float32"), x, w))), argnums=(0, 1))(
        x, w
    )
    jaxs = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, jaxs)
    for argnum, shape in ((0, (7, 3)), (1, (5, 7))):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(einsum("ti,io->to", jnp.dtype("float32"), x, w)), argnum))(
            x, w
        )
        dots = [e.outvars[0].aval.shape for e in walk(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
        assert shape not in dots, "a gradient that nobody asked for was computed"


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 32), (7, 32), (32,)], ids=str)
def test_a_bfloat16_gradient_of_a_kernel_is_right_whatever_follows(shape, transpose):
    """XLA:CPU turns a product round for a transpose that follows, and cannot run what it makes of some of bfloat16."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (48, 32) if transpose else (32, 48))

    def loss(x, w):
        return jnp.sum(jnp.sin(jlora.linear(x, w, transpose=transpose, out_dtype=jnp.float32)))

    @jax.jit
    def gradients(x, w):
        g = jax.grad(loss, argnums=1)(x, w)
        return g, g.T, g @ g.T

    exact = gradients(x.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32))
    for ours, expected in zip(gradients(x, w), exact, strict=True):
        assert jnp.linalg.norm(ours - expected) < 0.01 * jnp.linalg.norm(expected)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable leaves"):
        jlora.train.init_state({"a": None}, optax.adam(1e-3))
    with pytest.raises(ValueError, match="`accumulate` must be at least 1"):
        jlora.train.make_step(lambda *_: None, optax.adam(1e-3), accumulate=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_ones_own_may_count_in_python(accumulate):
    def loss_fn(params, batch, key):
        return jnp.sum(params["w"] * batch["x"]), batch["x"].shape[0]

    tx, batch = optax.sgd(1.0), {"x": jnp.array([1.0, 2.0, 3.0, 6.0])}
    step = jlora.train.make_step(loss_fn, tx, accumulate=accumulate)
    state, metrics = step(jlora.train.init_state({"w": jnp.ones(())}, tx), None, batch, jax.random.key(0))
    assert (float(metrics["tokens"]), float(metrics["loss"]), float(state.adapter["w"])) == (4.0, 3.0, -2.0)


def test_layers_of_a_stack_are_told_apart():
    _, adapter, base = build(LLAMA, stack=True)
    modules = adapted_modules(jlora.combine(adapter, base))
    first, second = (modules[f"model.layers.{i}.self_attn.q_proj"].lora_A for i in (0, 1))
    assert not np.array_equal(first, second)
    assert dataclasses.is_dataclass(modules["model.layers.0.mlp.up_proj"])


@pytest.mark.slow
def test_a_bfloat16_stack_stays_bfloat16():
    """A plain program of XLA:CPU makes float32 of the whole stack of each kernel. (Elsewhere, and on processors without
    bfloat16, none is asked for.)"""
    model, adapter, base = build(LLAMA, dtype=jnp.bfloat16, stack=True)
    tx = optax.sgd(1e-2)
    state = jlora.train.init_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    text = step.lower(state, base, make_batch(), jax.random.key(0)).compile().as_text()
    stacks = {kernel.shape for path, kernel in flatten(base).items() if path.endswith("kernel") and kernel.ndim == 3}
    wide = [shape for shape in stacks if f"f32[{','.join(map(str, shape))}]" in text]
    assert stacks and bool(wide) == (not compiler_options())


@pytest.mark.slow
def test_a_step_inside_another_program_is_the_step():
    model, adapter, base = build(LLAMA)
    tx = optax.sgd(1e-2)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    states = [jlora.train.init_state(adapter, tx) for _ in range(2)]
    alone, metrics = step(states[0], base, make_batch(), jax.random.key(0))
    within, inner = jax.jit(lambda state: step(state, base, make_batch(), jax.random.key(0)))(states[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (alone, metrics), (within, inner))
