"""8-bit AdamW against bitsandbytes' own, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from bitsandbytes.optim import AdamW8bit

import jlora
from jlora.quant.codes import DYNAMIC_CODE, UNSIGNED_DYNAMIC_CODE
from jlora.train import Checkpoints, adamw8bit, init_state, make_optimizer, make_step
from jlora.train import adam8bit as module

quick = pytest.mark.usefixtures("quick_compilation")
SHAPES = {"blocks": (24, 256), "odd": (71, 67), "stack": (2, 40, 64), "small": (4095,)}
SETTINGS = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
RATE = 1e-2
TABLES = {1: DYNAMIC_CODE, 2: UNSIGNED_DYNAMIC_CODE}


def draw(scale):
    rng = np.random.default_rng(0)
    # Magnitudes over many powers of ten, whole blocks of zeros, and zeros among others.
    arrays = {
        name: scale * rng.normal(size=s) * 10.0 ** rng.uniform(-4, 0, size=(*s[:-1], 1)) for name, s in SHAPES.items()
    }
    arrays["blocks"][3] = 0
    arrays["odd"][:, ::7] = 0
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def of(kept, name, which):
    """A moment of bitsandbytes' state."""
    codes = kept[f"state{which}"].numpy()
    if name == "small":
        return jnp.asarray(codes)
    zero = np.full(-codes.size % 256, np.searchsorted(TABLES[which], 0), np.uint8)
    codes = np.concatenate([codes.ravel(), zero]).reshape(-1, 256)
    return module.Packed(jnp.asarray(codes), jnp.asarray(kept[f"absmax{which}"].numpy()))


def decoded(packed, which, name):
    values = TABLES[which].astype(np.float64)[packed.codes] * np.asarray(packed.absmax, np.float64)[:, None]
    return values.ravel()[: np.prod(SHAPES[name])].reshape(SHAPES[name])


def test_every_step_is_bitsandbytes():
    params = draw(1.0)
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in params.items()}
    betas = SETTINGS["b1"], SETTINGS["b2"]
    optimizer = AdamW8bit(theirs.values(), lr=RATE, betas=betas, weight_decay=SETTINGS["weight_decay"])
    tx = adamw8bit(RATE, **SETTINGS)
    alone, state, update = params, tx.init(params), jax.jit(tx.update)
    own = state
    for step in range(6):
        grads = jax.tree.map(lambda x, step=step: x * jnp.float32(np.cos(step) + 0.1) + 1e-3 * step, draw(1e-2))
        for name, p in theirs.items():
            p.grad = torch.tensor(np.asarray(grads[name]))
        optimizer.step()
        old, (updates, state) = state[0], update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, own = update(grads, own, alone)
        alone = optax.apply_updates(alone, updates)
        for name, p in theirs.items():
            np.testing.assert_allclose(params[name], p.detach(), rtol=1e-5, atol=1e-6)
            for tree_name, which, b in (("mu", 1, betas[0]), ("nu", 2, betas[1])):
                ours, expected = getattr(state[0], tree_name)[name], of(optimizer.state[p], name, which)
                assert type(ours) is type(expected)
                if name == "small":
                    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-12)
                    continue
                np.testing.assert_allclose(ours.absmax, expected.absmax, rtol=2e-6, atol=1e-30)
                before = decoded(getattr(old, tree_name)[name], which, name)
                g = np.asarray(grads[name], np.float64)
                exact = b * before + (1 - b) * (g if which == 1 else g * g)
                mine, its = (decoded(packed, which, name) for packed in (ours, expected))
                scale = decoded(ours._replace(codes=np.full_like(ours.codes, 255)), which, name)
                # bitsandbytes' CPU kernel looks codes up in a table of 2^16 entries, which is coarse for small ones and zeros.
                assert np.all(np.abs(mine - exact) <= np.abs(its - exact) + 1e-6 * scale), (step, name, which)
                apart = (
                    np.abs(np.asarray(ours.codes, np.int32) - expected.codes).ravel()[: mine.size].reshape(mine.shape)
                )
                assert np.all((apart <= 1) | (np.abs(mine - its) <= 2**-14 * scale)), (step, name, which)
        # The next step from their state, so that every step is compared and not the first alone.
        params = {name: jnp.asarray(p.detach().numpy()) for name, p in theirs.items()}
        mu, nu = ({name: of(optimizer.state[p], name, which) for name, p in theirs.items()} for which in (1, 2))
        state = (module.Adam8bitState(jnp.int32(step + 1), mu, nu), *state[1:])
    for name in SHAPES:
        apart = np.abs(alone[name] - params[name])
        assert apart.mean() < RATE / 500 and apart.max() < RATE, "left to itself it stays beside theirs"


