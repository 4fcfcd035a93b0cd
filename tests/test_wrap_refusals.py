"""What `jlora.wrap` refuses, what it forms when told to, and what it says about both."""

import dataclasses
import functools
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxprs import walk

import jlora
from jlora import LoraConfig, Weight
from jlora.wrapping import UnhandledUse, UnusedTarget

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
T, D = 5, 12


def weight(shape=(D, D), roles=None, seed=0, **config):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, shape) / math.sqrt(shape[-2])}
    config = LoraConfig(rank=2, targets=["w"], **config)
    w = jlora.add_lora(params, config, key=key, roles={"w": roles} if roles else None)["w"]
    return dataclasses.replace(w, lora_B=jax.random.normal(key, w.lora_B.shape))


X = jax.random.normal(KEY, (T, D))


@jax.custom_vjp
def _ruled(x, w):
    return x @ w


_ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (2 * g @ res[1].T, 3 * res[0].T @ g))


def _pallas(x, w):
    from jax.experimental import pallas

    def copy(w_ref, out_ref):
        out_ref[...] = w_ref[...]

    return x @ pallas.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype), interpret=True)(w)


def _callback(x, w):
    return x @ jax.pure_callback(lambda w: w, jax.ShapeDtypeStruct(w.shape, w.dtype), w)


# Each uses the weight in a way that cannot stay factored; the leaf has a factored use besides.
HARD = {
    "sum": lambda x, w: jnp.sum(w) * x,
    "weight norm": lambda x, w: x @ (w / jnp.linalg.norm(w, axis=0)),
    "spectral norm": lambda x, w: x @ w / jnp.linalg.svd(w, compute_uv=False)[0],
    "two weights": lambda x, w: x @ (w @ w),
    "changing carry": lambda x, w: lax.scan(lambda c, _: ((c[0] @ c[1], c[1] * 0.5), None), (x, w), None, length=2)[0][0],
    "changing carry of while": lambda x, w: lax.fori_loop(0, jnp.int32(2), lambda i, c: (c[0] @ c[1], c[1] * 0.5), (x, w))[0],
    "custom_vjp": _ruled,
    "pallas_call": _pallas,
    "callback": _callback,
    "reshape mixing sides": lambda x, w: x.reshape(-1, 3) @ w.reshape(3, -1),
    "contraction over both sides": lambda x, w: jnp.einsum("td,de->t", x, w)[:, None] + jnp.einsum("ab,ab->", x[:, :D].T @ x, w),
    "returned after a change": lambda x, w: w.T,
    "added to an array": lambda x, w: x @ (w + 1.0),
    "times a vector": lambda x, w: x @ (w * jnp.arange(1.0, D + 1)),
    "result of a branch": lambda x, w: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, w),
    "result of a scan": lambda x, w: x @ lax.scan(lambda c, v: (c, w), 0, None, length=2)[1][0],
    "scan over inputs": lambda x, w: lax.scan(lambda c, row: (c + row, None), jnp.zeros(D), w)[0] * x,
    "padded": lambda x, w: x @ jnp.pad(w, ((0, 0), (0, 3))),
    "selected": lambda x, w: x @ jnp.where(w > 0, w, 0.0),
    "cast to integers": lambda x, w: x @ w.astype(jnp.int32),
}  # fmt: skip


def _used_too(fn):
    """`fn` and a factored use of the same weight."""
    return lambda p, x: (fn(x, p["w"]), x @ p["w"])


