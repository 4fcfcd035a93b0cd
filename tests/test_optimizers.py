"""Every optimizer of optax in the training step, against a plain loop: states that keep the parameters, extra arguments, dtypes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jlora
from jlora.train import init_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
ADAPTER = {
    "w": {"lora_A": 0.5 * jax.random.normal(KEY, (4, 3)), "base": None},
    "lora_B": jax.random.normal(KEY, (3, 2)),
}
BATCH = {"x": jax.random.normal(KEY, (6, 4))}


def loss_fn(params, batch, key):
    error = jnp.sin(batch["x"] @ params["w"]["lora_A"]) @ params["lora_B"] - 1.0
    return jnp.sum(jnp.square(error)), jnp.int32(len(batch["x"]))


def mean(adapter):
    total, tokens = loss_fn(adapter, BATCH, None)
    return total / tokens


def is_a(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: "lora_A" in str(path), tree)


def names(tree):
    return jax.tree.map(lambda a: "train" if a else "freeze", is_a(tree))


PERTURB = optax.chain(contrib.normalize(), optax.sgd(0.05))
MAKERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lbfgs": lambda: optax.lbfgs(),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "prodigy": lambda: contrib.prodigy(),
    "mechanize": lambda: contrib.mechanize(optax.adam(1e-2)),
    "cocob": lambda: contrib.cocob(),
    "dog": lambda: contrib.dog(),
    "madgrad": lambda: contrib.madgrad(1e-2),
    "momo": lambda: contrib.momo(),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(1e-2), 1e-2),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau(patience=1)),
    "sam": lambda: contrib.sam(optax.adam(1e-2), PERTURB),
    "sam opaque": lambda: contrib.sam(optax.adam(1e-2), PERTURB, opaque_mode=True),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "MultiSteps of polyak_sgd": lambda: optax.MultiSteps(optax.polyak_sgd(), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(optax.cosine_decay_schedule(1e-2, 9)),
    "partition": lambda: optax.partition({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, names),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2, key=0),
    "clip and ema of updates": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2), optax.ema(0.9)),
}


def plain(tx, adapter, steps):
    """What optax's own documentation does."""
    tx = optax.GradientTransformationExtraArgs(tx.init, tx.update) if isinstance(tx, optax.MultiSteps) else tx
    taken = inspect.signature(tx.update).parameters
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state):
        value, grad = jax.value_and_grad(mean)(adapter)
        extra = {"value": value, "grad": grad, "value_fn": mean}
        if "grad_fn" in taken:
            extra = {"grad_fn": lambda p, i: jax.grad(mean)(p)}
        elif not isinstance(tx, optax.GradientTransformationExtraArgs):
            extra = {}
        updates, state = tx.update(grad, state, adapter, **extra)
        return optax.apply_updates(adapter, updates), state

    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter


def run(tx, steps=4, adapter=ADAPTER, accumulate=2):
    step = make_step(loss_fn, tx, accumulate=accumulate)
    state = init_state(adapter, tx)
    for _ in range(steps):
        state, metrics = step(state, None, BATCH, KEY)
        assert np.isfinite(metrics["loss"])
    assert step._cache_size() == 1, "a state changed its dtype"
    return state


@pytest.mark.few(2)
@pytest.mark.parametrize("name", MAKERS)
def test_the_step_follows_optax(name):
    state = run(MAKERS[name]())
    expected = plain(MAKERS[name](), ADAPTER, 4)
    assert int(state.step) == 4
    # A line search that stands before a tie may take another turn for rounding.
    tolerance = 1e-3 if name in ("lbfgs", "backtracking") else 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), state.adapter, expected)


def everything():
    """(name, transformation) of all that optax makes with no argument or a learning rate."""
    for module in (optax, contrib):
        for name, maker in vars(module).items():
            if name.startswith("_") or not callable(maker) or not name.islower() or name in REFUSED:
                continue
            for arguments in ((), (1e-2,), (optax.sgd(1e-2),)):
                try:
                    tx = maker(*arguments)
                    assert tx.init and tx.update
                except Exception:
                    continue
                yield pytest.param(tx, id=f"{module.__name__}.{name}")
                break


# Not optimizers of a tree of arrays by a gradient: each says so.
REFUSED = {
    "galore", "scale_by_galore", "scale_by_muon", "lookahead", "sophia", "hutchinson_estimator_diag_hessian",
    "scale_by_schedule", "stateless", "stateless_with_tree_map", "split_real_and_imaginary", "differentially_private_aggregate",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tx", list(everything()))
def test_all_that_optax_makes(tx):
    run(tx, steps=3)


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")  # in optax's L-BFGS
@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free", "MultiSteps", "lbfgs"])
def test_a_bfloat16_adapter_is_one_program(name):
    state = run(MAKERS[name](), adapter=jlora.cast(ADAPTER, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(state.adapter)} == {jnp.dtype(jnp.bfloat16)}


def test_weakly_typed_adapters_are_one_program_and_stay_usable():
    adapter = {"w": {"lora_A": jnp.full((4, 3), 0.5), "base": None}, "lora_B": jnp.full((3, 2), 0.1)}
    assert jax.tree.leaves(adapter)[0].weak_type
    run(optax.adam(1e-2), adapter=adapter)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.lookahead(optax.adam(1e-2), 3, 0.5), "no attribute 'fast'.*such as `optax.lookahead`"),
        (
            contrib.sophia(1e-2),
            "obj_fn must be provided.*A training step gives an optimizer value, grad, value_fn, grad_fn",
        ),
        (contrib.galore(1e-2), "`tx.init` fails on the adapter"),
        (optax.adam, "must be an optax transformation.*Call its maker"),
        (optax.masked(optax.adam(1e-2), is_a), "leaves the gradients of 1 parameters as they are.*optax.partition"),
    ],
    ids=["lookahead", "sophia", "galore", "a maker", "masked"],
)
def test_what_a_step_cannot_run_is_refused_by_name(tx, message):
    with pytest.raises(ValueError, match=message):
        run(tx)
