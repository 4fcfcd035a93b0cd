"""From tree to tree: add, split, combine, merge, mask, dropout, the two forms; and `LoraWeight` behind the seam."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import same_bits

import jlora
from jlora import LoraConfig, LoraWeight
from jlora.lora import is_stacked
from jlora.models import replace
from jlora.tree.paths import flatten, map_with_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)
IDS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) % 97
CONFIG = LoraConfig(rank=4, alpha=6.0)


def normal(*shape, seed=0):
    """NumPy's, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_factors(params, seed=3):
    """The same adapter with random lora_A and lora_B, so that it does something."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if not isinstance(leaf, LoraWeight):
            return leaf
        a, b = (jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32) for x in (leaf.lora_A, leaf.lora_B))
        return dataclasses.replace(leaf, lora_A=a, lora_B=b)

    return map_with_path(one, params)


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """(family, dtype, stacked) -> (model, params), loaded once."""
    cache = {}

    def get(family, dtype=jnp.float32, stack=False):
        if (key := (family, jnp.dtype(dtype), stack)) not in cache:
            cache[key] = jlora.load(checkpoints[family][0], dtype=dtype, stack=stack)
        return cache[key]

    return get


@pytest.fixture(scope="module")
def gpt2(loaded):
    return loaded("gpt2")


# Invariants 1 and 2


@pytest.mark.few(1)
@pytest.mark.parametrize("stack", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_tree_invariants(loaded, family, dtype, stack):
    model, params = loaded(family, dtype, stack)
    before = jax.tree.map(np.array, params)

    def logits(params):
        return model.apply({"params": params}, IDS)

    # Compiled as a whole in one family only, to save time; a stack's layers are compiled in all of them.
    logits = jax.jit(logits) if family == "qwen2" else logits
    for init in ("kaiming", "gaussian"):
        adapted = jlora.add_lora(params, LoraConfig(rank=4, init=init), key=KEY)
        adapter, base = jlora.split(adapted)
        assert same_bits(jlora.combine(adapter, base), adapted)
        assert same_bits(jlora.combine(*jlora.split(with_factors(adapted))), with_factors(adapted))
        assert same_bits(jlora.merge(adapted), params)
        assert np.asarray(logits(adapted)).tobytes() == np.asarray(logits(params)).tobytes()

    # The untouched and the frozen are the caller's own objects: nothing was copied.
    removed = flatten(jlora.remove_lora(adapted))
    assert removed.keys() == flatten(params).keys()
    assert all(removed[path] is leaf for path, leaf in flatten(params).items())
    assert same_bits(before, params)

    # Frozen means absent.
    factors = jax.tree_util.tree_leaves_with_path(adapter)
    assert {path[-1].name for path, _ in factors} == {"lora_A", "lora_B"}
    assert all(leaf.dtype == jnp.float32 and 4 in leaf.shape[-2:] for _, leaf in factors)
    assert not {"lora_A", "lora_B"} & {
        getattr(path[-1], "name", "") for path, _ in jax.tree_util.tree_leaves_with_path(base)
    }
    assert jlora.count(adapter) + jlora.count(base) == jlora.count(adapted)
    assert jlora.count(base) == jlora.count(params)


def test_merge_is_the_sum_in_float32(gpt2):
    adapted = with_factors(jlora.add_lora(gpt2[1], CONFIG, key=KEY))
    merged = flatten(jlora.merge(adapted))
    for path, leaf in flatten(adapted).items():
        expected = np.asarray(leaf.base if isinstance(leaf, LoraWeight) else leaf, np.float64)
        if isinstance(leaf, LoraWeight):
            expected = expected + 1.5 * np.asarray(leaf.lora_A, np.float64) @ np.asarray(leaf.lora_B, np.float64)
        np.testing.assert_allclose(merged[path], expected, atol=1e-6)


def test_merged_bfloat16_is_rounded_once():
    base = jnp.full((8, 8), 1.0, jnp.bfloat16)
    weight = LoraWeight(base, jnp.full((8, 1), 0.003), jnp.ones((1, 8)), scaling=2.0)
    # 1.006 rounds to 1.0078; the update rounded alone, 0.006, would be lost or doubled.
    assert jlora.merge({"w": weight})["w"].dtype == jnp.bfloat16
    assert (jlora.merge({"w": weight})["w"] == jnp.bfloat16(1.006)).all()


def test_gradients_and_moments_exist_for_the_adapter_alone(gpt2):
    model, params = gpt2
    adapter, base = jlora.split(with_factors(jlora.add_lora(params, CONFIG, key=KEY)))
    loss = lambda a: jnp.sum(model.apply({"params": jlora.combine(a, base)}, IDS) ** 2)  # noqa: E731
    shapes = jax.eval_shape(jax.grad(loss), adapter)
    assert jax.tree.structure(shapes) == jax.tree.structure(adapter)
    moments = jax.tree.leaves(jax.eval_shape(optax.adam(1e-3).init, adapter))
    kernels = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert not kernels & {leaf.shape for leaf in [*moments, *jax.tree.leaves(shapes)]}


# Errors of split, combine and add_lora


def test_split_without_an_adapter(gpt2):
    with pytest.raises(ValueError, match=r"`split` found no adapter.*`add_lora\(params, config, key=key\)`"):
        jlora.split(gpt2[1])


def test_combine_names_the_leaf_that_both_or_neither_half_has(gpt2):
    adapted = jlora.add_lora(gpt2[1], LoraConfig(rank=2, targets=["c_fc"]), key=KEY)
    adapter, base = jlora.split(adapted)
    with pytest.raises(ValueError, match=r"both halves have 'transformer/h/0/mlp/c_fc/kernel/lora_A'"):
        jlora.combine(adapter, adapted)
    with pytest.raises(ValueError, match=r"neither half has 'transformer/h/0/attn/c_attn/bias'"):
        jlora.combine(adapter, adapter)
    with pytest.raises(ValueError, match=r"both halves have 'transformer/h/0/attn/c_attn/bias'"):
        jlora.combine(base, base)


def test_combine_refuses_halves_of_different_trees(gpt2):
    one = jlora.add_lora(gpt2[1], LoraConfig(rank=2, targets=["c_fc"]), key=KEY)
    other = jlora.add_lora(gpt2[1], LoraConfig(rank=2, targets=["c_fc", "c_attn"]), key=KEY)
    for a, b in ((one, other), (other, one)):
        with pytest.raises(ValueError):
            jlora.combine(jlora.split(a)[0], jlora.split(b)[1])


def test_combine_with_nothing_frozen_is_full_fine_tuning(gpt2):
    assert jlora.combine(gpt2[1], None) is gpt2[1]


def test_combine_keeps_the_dropout_key_of_the_base(gpt2):
    params = jlora.with_dropout(jlora.add_lora(gpt2[1], LoraConfig(rank=2, dropout=0.5), key=KEY), KEY)
    adapter, base = jlora.split(params)
    weight = jlora.combine(adapter, base)["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"]
    assert weight.key is params["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"].key
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapter))


def test_adapting_twice_is_refused(gpt2):
    adapted = jlora.add_lora(gpt2[1], LoraConfig(targets=["c_fc"]), key=KEY)
    with pytest.raises(
        ValueError, match=r"'transformer/h/0/mlp/c_fc/kernel' and 1 more are adapted already.*remove_lora"
    ):
        jlora.add_lora(adapted, LoraConfig(targets=["c_attn"]), key=KEY)
    assert same_bits(jlora.add_lora(jlora.remove_lora(adapted), LoraConfig(targets=["c_fc"]), key=KEY), adapted)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0]},
        {"rank_pattern": {r"h\.1\..*": 2}},
        {"alpha_pattern": {r"h\.1\..*": 2.0}},
        {"exclude": ["transformer.h.0.mlp.c_fc"]},
        {"targets": ["transformer.h.1.mlp.c_fc"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_stack_whose_layers_differ_is_refused_and_the_form_named(gpt2, fields):
    config = LoraConfig(**{"targets": ["c_fc"]} | fields)
    with pytest.raises(
        ValueError, match=r"(?s)stacked kernel 'transformer/h/mlp/c_fc/kernel'.*`unstack_layers\(params\)`"
    ):
        jlora.add_lora(jlora.stack_layers(gpt2[1]), config, key=KEY)
    jlora.add_lora(gpt2[1], config, key=KEY)


def test_a_kernel_with_more_axes_is_not_guessed_at():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 8))},
        "heads": {"kernel": jnp.ones((4, 2, 8))},
        "d": {"kernel": jnp.eye(4)},
    }
    for name in ("conv", "heads"):
        with pytest.raises(ValueError, match=rf"'{name}' \(.*never guessed. State it: `add_lora\(…, roles="):
            jlora.add_lora(params, LoraConfig(targets=[name]), key=KEY)
    with pytest.warns(UserWarning, match="'all-linear' leaves out .*: conv, heads"):
        adapted = jlora.add_lora(params, LoraConfig(), key=KEY)
    assert [isinstance(adapted[name]["kernel"], LoraWeight) for name in ("conv", "heads", "d")] == [False, False, True]


# The mask for optax over the whole tree


def _updated(params, tx):
    @jax.jit
    def one_step(params):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return one_step(params)


def test_partition_by_the_mask_moves_the_factors_alone(gpt2):
    params = jlora.add_lora(gpt2[1], CONFIG, key=KEY)
    mask = jlora.adapter_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    new = _updated(params, optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, mask))
    assert same_bits(jlora.remove_lora(new), jlora.remove_lora(params))
    for old, moved in zip(jax.tree.leaves(jlora.split(params)[0]), jax.tree.leaves(jlora.split(new)[0]), strict=True):
        assert (old != moved).all()


def test_optax_masked_alone_moves_the_base(gpt2):
    """The trap that `adapter_mask` documents: optax passes the gradients of masked-out leaves on."""
    params = jlora.add_lora(gpt2[1], CONFIG, key=KEY)
    new = _updated(params, optax.masked(optax.adam(0.1), jlora.adapter_mask(params)))
    moved = [
        bool((a != b).any())
        for a, b in zip(*(jax.tree.leaves(jlora.remove_lora(p)) for p in (params, new)), strict=True)
    ]
    assert all(moved)


# Initialization


@pytest.mark.parametrize(("init", "peft_init"), [("kaiming", True), ("gaussian", "gaussian")])
def test_factors_start_as_pefts(init, peft_init):
    """lora_A uniform in +-1/sqrt(in), or normal with standard deviation 1/rank; lora_B zero."""
    d_in, rank = 400, 16
    torch.manual_seed(0)
    theirs = (
        peft.tuners.lora.Linear(
            torch.nn.Linear(d_in, 24),
            "default",
            config=peft.LoraConfig(r=rank, init_lora_weights=peft_init),
            r=rank,
            lora_alpha=16,
        )
        .lora_A["default"]
        .weight.detach()
        .numpy()
    )
    params = {"proj": {"kernel": jnp.ones((d_in, 24), jnp.bfloat16)}}
    weight = jlora.add_lora(params, LoraConfig(rank=rank, init=init), key=KEY)["proj"]["kernel"]
    assert weight.lora_A.shape == (d_in, rank) and weight.lora_A.dtype == weight.lora_B.dtype == jnp.float32
    assert (weight.lora_B == 0).all() and weight.lora_B.shape == (rank, 24)
    assert theirs.size == weight.lora_A.size
    spread = 1 / math.sqrt(3 * d_in) if init == "kaiming" else 1 / rank
    for sample in (theirs, np.asarray(weight.lora_A)):
        # Five standard errors of the mean, and of the standard deviation, of 6400 samples.
        assert abs(sample.mean()) < 5 * spread / 80
        assert abs(sample.std() / spread - 1) < 0.05
    if init == "kaiming":
        assert 0.99 / math.sqrt(d_in) < float(jnp.abs(weight.lora_A).max()) <= 1 / math.sqrt(d_in)
    else:
        assert float(jnp.abs(weight.lora_A).max()) > 3 / rank


def test_factors_depend_on_key_and_path_alone(gpt2):
    def factors(config, params=gpt2[1], key=KEY):
        return {
            m: np.asarray(w.lora_A)
            for m, w in jlora.lora.adapted_modules(jlora.add_lora(params, config, key=key)).items()
        }

    few = factors(LoraConfig(targets=["c_fc"], layers_to_transform=[1]))
    layers = factors(LoraConfig(targets=["c_fc"]))
    all_of_them = factors(LoraConfig())
    assert len(few) < len(layers) < len(all_of_them)
    for smaller in (few, layers):
        assert all((all_of_them[module] == a).all() for module, a in smaller.items())

    # One more layer.
    deeper = {
        "transformer": gpt2[1]["transformer"]
        | {"h": gpt2[1]["transformer"]["h"] | {"2": gpt2[1]["transformer"]["h"]["0"]}}
    }
    assert all((factors(LoraConfig(), deeper)[module] == a).all() for module, a in all_of_them.items())

    flat = [a.tobytes() for a in factors(LoraConfig(), deeper).values()]
    assert len(set(flat)) == len(flat) == 12
    assert all((factors(LoraConfig(), key=jax.random.key(8))[m] != a).any() for m, a in all_of_them.items())


def test_add_lora_and_stack_layers_commute(loaded, family):
    params = loaded(family)[1]
    config = LoraConfig(rank=4, dropout=0.1, use_rslora=True)
    of_stack = jlora.add_lora(jlora.stack_layers(params), config, key=KEY)
    assert same_bits(of_stack, jlora.stack_layers(jlora.add_lora(params, config, key=KEY)))


# Stack and unstack, cast, count, bytes


def test_unstack_is_the_inverse_of_stack(loaded, family):
    params = loaded(family)[1]
    for tree in (params, jlora.add_lora(params, CONFIG, key=KEY)):
        stacked = jlora.stack_layers(tree)
        assert is_stacked(stacked) and not is_stacked(tree)
        assert same_bits(jlora.unstack_layers(stacked), tree)
        assert jlora.count(stacked) == jlora.count(tree) and jlora.nbytes(stacked) == jlora.nbytes(tree)
    assert same_bits(loaded(family, stack=True)[1], jlora.stack_layers(params))


def test_layers_stack_in_numerical_order():
    layers = {str(i): {"w": {"kernel": jnp.full((2, 3), i)}} for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    assert jlora.stack_layers({"layers": layers})["layers"]["w"]["kernel"][:, 0, 0].tolist() == list(range(11))


def test_stack_and_unstack_errors(gpt2):
    params = gpt2[1]
    with pytest.raises(ValueError, match="`stack_layers` found no layers.*'layers' or 'h'"):
        jlora.stack_layers({"proj": {"kernel": jnp.eye(3)}})
    with pytest.raises(ValueError, match="stacked already"):
        jlora.stack_layers(jlora.stack_layers(params))
    with pytest.raises(ValueError, match="not stacked"):
        jlora.unstack_layers(params)
    partly = jlora.add_lora(params, LoraConfig(targets=["c_fc"], layers_to_transform=[1]), key=KEY)
    with pytest.raises(ValueError, match=r"'transformer/h/mlp/c_fc/kernel' differ.*layer 0:.*layer 1:.*per-layer form"):
        jlora.stack_layers(partly)
    ranks = jlora.add_lora(params, LoraConfig(rank_pattern={r"h\.1\.mlp\.c_fc": 2}), key=KEY)
    with pytest.raises(ValueError, match="'transformer/h/mlp/c_fc/kernel' differ"):
        jlora.stack_layers(ranks)
    scalings = jlora.add_lora(params, LoraConfig(alpha_pattern={r"h\.1\.mlp\.c_fc": 2.0}), key=KEY)
    with pytest.raises(ValueError, match="'transformer/h/mlp/c_fc/kernel' differ"):
        jlora.stack_layers(scalings)
    kernel = {"kernel": jnp.eye(3)}
    for layers in ({"0": {"a": kernel}, "2": {"a": kernel}}, {"0": {"a": kernel, "b": kernel}, "1": {"a": kernel}}):
        with pytest.raises(ValueError, match="some of the . layers lack it"):
            jlora.stack_layers({"layers": layers})
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(3, 4\)"):
        jlora.stack_layers({"layers": {"0": {"a": kernel}, "1": {"a": {"kernel": jnp.ones((3, 4))}}}})


def test_cast_leaves_factors_and_integers(gpt2):
    params = jlora.add_lora(gpt2[1], CONFIG, key=KEY) | {"steps": jnp.arange(3)}
    small = jlora.cast(params, jnp.bfloat16)
    adapter, base = jlora.split(small)
    assert same_bits(adapter, jlora.split(params)[0])
    assert base.pop("steps").dtype == jnp.int32
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype(jnp.bfloat16)}
    assert small["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"].dtype == jnp.bfloat16
    assert same_bits(jlora.cast(adapter, jnp.bfloat16), adapter)
    with pytest.raises(ValueError, match="`dtype` must be a floating point type; got int8"):
        jlora.cast(params, jnp.int8)


def test_count_and_bytes():
    params = {"proj": {"kernel": jnp.ones((10, 20), jnp.bfloat16), "bias": jnp.ones(20)}}
    adapted = jlora.add_lora(params, LoraConfig(rank=3), key=KEY)
    factors = 3 * (10 + 20)
    assert (jlora.count(params), jlora.count(adapted), jlora.count(jlora.split(adapted)[0])) == (
        220,
        220 + factors,
        factors,
    )
    assert (jlora.nbytes(params), jlora.nbytes(adapted)) == (480, 480 + 4 * factors)


# Trees that are not of our models


def test_a_plain_dictionary_of_arrays():
    params = {"w1": jnp.ones((4, 6)), "w2": jnp.ones((6, 2)), "b1": jnp.zeros(6), "table": {"t": jnp.ones((2, 3, 4))}}
    adapted = jlora.add_lora(params, LoraConfig(rank=2), key=KEY)
    assert [type(adapted[name]).__name__ == "LoraWeight" for name in params] == [True, True, False, False]
    assert adapted["b1"] is params["b1"] and same_bits(jlora.merge(adapted), params)
    assert list(jlora.lora.adapted_modules(jlora.add_lora(params, LoraConfig(targets=["w2"]), key=KEY))) == ["w2"]


def test_lists_and_tuples_are_paths_too():
    params = [{"w": jnp.ones((4, 6))}, ({"w": jnp.ones((6, 2))},)]
    adapted = jlora.add_lora(params, LoraConfig(rank=2, targets=["1.0.w"]), key=KEY)
    assert isinstance(adapted[1][0]["w"], LoraWeight) and adapted[0]["w"] is params[0]["w"]


def test_a_kernel_with_two_axes_is_one_kernel_whatever_its_parent_is_called():
    for parent in ("h", "layers"):
        params = {parent: {"kernel": jnp.ones((4, 6))}, "other": {"kernel": jnp.ones((3, 6, 2))}}
        adapted = jlora.add_lora(params, LoraConfig(rank=2, dropout=0.5, exclude=["other"]), key=KEY)
        assert list(jlora.lora.adapted_modules(adapted)) == [parent]
        assert adapted[parent]["kernel"].lora_A.shape == (4, 2)
        assert jlora.with_dropout(adapted, KEY)[parent]["kernel"].key.shape == ()


# Dropout


def test_dropout_needs_a_key_and_follows_it(gpt2):
    model, params = gpt2
    config = LoraConfig(rank=4, targets=["mlp.c_proj"], dropout=0.5)
    params = with_factors(jlora.add_lora(params, config, key=KEY))
    logits = jax.jit(lambda params: model.apply({"params": params}, IDS))
    plain = logits(params)
    assert (plain == logits(params)).all()
    without = map_with_path(
        lambda _, w: dataclasses.replace(w, dropout=0.0) if isinstance(w, LoraWeight) else w, params
    )
    assert (plain == logits(without)).all()
    keys = jax.random.key(1), jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(2)
    one, same, raw, two = (logits(jlora.with_dropout(params, key)) for key in keys)
    assert (one == same).all() and (one == raw).all()
    assert jnp.abs(one - two).max() > 1e-2 and jnp.abs(one - plain).max() > 1e-2


def test_rate_zero_puts_no_key(gpt2):
    params = jlora.add_lora(gpt2[1], CONFIG, key=KEY)
    dropped = jlora.with_dropout(params, KEY)
    assert jax.tree.structure(dropped) == jax.tree.structure(params)
    assert all(w.key is None for w in jlora.lora.adapted_modules(dropped).values())


@pytest.mark.parametrize("stack", [False, True], ids=["layers", "stacked"])
def test_every_weight_has_its_own_mask(gpt2, stack):
    params = jlora.add_lora(gpt2[1], LoraConfig(dropout=0.5), key=KEY)
    params = jlora.with_dropout(jlora.stack_layers(params) if stack else params, KEY)
    x = jnp.ones((64, 48))
    masks = {
        m: np.asarray(w.drop(x)).tobytes() for m, w in jlora.lora.adapted_modules(params).items() if w.shape[0] == 48
    }
    assert len(masks) == 6 and len(set(masks.values())) == 6


def test_keys_are_equal_in_both_forms(loaded, family):
    params = jlora.add_lora(loaded(family)[1], LoraConfig(rank=2, dropout=0.4), key=KEY)
    of_stack = jlora.with_dropout(jlora.stack_layers(params), KEY)
    assert same_bits(of_stack, jlora.stack_layers(jlora.with_dropout(params, KEY)))
    keys = [jax.random.key_data(w.key).tobytes() for w in jlora.lora.adapted_modules(of_stack).values()]
    assert len(keys) == len(set(keys)) == len(jlora.lora.adapted_modules(params))


@pytest.mark.slow
def test_masks_are_equal_in_every_execution_form(gpt2):
    """Per layer, stacked (where a scan hands out the keys), and rematerialized: one key, one mask, one gradient."""
    model, params = gpt2
    config = LoraConfig(rank=4, alpha=8.0, dropout=0.4, targets=["attn.c_proj"])
    params = with_factors(jlora.add_lora(params, config, key=KEY))
    made = []
    for stack, remat in ((False, "none"), (True, "none"), (True, "layer")):
        adapter, base = jlora.split(jlora.stack_layers(params) if stack else params)
        form = replace(model, remat=remat)

        # The key is an argument: XLA would fold a constant one, slowly.
        def loss(adapter, base, key, form=form):
            logits = form.apply({"params": jlora.with_dropout(jlora.combine(adapter, base), key)}, IDS)
            return jnp.mean(logits**2), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter, base, KEY)
        made.append((logits, jax.tree.leaves(jlora.unstack_layers(grads) if stack else grads)))
    undropped = model.apply({"params": params}, IDS)
    (logits, grads), *others = made
    assert jnp.abs(logits - undropped).max() > 1e-2
    for other_logits, other_grads in others:
        np.testing.assert_allclose(other_logits, logits, atol=1e-4)
        for a, b in zip(grads, other_grads, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_element_is_dropped_or_scaled_up(dtype):
    weight = LoraWeight(jnp.eye(50), jnp.eye(50), jnp.eye(50), 1.0, dropout=0.2, key=KEY)
    dropped = weight.drop(jnp.ones((400, 50), dtype))
    assert dropped.dtype == dtype
    assert set(np.unique(dropped.astype(jnp.float32))) == {0.0, 1.25}
    kept = float((dropped != 0).mean())
    assert abs(kept - 0.8) < 5 * math.sqrt(0.2 * 0.8 / 20_000)


def test_only_the_updates_input_is_dropped():
    base = normal(6, 5)
    weight = LoraWeight(base, jnp.ones((6, 2)), jnp.zeros((2, 5)), 1.0, dropout=0.9, key=KEY)
    x = normal(3, 6)
    assert (jlora.linear(x, weight) == jlora.linear(x, base)).all()


def test_dropout_has_pefts_distribution():
    """The same factors and one row repeated, so that every row draws a mask: mean and deviation of both samples agree."""
    rng = np.random.default_rng(0)
    d_in, d_out, rank, rate, rows = 12, 5, 3, 0.3, 20_000
    base, a, b = (rng.normal(size=s).astype(np.float32) for s in ((d_in, d_out), (d_in, rank), (rank, d_out)))
    x = np.tile(rng.normal(size=d_in).astype(np.float32), (rows, 1))
    weight = LoraWeight(jnp.asarray(base), jnp.asarray(a), jnp.asarray(b), 2.0, dropout=rate)

    linear = torch.nn.Linear(d_in, d_out, bias=False)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=rate)
    layer = peft.tuners.lora.Linear(linear, "default", config=config, r=rank, lora_alpha=2 * rank)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(base.T))
        layer.lora_A["default"].weight.copy_(torch.tensor(a.T))
        layer.lora_B["default"].weight.copy_(torch.tensor(b.T))
        torch.manual_seed(0)
        theirs = layer.train()(torch.tensor(x)).numpy()
        exact = layer.eval()(torch.tensor(x[:1])).numpy()[0]
    ours = np.asarray(jlora.linear(jnp.asarray(x), jlora.with_dropout({"w": weight}, KEY)["w"]))
    np.testing.assert_allclose(jlora.linear(jnp.asarray(x[:1]), weight)[0], exact, atol=1e-4)
    for sample in (ours, theirs):
        error = sample.std(axis=0) / math.sqrt(rows)
        assert (np.abs(sample.mean(axis=0) - exact) < 5 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.04)


# The value behind the seam


@pytest.fixture
def weight():
    return LoraWeight(normal(6, 5), normal(6, 2), normal(2, 5, seed=1), scaling=0.5)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w,
        lambda x, w: w @ x.T,
        lambda x, w: jnp.dot(x, w),
        lambda x, w: jnp.einsum("ti,io->to", x, w),
        lambda x, w: jax.jit(lambda x, w: x @ w)(x, w),
        lambda x, w: jnp.asarray(w),
        lambda x, w: np.asarray(w),
        lambda x, w: np.asarray(w, np.float32),
        lambda x, w: np.array(w, copy=True),
        lambda x, w: np.asarray(x) @ w,
    ],
)
def test_use_as_an_array_teaches(weight, use):
    with pytest.raises(
        TypeError, match=r"`LoraWeight` of shape \(6, 5\).*`jlora\.linear\(x, w\)`.*`jlora\.merge\(params\)`"
    ):
        use(jnp.ones((3, 6)), weight)


def test_a_weight_is_frozen_and_describes_the_dense_array(weight):
    assert (weight.shape, weight.ndim, weight.dtype, weight.size, weight.rank) == ((6, 5), 2, jnp.float32, 52, 2)
    assert "rank=2, scaling=0.5" in repr(weight)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.scaling = 1.0


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("transpose", [False, True])
def test_linear_is_the_product_by_the_merged_kernel(weight, transpose, batch):
    x = normal(*batch, 5 if transpose else 6)
    dense = np.asarray(weight.dense(), np.float64)
    expected = np.asarray(x, np.float64) @ (dense.T if transpose else dense)
    y = jlora.linear(x, weight, transpose=transpose)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jitted = jax.jit(lambda x, w: jlora.linear(x, w, transpose=transpose))
    np.testing.assert_allclose(jitted(x, weight), expected, atol=1e-5)


def test_embed_is_the_merged_row_and_clips(weight):
    ids = jnp.array([[0, 5, 3], [2, 2, 99]])
    dense = np.asarray(weight.dense())
    np.testing.assert_allclose(jlora.embed(ids, weight), dense[np.minimum(ids, 5)], atol=1e-5)
    np.testing.assert_allclose(jax.jit(jlora.embed)(ids, weight), dense[np.minimum(ids, 5)], atol=1e-5)
    assert (jlora.embed(ids, weight.base) == np.asarray(weight.base)[np.minimum(ids, 5)]).all()


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_are_those_of_the_merged_product(weight, transpose):
    x = normal(3, 5 if transpose else 6)
    target = normal(3, 6 if transpose else 5, seed=1)

    def loss(x, a, b, product):
        return jnp.sum(product(x, dataclasses.replace(weight, lora_A=a, lora_B=b)) * target)

    def merged(x, w):
        dense = w.dense()
        return x @ (dense.T if transpose else dense)

    grad = jax.grad(loss, argnums=(0, 1, 2))
    args = x, weight.lora_A, weight.lora_B
    ours = grad(*args, lambda x, w: jlora.linear(x, w, transpose=transpose))
    for a, b in zip(ours, grad(*args, merged), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_vmap_over_inputs_and_over_a_stack_of_weights(weight):
    x = normal(4, 3, 6)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf, 0 * leaf]), weight)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(4)]
    expected = jnp.stack([x[i] @ each[i].dense() for i in range(4)])
    np.testing.assert_allclose(jax.vmap(jlora.linear)(x, stack), expected, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(jlora.linear, (0, None))(x, weight), x @ weight.dense(), atol=1e-4)
    per_example = jax.vmap(
        jax.grad(lambda a, x: jlora.linear(x, dataclasses.replace(weight, lora_A=a)).sum()), (None, 0)
    )
    alone = [
        jax.grad(lambda a, i=i: (x[i] @ dataclasses.replace(weight, lora_A=a).dense()).sum())(weight.lora_A)
        for i in range(4)
    ]
    np.testing.assert_allclose(per_example(weight.lora_A, x), jnp.stack(alone), atol=1e-4)


def test_bfloat16_activations_meet_float32_factors():
    base, a, b, x = normal(64, 48), normal(64, 4), normal(4, 48), normal(8, 64)
    weight = LoraWeight(base.astype(jnp.bfloat16), a, b, scaling=0.5)
    x = x.astype(jnp.bfloat16)
    y = jlora.linear(x, weight)
    exact = np.asarray(x, np.float64) @ np.asarray(weight.dense(jnp.float32), np.float64)
    assert y.dtype == jnp.bfloat16 and jlora.linear(x, weight, out_dtype=jnp.float32).dtype == jnp.float32
    assert np.abs(np.asarray(y, np.float64) - exact).max() < 0.02 * np.abs(exact).max()
    grads = jax.grad(lambda w: jlora.linear(x, w).astype(jnp.float32).sum())(weight)
    assert (grads.lora_A.dtype, grads.lora_B.dtype, grads.base.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert jax.grad(lambda x: jlora.linear(x, weight).astype(jnp.float32).sum())(x).dtype == jnp.bfloat16


def test_linear_refuses_an_axis_that_does_not_fit(weight):
    with pytest.raises(ValueError, match=r"got x \(3, 5\) and w \(6, 5\)"):
        jlora.linear(jnp.ones((3, 5)), weight)
    with pytest.raises(ValueError, match=r"transposed; got x \(3, 6\) and w \(6, 5\)"):
        jlora.linear(jnp.ones((3, 6)), weight, transpose=True)
    with pytest.raises(ValueError, match=r"w \(2, 6, 5\).*unstack_layers"):
        jlora.linear(jnp.ones((3, 6)), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight))


# Whole multiples of 1/4 in a small range: products and sums are exact, so equality needs no tolerance.
_quarters = st.integers(-8, 8).map(lambda n: n / 4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), shape=st.sampled_from([(1, 1, 1), (3, 2, 1), (2, 4, 3)]), scaling=_quarters)
def test_linear_equals_the_merged_product_exactly(data, shape, scaling):
    d_in, d_out, rank = shape

    def array(*shape):
        size = math.prod(shape)
        values = data.draw(st.lists(_quarters, min_size=size, max_size=size))
        return jnp.array(values, jnp.float32).reshape(shape)

    weight = LoraWeight(array(d_in, d_out), array(d_in, rank), array(rank, d_out), scaling)
    x = array(2, d_in)
    assert (np.asarray(jlora.linear(x, weight)) == np.asarray(x) @ np.asarray(jlora.merge({"w": weight})["w"])).all()
    y = array(2, d_out)
    transposed = jlora.linear(y, weight, transpose=True)
    assert (np.asarray(transposed) == np.asarray(y) @ np.asarray(weight.dense()).T).all()