@pytest.mark.few(8)
@pytest.mark.parametrize("name", HARD)
def test_hard_uses(name):
    fn, params = _used_too(HARD[name]), {"w": weight()}
    with pytest.raises(UnhandledUse, match=r"p/w: .*test_wrap_refusals.py:\d+|p/w: return"):
        jlora.wrap(fn)(params, X)
    report = jlora.wrap(fn).check(params, X)
    assert not report.ok and report.unhandled and report.unhandled[0].reason
    want = fn(jlora.merge(params), X)
    with pytest.warns(UserWarning, match="p/w is formed"):
        mine = jlora.wrap(fn, on_unhandled="warn")(params, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = jlora.wrap(fn, on_unhandled={"w": "materialize"})
        again = silent(params, X)
    for result in (mine, again):
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    assert silent.check(params, X).ok and silent.check(params, X).materialized


def test_a_site_warns_once():
    wrapped = jlora.wrap(_used_too(HARD["sum"]), on_unhandled="warn")
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            wrapped({"w": weight()}, X)
    assert len(caught) == 1


def test_all_sites_in_one_error():
    def fn(p, x):
        return x @ p["a"] + x @ (p["a"] + 1) + jax.jit(lambda w: jnp.sum(w))(p["b"]) * (x @ p["b"])

    with pytest.raises(UnhandledUse) as error:
        jlora.wrap(fn)({"a": weight(), "b": weight(seed=1)}, X)
    text = str(error.value)
    assert "p/a: add at" in text and "p/b: reduce_sum at" in text and "in jit" in text and "B if formed" in text


def test_custom_vjp_inline():
    params = {"w": weight()}
    wrapped = jlora.wrap(lambda p, x: _ruled(x, p["w"]), custom_vjp="inline")
    report = wrapped.check(params, X)
    assert report.ok and not report.materialized
    grads = jax.grad(lambda x: jnp.sum(wrapped(params, x)))(X)
    want = jnp.ones((T, D)) @ jlora.merge(params)["w"].T  # not twice that, as the rule would have it
    np.testing.assert_allclose(grads, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`custom_vjp` is"):
        jlora.wrap(_ruled, custom_vjp="ignore")


def test_custom_vjp_without_a_weight_keeps_its_rule():
    params = {"w": weight()}
    wrapped = jlora.wrap(lambda p, x: _ruled(x @ p["w"], jnp.eye(D)))
    got = jax.grad(lambda x: jnp.sum(wrapped(params, x)))(X)
    np.testing.assert_allclose(got, 2 * jnp.ones((T, D)) @ jlora.merge(params)["w"].T, rtol=1e-5, atol=1e-5)


# Unused adapters


POLICIES = ("error", "warn", "materialize")
DEAD = {
    "never": lambda p, x: x @ p["v"],
    "dead result": lambda p, x: (x @ p["w"], x @ p["v"])[1],
    "dead result of a scan": lambda p, x: lax.scan(lambda c, _: (c @ p["v"], c @ p["w"]), x, None, length=2)[0],
    "dead carry of a scan": lambda p, x: lax.scan(
        lambda c, _: ((c[0] @ p["v"], c[1] @ p["w"]), None), (x, x), None, length=2
    )[0][0],
    "dead result of a jit": lambda p, x: jax.jit(lambda p, x: (x @ p["w"], x @ p["v"]))(p, x)[1],
    "dead result of a branch": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda p: (x @ p["w"], x @ p["v"]), lambda p: (x, x @ p["v"]), p
    )[1],
    "dead result of a checkpoint": lambda p, x: jax.checkpoint(lambda p: (x @ p["w"], x @ p["v"]))(p)[1],
    "shape only": lambda p, x: x @ p["v"] + p["w"].shape[0],
    "zeros like it": lambda p, x: x @ p["v"] + x @ jnp.zeros_like(p["w"]),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DEAD)
def test_unused_adapters_raise_under_every_policy(name, policy):
    params = {"w": weight(), "v": weight(seed=1)}
    wrapped = jlora.wrap(DEAD[name], on_unhandled=policy)
    with pytest.raises(UnusedTarget, match="p/w"):
        wrapped(params, X)
    report = wrapped.check(params, X)
    assert report.unused == ("p/w",) and not report.ok
    with pytest.raises(UnusedTarget):
        wrapped.check(params, X, strict=True)


def test_a_carry_that_matters_later_is_a_use():
    def fn(p, x):
        return lax.scan(lambda c, _: ((c[0] + c[1], c[1] @ p["w"]), None), (x, x), None, length=2)[0][0]

    params = {"w": weight()}
    got = jlora.wrap(fn)(params, X)
    np.testing.assert_allclose(got, fn(jlora.merge(params), X), rtol=1e-4, atol=1e-4)


def test_materialized_only():
    params, fn = {"w": weight()}, lambda p, x: jnp.sum(p["w"]) * x
    for policy in ("warn", "materialize"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(UnusedTarget, match=r"p/w \(materialized only\)"):
                jlora.wrap(fn, on_unhandled=policy)(params, X)
    got = jlora.wrap(fn, on_unhandled={"*/w": "materialize"})(params, X)
    np.testing.assert_allclose(got, fn(jlora.merge(params), X), rtol=1e-5, atol=1e-5)


def test_unused_whole_weights():
    params = {"lin": {"kernel": jnp.ones((D, D)), "bias": jnp.zeros(D)}}
    params = jlora.add_lora(params, LoraConfig(rank=2, targets=["lin"], bias="all"), key=KEY)
    with pytest.raises(UnusedTarget, match="p/lin/bias"):
        jlora.wrap(lambda p, x: x @ p["lin"]["kernel"])(params, X)
    report = jlora.wrap(lambda p, x: x @ p["lin"]["kernel"] + p["lin"]["bias"]).check(params, X)
    assert report.ok and "factored: a dense array" in {use.status for use in report.uses}


def test_an_unused_quantized_leaf_is_reported_only():
    params = {"w": jlora.quantize(jnp.ones((D, D)), jlora.NF4()), "v": weight()}
    wrapped = jlora.wrap(lambda p, x: x @ p["v"])
    assert [use.status for use in wrapped.check(params, X).uses if use.leaf == "p/w"] == ["UNUSED"]
    assert wrapped(params, X).shape == (T, D)


# Bad arguments


def test_policies_are_checked():
    with pytest.raises(ValueError, match="`on_unhandled` is one of 'error', 'warn', 'materialize'"):
        jlora.wrap(lambda p, x: x, on_unhandled="ignore")
    wrapped = jlora.wrap(lambda p, x: x @ p["w"], on_unhandled={"v": "warn"})
    with pytest.raises(ValueError, match="'v' matches none of the wrapped leaves: p/w"):
        wrapped({"w": weight()}, X)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Strange(Weight):
    array: jax.Array
    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    size = property(lambda self: self.array.size)

    def matmul(self, x, *, transpose, out_dtype):
        raise AssertionError

    take = dense = cast = matmul


def test_unknown_kinds_are_refused_by_name():
    with pytest.raises(TypeError, match="does not know how a Strange is used, the weight at 'p/w'"):
        jlora.wrap(lambda p, x: x @ p["w"])({"w": Strange(jnp.ones((D, D)))}, X)
    nested = dataclasses.replace(weight(), base=Strange(jnp.ones((D, D))))
    with pytest.raises(TypeError, match="Strange is used, the base of the `LoraWeight` at 'p/w'"):
        jlora.wrap(lambda p, x: x @ p["w"])({"w": nested}, X)
    with pytest.raises(TypeError, match="a quantized vector"):
        jlora.wrap(lambda p, x: x * p["w"])({"w": jlora.quantize(jnp.ones(D), jlora.NF4())}, X)


def test_halves_of_a_split_are_refused():
    for half in jlora.split({"w": weight()}):
        with pytest.raises(TypeError, match=r"one half of a LoraWeight.*combine\(adapter, base\)"):
            jlora.wrap(lambda p, x: x @ p["w"])(half, X)


def test_weights_outside_the_arguments():
    w, q = weight(), jlora.quantize(jnp.ones((D, D)), jlora.NF4())
    for value in (w, q):
        for fn in (lambda x, v=value: x @ v, lambda x, v=value: jnp.einsum("td,de->te", x, v)):
            with pytest.raises(TypeError, match=r"used as an array.*`jlora.wrap\(fn\)`"):
                fn(X)  # unwrapped
            with pytest.raises(TypeError, match="used as an array"):
                jlora.wrap(lambda p, x, fn=fn: fn(x) @ p["w"])({"w": w}, X)  # closed over


def test_roles_are_stated_never_guessed():
    params = {"w": jnp.ones((4, 3, 5))}
    config = LoraConfig(rank=2, targets=["w"])
    with pytest.raises(ValueError, match=r"'w' \(4, 3, 5\) has more axes than \[in, out\].*roles=\{'w': …\}"):
        jlora.add_lora(params, config, key=KEY)
    for roles, message in {
        "io": "names 2 axes; the leaf has 3",
        "xoo": "names every axis of a kernel by one letter",
        "iii": "at least one each",
        "iob": "names every axis",
    }.items():
        with pytest.raises(ValueError, match=message):
            jlora.add_lora(params, config, key=KEY, roles={"w": roles})
    with pytest.raises(ValueError, match="`roles` 'v' matches no leaf"):
        jlora.add_lora(params, config, key=KEY, roles={"v": "ioo"})
    for other in (LoraConfig(rank=2, targets=["w"], use_dora=True), LoraConfig(rank=2, targets=["w"], init="pissa")):
        with pytest.raises(ValueError, match="adapts kernels \\[in, out\\]"):
            jlora.add_lora(params, other, key=KEY, roles={"w": "ioo"})


def test_factors_by_role():
    params = {"w": jnp.ones((2, 4, 3, 5))}
    w = jlora.add_lora(params, LoraConfig(rank=2, targets=["w"]), key=KEY, roles={"w": "boio"})["w"]
    assert w.lora_A.shape == (2, 3, 2) and w.lora_B.shape == (2, 2, 4, 5) and w.shape == (2, 4, 3, 5)
    w = dataclasses.replace(w, lora_B=jnp.arange(80.0).reshape(2, 2, 4, 5))
    want = params["w"] + w.scaling * jnp.einsum("bir,broc->boic", w.lora_A, w.lora_B)
    np.testing.assert_allclose(w.dense(), want, rtol=1e-6)
    keyed = jlora.with_dropout({"w": dataclasses.replace(w, dropout=0.5)}, KEY)["w"]
    assert keyed.key.shape == (2,)


def test_weights_with_roles_are_refused_elsewhere(tmp_path):
    config = LoraConfig(rank=2, targets=["w"])
    for roles, shape in {"ioo": (4, 3, 5), "oi": (4, 4)}.items():
        params = jlora.add_lora({"w": jnp.ones(shape)}, config, key=KEY, roles={"w": roles})
        if roles == "oi":
            with pytest.raises(ValueError, match=r"multiplied by directly.*jlora.wrap"):
                jlora.linear(jnp.ones((1, 4)), params["w"])
            with pytest.raises(ValueError, match="looked up in directly"):
                jlora.embed(jnp.array([1]), params["w"])
        with pytest.raises(ValueError, match=f"PEFT's files hold adapters of kernels.*w '{roles}'"):
            jlora.save_adapter(tmp_path, params, config=config, base_model="x")
        q = jlora.quantize(jnp.ones(shape), jlora.NF4(), roles=roles)
        assert q.shape == shape
        if roles == "oi":
            with pytest.raises(ValueError, match="multiplied by directly"):
                jlora.linear(jnp.ones((1, 4)), q)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("roles", "shape"), [("ioo", (8, 4, 6)), ("iio", (4, 6, 8)), ("oio", (4, 64, 6)), ("oi", (8, 32))]
)
def test_quantized_by_role(roles, shape):
    w = jax.random.normal(KEY, shape)
    q = jlora.quantize(w, jlora.NF4(block_size=32), roles=roles)
    letters = "abc"[: len(shape)]
    side = {role: "".join(c for c, r in zip(letters, roles, strict=True) if r == role) for role in "io"}
    kernel = jnp.einsum(f"{letters}->{side['i']}{side['o']}", w)
    flat = kernel.reshape(math.prod(shape[k] for k, r in enumerate(roles) if r == "i"), -1)
    plain = jlora.quantize(flat, jlora.NF4(block_size=32))
    assert (q.codes == plain.codes).all() and (q.absmax == plain.absmax).all()
    want = jnp.einsum(f"{side['i']}{side['o']}->{letters}", plain.dense().reshape(kernel.shape))
    assert (q.dense() == want).all()
    tree = jlora.quantize_params(
        {"w": w, "v": jnp.ones((32, 4))}, jlora.NF4(block_size=32), targets=["w"], roles={"w": roles}
    )
    assert (tree["w"].codes == q.codes).all() and tree["w"].shape == shape
    adapted = jlora.add_lora(tree, LoraConfig(rank=2, targets=["w"]), key=KEY)["w"]
    assert adapted.roles == roles and (adapted.dense() == q.dense()).all()
    with pytest.raises(ValueError, match="differ from .* under which it was quantized"):
        other = {"ioo": "iio", "iio": "ioo", "oio": "iio", "oi": "io"}[roles]
        jlora.add_lora(tree, LoraConfig(rank=2, targets=["w"]), key=KEY, roles={"w": other})
    with pytest.raises(ValueError, match="names 4 axes"):
        jlora.quantize(w, jlora.NF4(), roles="iioo")


# What is guaranteed of everything else


def test_without_weights_nothing_changes():
    def fn(p, x):
        return jax.nn.gelu(x @ p["w"])

    params = {"w": jnp.ones((D, 7))}
    assert jax.jit(jlora.wrap(fn)).lower(params, X).as_text() == jax.jit(fn).lower(params, X).as_text()
    assert jlora.wrap(fn).check(params, X).uses == ()


def test_returned_weights_are_the_same_object():
    params = {"w": weight(), "b": jnp.ones(D)}
    for wrapped in (jlora.wrap(lambda p, x: (p, x @ p["w"])), jlora.wrap(lambda p, x: (p, x))):
        same, _ = wrapped(params, X)
        assert same["w"] is params["w"]
        assert wrapped.check(params, X).ok
        again, _ = jax.jit(wrapped)(params, X)
        assert jax.tree.structure(again) == jax.tree.structure(params)


def test_frozen_base_gets_no_gradient():
    adapter, base = jlora.split({"w": weight((D, 7))})
    fn = jlora.wrap(lambda p, x: jnp.tanh(x @ p["w"]))
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: jnp.sum(fn(jlora.combine(a, base), X))))(adapter)
    for eqn in walk(jaxpr.jaxpr):
        assert all(sorted(var.aval.shape) != [7, D] for var in eqn.outvars), eqn