@quick
def test_moments_take_a_quarter():
    params = {"w": jnp.zeros((512, 512)), "norm": jnp.zeros(64)}
    size = jlora.nbytes(adamw8bit(RATE, **SETTINGS).init(params))
    assert size == 2 * (512 * 512 * (1 + 4 / 256) + 64 * 4) + 4  # the count


@pytest.mark.slow
@quick
def test_it_trains_and_its_state_is_saved(tmp_path):
    w = jax.random.normal(jax.random.key(0), (80, 64))
    x = jax.random.normal(jax.random.key(1), (32, 80))
    target = x @ w

    def loss_fn(params, batch, key):
        return jnp.sum(jnp.square(batch["x"] @ params["w"] - target)), jnp.int32(target.size)

    losses = {}
    for name, tx in {
        "8 bit": adamw8bit(3e-2, b1=0.9, b2=0.999, weight_decay=0.0),
        "float32": optax.adamw(3e-2, weight_decay=0.0),
    }.items():
        step, state = make_step(loss_fn, tx), init_state({"w": jnp.zeros((80, 64))}, tx)
        losses[name] = []
        for _ in range(40):
            state, metrics = step(state, None, {"x": x}, jax.random.key(0))
            losses[name].append(float(metrics["loss"]))
        if name == "8 bit":
            assert step._cache_size() == 1
            checkpoints = Checkpoints(tmp_path, keep=1)
            checkpoints.save(state)
            again = checkpoints.restore(init_state({"w": jnp.zeros((80, 64))}, tx), 40)
            jax.tree.map(np.testing.assert_array_equal, again, state)
    np.testing.assert_allclose(losses["8 bit"], losses["float32"], rtol=0.1, atol=0.02 * losses["float32"][0])
    assert losses["8 bit"][-1] < losses["8 bit"][0] / 10


@pytest.mark.slow
@quick
def test_layers_of_a_stack_are_packed_each_by_itself():
    """As PyTorch's parameters, so that both forms take the same step: 5000 elements are twenty blocks, the last not full."""
    draws = np.random.default_rng(0).normal(size=(2, 50, 100)).astype(np.float32)
    layers = {str(i): {"up": {"kernel": jnp.asarray(x)}} for i, x in enumerate(draws)}
    found = []
    for form in ({"model": {"layers": layers}}, jlora.stack_layers({"model": {"layers": layers}})):
        tx = make_optimizer("adamw8bit", RATE, form, weight_decay=0.1)
        updates, state = jax.jit(tx.update)(form, tx.init(form), form)
        packed = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, module.Packed))
        assert sum(len(x.codes) for x in packed if isinstance(x, module.Packed)) == 2 * 2 * 20
        found.append(updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), jlora.stack_layers(found[0]), found[1])


def test_the_moments_of_one_parameter_at_a_time_are_unpacked():
    def temporary(parameters: int) -> int:
        params = {f"{i}": jax.ShapeDtypeStruct((256, 1024), jnp.float32) for i in range(parameters)}
        tx = adamw8bit(RATE, **SETTINGS)
        compiled = (
            jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 2 * temporary(1)
