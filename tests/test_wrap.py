"""`jlora.wrap` on the torture list: factored, equal to the merged computation, with the merged function's gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torture
from jaxprs import walk
from torture import DTYPES, KINDS, PROGRAMS

import jlora

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Relative to the largest value. float32: sums in another order. bfloat16: the merged weight is rounded to 8 bits, its
# update and its base are not; gradients through it are rounded likewise.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (3e-2, 5e-2)}


def rows():
    for name, program in PROGRAMS.items():
        for kind in KINDS:
            if program.quantized or "nf4" not in kind:
                for dtype in DTYPES:
                    yield pytest.param(name, kind, dtype, id=f"{name}-{kind}-{dtype}")


def assert_close(mine, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= tolerance, f"{worst:.2e} of the largest value"


def kernel_shapes(program):
    return [sorted(shape) for shape, _ in program.weights.values()]


def assert_factored(jaxpr, program, kind):
    """No product of the size of a kernel, and in loops no dense stack of a quantized base."""
    stacks = [math.prod(shape) for shape, roles in program.weights.values() if roles and roles[0] == "b"]
    for eqn in walk(jaxpr.jaxpr):
        for var in eqn.outvars:
            shape, dtype = var.aval.shape, var.aval.dtype
            if not jnp.issubdtype(dtype, jnp.floating):
                continue
            if eqn.primitive.name == "dot_general":
                for full in kernel_shapes(program):
                    sides = [full, sorted(s for s, _ in [(n, 0) for n in full])[-2:]]
                    assert sorted(shape) not in sides, f"a product of shape {shape}: {eqn}"
            if program.loops and "nf4" in kind:
                assert math.prod(shape) not in stacks, f"a dense stack {shape}: {eqn.primitive}"


@pytest.mark.parametrize(("name", "kind", "dtype"), rows())
def test_torture(name, kind, dtype):
    program = PROGRAMS[name]
    params, x = torture.make(program, kind, dtype)
    wrapped = jlora.wrap(program.fn)
    report = wrapped.check(params, x)
    assert report.ok and not report.materialized and report.totals()["factored"] >= len(params), str(report)

    base, adapted = jax.tree.map(lambda w: w, params), "lora" in kind
    train, frozen = jlora.split(base) if adapted else (None, base)

    def of(fn, prepare):
        """Value, value under vmap, and the gradients of x and the adapter of a fixed functional of the value."""

        def run(train, x):
            return fn(prepare(jlora.combine(train, frozen) if adapted else frozen), x)

        def functional(train, x):
            y = run(train, x).astype(jnp.float32)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

        def everything(train, x):
            y, two = run(train, x), jax.vmap(run, (None, 0))(train, x[None])[0]
            grads = jax.grad(functional, (0, 1) if adapted else (1,))(train, x) if program.differentiable else ()
            return y, two, grads

        return everything

    mine, theirs = of(wrapped, lambda p: p), of(program.fn, jlora.merge)
    assert_factored(jax.make_jaxpr(mine)(train, x), program, kind)
    y, y_vmapped, grads = jax.jit(mine)(train, x)
    y_merged, _, grads_merged = jax.jit(theirs)(train, x)
    for_values, for_grads = TOLERANCE["bfloat16" if "bfloat16" in str(y.dtype) else dtype]
    assert_close(y, y_merged, for_values)
    assert_close(y_vmapped, y_merged, for_values)
    assert_close(grads, grads_merged, for_grads)
    if adapted:
        plain = jax.jit(jlora.wrap(program.fn))(jlora.remove_lora(params), x)
        assert float(jnp.abs(plain.astype(jnp.float32) - y.astype(jnp.float32)).max()) > 1e-3