def test_static_arguments_stay_static():
    def fn(p, x, activation, train=True, name="tanh"):
        y = x @ p["w"] * (2 if train else 1)
        return getattr(jnp, name)(activation(y))

    params, wrapped = {"w": weight()}, jlora.wrap(fn)
    for args in ((jnp.abs, True, "sin"), (jnp.abs, False, "sin"), (jnp.negative, True, "tanh"), (jnp.abs, 1, "sin")):
        want = fn(jlora.merge(params), X, *args)
        np.testing.assert_allclose(wrapped(params, X, *args), want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        wrapped(params, x=X, activation=jnp.abs, name="cos"), fn(jlora.merge(params), X, jnp.abs, name="cos"), atol=1e-4
    )


def test_closed_over_tracers_are_not_kept():
    params = {"w": weight()}
    wrapped_of = []

    def fn(p, x):
        return (x * wrapped_of[-1]) @ p["w"]

    wrapped = jlora.wrap(fn)

    @jax.jit
    def call(s):
        wrapped_of.append(s)
        return wrapped(params, X)

    first = call(jnp.float32(2.0))
    wrapped_of.append(jnp.float32(3.0))
    np.testing.assert_allclose(wrapped(params, X), 1.5 * first, rtol=1e-4)


def test_traced_once_for_one_kind_of_arguments():
    traces = []

    def fn(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    wrapped = jlora.wrap(fn)
    for _ in range(3):
        wrapped({"w": weight()}, X)
    wrapped.check({"w": weight()}, X)
    assert len(traces) == 1
    wrapped({"w": weight()}, X[:2])
    with jax.default_matmul_precision("highest"):
        wrapped({"w": weight()}, X)
    assert len(traces) == 3


def test_check_takes_shapes_alone():
    w = jax.eval_shape(lambda: weight())
    report = jlora.wrap(lambda p, x: jax.jit(lambda x: x @ p["w"])(x)).check(
        {"w": w}, jax.ShapeDtypeStruct((T, D), "float32")
    )
    (use,) = report.uses
    assert (use.leaf, use.primitive, use.status, use.nesting) == ("p/w", "dot_general", "factored", "jit")
    assert use.where.startswith("test_wrap_refusals.py:") and use.nbytes == D * D * 4
    data = json.loads(report.to_json())
    assert data["ok"] and data["totals"]["factored"] == 1 and data["uses"][0]["leaf"] == "p/w"
    head, columns, row = str(report).splitlines()
    assert head == "1 leaves, 1 factored uses, 0 materialized (-), 0 unhandled, 0 unused"
    assert columns.split() == ["leaf", "primitive", "status", "where", "nesting", "bytes", "if", "materialized"]
    assert "p/w" in row and "576 B" in row


def test_stop_gradient_is_reported():
    params = {"w": weight()}
    wrapped = jlora.wrap(lambda p, x: x @ lax.stop_gradient(p["w"]))
    assert "gets no gradient" in wrapped.check(params, X).uses[0].status
    adapter, base = jlora.split(params)
    grads = jax.grad(lambda a: jnp.sum(wrapped(jlora.combine(a, base), X)))(adapter)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_names_are_kept():
    def fn(p, x):
        with jax.named_scope("encoder"):
            return jnp.tanh(x @ p["w"])

    wrapped = jlora.wrap(fn)
    names = {str(eqn.source_info.name_stack) for eqn in walk(jax.make_jaxpr(wrapped)({"w": weight()}, X).jaxpr)}
    assert any("encoder" in name for name in names)


@pytest.mark.parametrize("jit", [False, True])
def test_kernels_taken_from_beyond_a_stack_are_nan_as_in_jax(jit):
    w = weight((4, D, D), roles="bio")

    def f(p, x):
        return jnp.einsum("td,lde->lte", x, jnp.take(p["w"], jnp.array([1, 4, -5, -1]), axis=0))

    wrapped = jlora.wrap(f)
    assert wrapped.check({"w": w}, X).ok
    mine = (jax.jit(wrapped) if jit else wrapped)({"w": w}, X)
    np.testing.assert_allclose(mine, f(jlora.merge({"w": w}), X), atol=1e-4)
    assert np.isnan(mine).all((1, 2)).tolist() == [False, True, True, False]


@pytest.mark.parametrize("fill", [1.0, -2, np.inf])
def test_other_values_for_kernels_beyond_a_stack_are_refused(fill):
    w = weight((4, D, D), roles="bio")
    wrapped = jlora.wrap(
        lambda p, x: jnp.einsum("td,lde->lte", x, p["w"].at[jnp.array([1, 4])].get(mode="fill", fill_value=fill))
    )
    with pytest.raises(UnhandledUse, match='fill with NaN or 0 alone, along a stack axis: pass mode="clip"'):
        wrapped({"w": w}, X)
