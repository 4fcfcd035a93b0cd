"""Programs that use a weight in every way that ordinary code does, for `jlora.wrap`: one row each.

No batch or token count equals a side of a weight, so that shapes in a jaxpr cannot be mistaken for one another.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxprs import walk

import jlora
from jlora import LoraConfig

T, D, E, H, K, L = 5, 32, 24, 4, 6, 3
KERNEL = ((D, E), None)
SQUARE = ((D, D), None)
STACK = ((L, D, D), "bio")
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function (params, x) -> array, and what it is given."""

    fn: Callable[[Any, Any], Any]
    weights: dict[str, tuple[tuple[int, ...], str | None]]
    """Name -> (shape, roles)."""
    x: tuple[int, ...]
    loops: bool = False
    """A loop over stacked weights: no dense copy of a whole stack may exist."""
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    quantized: bool = True
    """Whether a quantized base is for this program."""
    differentiable: bool = True
    """Whether reverse mode goes through it, and through the same program on dense weights."""
    maps: bool = True
    """Whether JAX maps it."""


PROGRAMS: dict[str, Program] = {}


def _add(name, fn, weights=None, x=(T, D), **options):
    weights = {"w": KERNEL} if weights is None else weights
    assert name not in PROGRAMS
    PROGRAMS[name] = Program(fn, weights, x, **options)


def one(fn):
    """A function of one weight as one of the tree."""
    return lambda p, x: fn(p["w"], x)


# 1-4: products, casts, scalars
_add("matmul", one(lambda w, x: x @ w))
_add("transpose", one(lambda w, x: x @ w.T), x=(T, E))
_add("transpose_twice", one(lambda w, x: x @ w.T.T))
_add("left_operand", one(lambda w, x: w.T @ x.T))
_add("vector", one(lambda w, x: x @ w), x=(D,))
_add("astype", one(lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)))
_add("times_half", one(lambda w, x: x @ (w * 0.5)))
_add("negated", one(lambda w, x: x @ -w))
_add("over_sqrt", one(lambda w, x: x @ (w / jnp.sqrt(D))))
_add("traced_scalar", one(lambda w, x: x @ (jnp.max(x) * w)))

# 5: heads
_add("heads_and_back", one(lambda w, x: x @ w.reshape(D, H, K).transpose(0, 1, 2).reshape(D, E)))
_add("heads_permuted_and_merged", one(lambda w, x: x @ w.reshape(D, H, K).transpose(0, 2, 1).reshape(D, E)))
_add("kernel_ioo", one(lambda w, x: jnp.einsum("td,dhk->thk", x, w)), {"w": ((D, H, K), "ioo")})
_add("kernel_iio", one(lambda w, x: jnp.einsum("thk,hkd->td", x, w)), {"w": ((H, K, D), "iio")}, (T, H, K))
_add("kernel_oio", one(lambda w, x: jnp.einsum("td,hdk->htk", x, w)), {"w": ((H, D, K), "oio")})
_add("kernel_oi", one(lambda w, x: x @ w.T), {"w": ((E, D), "oi")})
_add("kernel_merged", one(lambda w, x: x @ w.reshape(D, H * K)), {"w": ((D, H, K), "ioo")})
_add("per_head_batch", one(lambda w, x: jnp.einsum("thd,dhk->thk", x, w)), {"w": ((D, H, K), "ioo")}, (T, H, D))
_add("per_head_inputs", one(lambda w, x: jnp.einsum("thk,hkd->thd", x, w)), {"w": ((H, K, D), "iio")}, (T, H, K))

# 6: einsum in every order
for spec in ("td,do->to", "do,td->to", "td,do->ot", "do,td->ot"):
    _add(f"einsum {spec}", one(lambda w, x, s=spec: jnp.einsum(s, *((x, w) if s[0] == "t" else (w, x)))))
for spec in ("to,do->td", "do,to->dt"):
    _add(f"einsum {spec}", one(lambda w, x, s=spec: jnp.einsum(s, *((x, w) if s[0] == "t" else (w, x)))), x=(T, E))
_add("einsum btd,do->obt", one(lambda w, x: jnp.einsum("btd,do->obt", x, w)), x=(2, T, D))

# 7: dot_general itself
_add("dot_general rhs", one(lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ())))))
_add("dot_general lhs", one(lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ())))))
_add("dot_general precise", one(lambda w, x: jnp.matmul(x, w, precision="highest")))
_add("dot_general batch", one(lambda w, x: jnp.einsum("ltd,lde->lte", x, w)), {"w": STACK}, (L, T, D))
_add("dot_general batch lhs", one(lambda w, x: jnp.einsum("lde,ltd->let", w, x)), {"w": STACK}, (L, T, D))
_add("dot_general batch T", one(lambda w, x: jnp.einsum("lte,lde->ltd", x, w)), {"w": ((L, D, E), "bio")}, (L, T, E))
_add("stack left free", one(lambda w, x: jnp.einsum("td,lde->tle", x, w)), {"w": STACK})
_add("stack summed over", one(lambda w, x: jnp.einsum("ltd,lde->te", x, w)), {"w": STACK}, (L, T, D))
_add("subset of inputs", one(lambda w, x: jnp.einsum("tk,hkd->thd", x, w)), {"w": ((H, K, D), "iio")}, (T, K))
_add("subset of outputs", one(lambda w, x: jnp.einsum("tk,dhk->tdh", x, w)), {"w": ((D, H, K), "ioo")}, (T, K))

# 8, 9: jit inside; the second finds the cache that the first filled
_inner = jax.jit(lambda x, w: x @ w)
_add("inner jit", one(lambda w, x: _inner(x, w)))


def _cached(p, x):
    _inner(x, jnp.ones((D, E), x.dtype))
    return _inner(x, p["w"])


_add("inner jit cached", _cached)
_add("jit of a view", one(lambda w, x: x @ jax.jit(jnp.transpose)(w)), x=(T, E))

# 10: remat
_policies = jax.checkpoint_policies
for name, policy in {
    "default": None,
    "everything": _policies.everything_saveable,
    "nothing": _policies.nothing_saveable,
    "dots": _policies.dots_saveable,
    "dots_no_batch": _policies.checkpoint_dots_with_no_batch_dims,
}.items():
    _add(f"remat {name}", one(lambda w, x, p=policy: jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=p)(w, x)))
_add("checkpoint_name", one(lambda w, x: checkpoint_name(x @ checkpoint_name(w, "w"), "y")))


# 11-13: scans
def _layer(x, w):
    return jnp.tanh(x @ w), None


def _scan(p, x, body=_layer, **options):
    return lax.scan(body, x, p["w"], **options)[0]


_add("scan", _scan, {"w": STACK}, loops=True)
_add("scan remat", functools.partial(_scan, body=jax.checkpoint(_layer)), {"w": STACK}, loops=True)
_add(
    "scan remat dots",
    functools.partial(_scan, body=jax.checkpoint(_layer, policy=_policies.dots_saveable)),
    {"w": STACK},
    loops=True,
)
_add("scan reverse", functools.partial(_scan, reverse=True), {"w": STACK}, loops=True)
_add("scan unroll", functools.partial(_scan, unroll=2), {"w": STACK}, loops=True)
_add("scan outputs", one(lambda w, x: lax.scan(lambda c, w: (c, c @ w), x, w)[1]), {"w": STACK}, loops=True)
_add(
    "scan const", one(lambda w, x: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]), {"w": SQUARE}
)
_add(
    "nested scan",
    one(lambda w, x: lax.scan(lambda c, v: lax.scan(_layer, c, v), x, w)[0]),
    {"w": ((2, 2, D, D), "bbio")},
    loops=True,
)
_add("scan transposed", one(lambda w, x: lax.scan(_layer, x, w.transpose(0, 2, 1))[0]), {"w": STACK}, loops=True)
_add("index of a stack", one(lambda w, x: x @ w[1]), {"w": STACK})
_add("last of a stack", one(lambda w, x: x @ w[-1]), {"w": STACK})
_add(
    "traced index of a stack",
    one(lambda w, x: lax.fori_loop(0, L, lambda i, x: _layer(x, w[i])[0], x)),
    {"w": STACK},
    loops=True,
)
_add("taken rows of a stack", one(lambda w, x: jnp.einsum("td,lde->lte", x, w[jnp.array([2, 0])])), {"w": STACK})
for name, take in {
    "default": lambda w: jnp.take(w, jnp.array([2, 0]), axis=0),
    "clip": lambda w: jnp.take(w, jnp.array([2, 7]), axis=0, mode="clip"),
    "wrap": lambda w: jnp.take(w, jnp.array([2, 4]), axis=0, mode="wrap"),
    "from the end": lambda w: jnp.take(w, jnp.array([-1, -3]), axis=0),
    "bytes": lambda w: jnp.take(w, jnp.array([2, 0], jnp.uint8), axis=0),
    "at get": lambda w: w.at[jnp.array([2, 0])].get(mode="fill"),
    "at get promise": lambda w: w.at[jnp.array([2, 0])].get(mode="promise_in_bounds"),
    "at get beyond is 0": lambda w: w.at[jnp.array([2, 7])].get(mode="fill", fill_value=0),
    "of a take": lambda w: jnp.take(0.5 * jnp.take(w, jnp.array([2, 0, 1, 1]), axis=0), jnp.array([3, 1]), axis=0),
    "along an axis": lambda w: jnp.take_along_axis(w, jnp.array([2, 0])[:, None, None], axis=0),
    "in jit": lambda w: jax.jit(lambda w, ids: jnp.take(w, ids, axis=0))(w, jnp.array([2, 0])),
}.items():
    _add(f"take of a stack, {name}", one(lambda w, x, take=take: jnp.einsum("td,lde->lte", x, take(w))), {"w": STACK})
_add(
    "take of a stack, summed",
    one(lambda w, x: jnp.einsum("ltd,lde->te", x, w.at[jnp.array([2, 7, 1])].get(mode="fill", fill_value=0))),
    {"w": STACK},
    (L, T, D),
)
_add(
    "take of the inner of two stacks",
    one(lambda w, x: jnp.einsum("td,abde->abte", x, jnp.take(w, jnp.array([1, 0, 1]), axis=1))),
    {"w": ((3, 2, D, E), "bbio")},
)
_add(
    "take of a stack in scan",
    one(lambda w, x: lax.scan(lambda c, i: (jnp.tanh(c @ jnp.take(w, i, axis=0)), None), x, jnp.array([2, 0]))[0]),
    {"w": STACK},
    loops=True,
)
_add(
    "take of a stack in vmap",
    one(lambda w, x: jax.vmap(lambda i: x @ jnp.take(w, i, axis=0))(jnp.array([2, 0]))),
    {"w": STACK},
)
_add("slice of a stack", one(lambda w, x: lax.scan(_layer, x, w[1:])[0]), {"w": STACK}, loops=True)
_add("stack reversed", one(lambda w, x: lax.scan(_layer, x, w[::-1])[0]), {"w": STACK}, loops=True)
_add("scaled stack", one(lambda w, x: lax.scan(_layer, x, w * 0.7)[0]), {"w": STACK}, loops=True)
_add(
    "stack regrouped",
    one(lambda w, x: lax.scan(_layer, x, w.reshape(4, D, D))[0]),
    {"w": ((2, 2, D, D), "bbio")},
    loops=True,
)

# 14, 15: vmap inside
_add("vmap inside", one(lambda w, x: jax.vmap(lambda row: row @ w)(x)))
_add("vmap inside, stacked", one(lambda w, x: jax.vmap(jnp.matmul)(x, w)), {"w": STACK}, (L, T, D))
_add("vmap over weights", one(lambda w, x: jax.vmap(lambda w: jnp.tanh(x @ w))(w)), {"w": STACK})
_add("vmap of a scan", one(lambda w, x: jax.vmap(lambda x: lax.scan(_layer, x, w)[0])(x)), {"w": STACK}, (2, T, D))
_add("broadcast to a batch", one(lambda w, x: x @ jnp.broadcast_to(w, (2, D, E))), x=(2, T, D))
_add("grad inside", one(lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x)))
_add(
    "remat grad inside", one(lambda w, x: jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w))(x)))(x))
)


# 18-20: branches and loops
_add("cond", one(lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 2 * (x @ w), w)))
_add("switch", one(lambda w, x: lax.switch(1, [lambda w: x @ w, lambda w: x @ -w, lambda w: 0 * x[:, :E]], w)))
_add(
    "while const",
    one(lambda w, x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]),
    {"w": SQUARE},
    differentiable=False,
)
_add("fori const", one(lambda w, x: lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w), x)), {"w": SQUARE})
_add(
    "fori carry",
    one(lambda w, x: lax.fori_loop(0, 2, lambda i, s: (jnp.tanh(s[0] @ s[1]), s[1]), (x, w))[0]),
    {"w": SQUARE},
)
_add(
    "while carry",
    one(
        lambda w, x: lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[2]), s[2]), (jnp.int32(0), x, w)
        )[1]
    ),
    {"w": SQUARE},
    differentiable=False,
)
_add(
    "carry used afterwards",
    one(lambda w, x: (lambda s: s[0] @ s[1])(lax.fori_loop(0, 2, lambda i, s: (jnp.tanh(s[0] @ s[1]), s[1]), (x, w)))),
    {"w": SQUARE},
)

# 21: activations with rules of their own
_add("gelu", one(lambda w, x: jax.nn.gelu(x @ w)))
_add("silu", one(lambda w, x: jax.nn.silu(x @ w)))
_add("relu", one(lambda w, x: jax.nn.relu(x @ w)))


@jax.custom_jvp
def _linear_with_a_rule(x, w):
    return x @ w


@_linear_with_a_rule.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


_add("custom_jvp on the weight", one(lambda w, x: _linear_with_a_rule(x, w)))

# 22: embeddings; ids from x
V = 40
TABLE = ((V, D), None)


def ids_of(x, vocab=V):
    return jnp.arange(x.size // x.shape[-1]).reshape(x.shape[:-1]) * 7 % vocab


for mode in ("clip", "wrap", "fill", None):
    _add(f"take {mode}", one(lambda w, x, m=mode: jnp.take(w, ids_of(x), axis=0, mode=m) * x), {"w": TABLE})
_add("take by index", one(lambda w, x: w[ids_of(x)] * x), {"w": TABLE})
_add(
    "take beyond", one(lambda w, x: jnp.nan_to_num(jnp.take(w, ids_of(x, 99) + 20, axis=0), nan=3.0) * x), {"w": TABLE}
)
_add("one row", one(lambda w, x: w[3] * x), {"w": TABLE})
_add("tied head", one(lambda w, x: (jnp.take(w, ids_of(x), axis=0) * x) @ w.T), {"w": TABLE})
_add("take transposed", one(lambda w, x: jnp.take(w.T, ids_of(x), axis=1).T * x), {"w": TABLE})
_add("take outputs", one(lambda w, x: x @ jnp.take(w, jnp.array([3, 1, 7]), axis=1, mode="clip")))
_add(
    "take of two inputs",
    one(lambda w, x: w[jnp.array([1, 3, 0])][:, 2:] * x[0, 0]),
    {"w": ((H, K, D), "iio")},
    quantized=False,
)


# 23: grouped-query attention
def _attention(p, x):
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "kv")
    k, v = (jnp.repeat(part, 2, axis=2) for part in (k, v))
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k).astype(jnp.float32)).astype(x.dtype)
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", scores, v), p["o"])


_add(
    "grouped-query attention",
    _attention,
    {"q": ((D, H, K), "ioo"), "k": ((D, 2, K), "ioo"), "v": ((D, 2, K), "ioo"), "o": ((H, K, D), "iio")},
    (2, T, D),
)


# 24: convolutions
def _conv(w, x, **options):
    return lax.conv_general_dilated(x, w, **({"window_strides": (1, 1), "padding": "SAME"} | options))


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
WINDOW = {"w": ((3, 3, 8, 12), "iiio")}
_add("conv", one(functools.partial(_conv, **NHWC)), WINDOW, (2, 7, 7, 8))
_add(
    "conv strided", one(functools.partial(_conv, **NHWC, window_strides=(2, 2), padding="VALID")), WINDOW, (2, 7, 7, 8)
)
_add("conv dilated", one(functools.partial(_conv, **NHWC, rhs_dilation=(2, 2))), WINDOW, (2, 7, 7, 8))
_add("conv OIHW", one(_conv), {"w": ((12, 8, 3, 3), "oiii")}, (2, 8, 7, 7))
_add("patches", one(lambda w, x: x.reshape(2, -1) @ w.reshape(-1, 12)), WINDOW, (2, 3, 3, 8))

# 25, 26: same shapes, shared weights
_add("two of one shape", lambda p, x: (x @ p["w"]) @ p["u"], {"w": SQUARE, "u": SQUARE})
_add("three of one shape", lambda p, x: x @ p["a"] + jnp.tanh(x @ p["b"]) @ p["c"], dict.fromkeys("abc", SQUARE))
_add("shared", lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": SQUARE})

# 27, 28: fused projections
FUSED = {"w": ((D, 3 * E), None)}
_add("fused, sliced", one(lambda w, x: (x @ w[:, :E]) * (x @ w[:, E : 2 * E]) + x @ w[:, 2 * E :]), FUSED)
_add("fused, split", one(lambda w, x: functools.reduce(jnp.multiply, [x @ v for v in jnp.split(w, 3, axis=1)])), FUSED)
_add("inputs cut", one(lambda w, x: x[:, :10] @ w[:10] + x[:, 10:] @ w[10:]))
_add("traced slice", one(lambda w, x: x @ lax.dynamic_slice_in_dim(w, ids_of(x)[1], 10, axis=1)))
_add("strided slice", one(lambda w, x: x @ w[:, ::2]))
_add("reversed outputs", one(lambda w, x: x @ w[:, ::-1]))
_add(
    "sliced and split into heads",
    one(lambda w, x: jnp.einsum("td,dhk->thk", x, w[:, E:].reshape(D, 2, H, K)[:, 1])),
    FUSED,
)
_add("fused after", lambda p, x: jnp.concatenate([x @ p[n] for n in "qkv"], axis=-1), dict.fromkeys("qkv", KERNEL))
_add(
    "concatenated outputs",
    lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1),
    {"q": KERNEL, "k": ((D, 10), None), "v": ((D, 10), None)},
)
_add(
    "concatenated inputs",
    lambda p, x: jnp.concatenate([x, x[:, :E]], axis=1) @ jnp.concatenate([p["a"], p["b"]], axis=0),
    {"a": KERNEL, "b": ((E, E), None)},
)
_add(
    "concatenated, cast and transposed",
    lambda p, x: jnp.concatenate([p["q"], p["k"]], axis=1).astype(x.dtype).T @ x.T * 0.5,
    {"q": KERNEL, "k": ((D, 10), None)},
)

# 29, 30: layers stacked by the program; casts outside a loop
_add(
    "list stacked, then scan",
    lambda p, x: lax.scan(_layer, x, jnp.stack([p["a"], p["b"], p["c"]]))[0],
    dict.fromkeys("abc", SQUARE),
    loops=True,
)
_add(
    "list of mixed ranks",
    lambda p, x: lax.scan(_layer, x, jnp.stack([p["a"], p["b"]]))[0],
    dict.fromkeys("ab", SQUARE),
    loops=True,
    ranks={"a": 2, "b": 4},
)
_add(
    "stacks joined",
    lambda p, x: lax.scan(_layer, x, jnp.concatenate([p["a"], p["b"][None]]))[0],
    {"a": ((2, D, D), "bio"), "b": SQUARE},
    loops=True,
)
_add(
    "cast outside, scan inside",
    one(lambda w, x: lax.scan(_layer, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))[0]),
    {"w": STACK},
    loops=True,
)

# 33: mixed dtypes
_add("float32 product of casts", one(lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32)))
_add("upcast", one(lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32)))
_add("downcast and up", one(lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)))

# Others that ordinary code does
_add("barrier", one(lambda w, x: x @ lax.optimization_barrier(w)))
_add("new axis and back", one(lambda w, x: x @ w[None, :, None, :].squeeze((0, 2))))
_add("size-1 sides", one(lambda w, x: x @ w), {"w": ((D, 1), None)})
_add("output of a batch of one", one(lambda w, x: jnp.einsum("td,ado->ato", x, w[None])))
_add(
    "grouped product",
    one(lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3], jnp.int32))),
    {"w": ((L, D, E), "bio")},
    quantized=False,
    maps=False,  # a ragged_dot over unmapped groups is not implemented
)

# Those that `make test` runs with quantized bases too; `make slow` runs all.
BOTH = frozenset(
    (
        "matmul",
        "transpose",
        "astype",
        "traced_scalar",
        "heads_permuted_and_merged",
        "kernel_iio",
        "kernel_oi",
        "einsum do,td->ot",
    )
    + (
        "dot_general batch",
        "subset of outputs",
        "inner jit cached",
        "remat default",
        "scan",
        "scan remat",
        "scan reverse",
    )
    + (
        "nested scan",
        "traced index of a stack",
        "vmap over weights",
        "cond",
        "fori carry",
        "take fill",
        "tied head",
        "conv strided",
    )
    + (
        "fused, split",
        "traced slice",
        "concatenated outputs",
        "list of mixed ranks",
        "stacks joined",
        "cast outside, scan inside",
    )
)
KINDS = ("lora", "lora on nf4", "nf4")
DTYPES = ("float32", "bfloat16")


def make(program: Program, kind: str, dtype: str) -> tuple[dict[str, Any], jax.Array]:
    """(params, x) of a kind; factors such that updates are as large as the base."""
    keys = iter(jax.random.split(KEY, 99))
    roles = {name: roles for name, (_, roles) in program.weights.items() if roles}
    params = {}
    for name, (shape, role) in program.weights.items():
        trailing = shape[-len(role) :] if role else shape
        fan_in = math.prod(n for n, letter in zip(trailing, role or "io", strict=True) if letter == "i")
        w = jax.random.normal(next(keys), shape) / math.sqrt(fan_in)
        params[name] = w.astype(dtype)
    if "nf4" in kind:
        params = {n: jlora.quantize(w, jlora.NF4(block_size=32), roles=roles.get(n)) for n, w in params.items()}
    if "lora" in kind:
        alphas = {n: 2.0 * rank for n, rank in program.ranks.items()}  # another scaling than the others'
        config = LoraConfig(rank=3, alpha=4.5, targets=list(params), rank_pattern=program.ranks, alpha_pattern=alphas)
        params = jlora.add_lora(params, config, key=KEY, roles=roles)
        params = {
            n: dataclasses.replace(w, lora_B=0.7 * jax.random.normal(next(keys), w.lora_B.shape))
            for n, w in params.items()
        }
    return params, jax.random.normal(next(keys), program.x).astype(dtype)


# Relative to the norm. float32: sums in another order. bfloat16: the merged weight is rounded to 8 bits, while base and
# update are not rounded to each other; gradients likewise, and a relu's gate may fall to the other side.
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}


def rows(loops: bool):
    """The list as pytest parameters: every program with every kind of weight and dtype, most of it slow."""
    for name, program in PROGRAMS.items():
        for kind in KINDS if program.quantized else ("lora",):
            for dtype in DTYPES:
                if program.loops == loops:
                    quick = (
                        (kind, dtype) == ("lora", "float32")
                        or (kind, dtype) == ("lora on nf4", "bfloat16")
                        and name in BOTH
                    )
                    yield pytest.param(
                        name, kind, dtype, id=f"{name}-{kind}-{dtype}", marks=() if quick else pytest.mark.slow
                    )


def assert_close(mine, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all()
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= tolerance, f"{error:.2e} of the norm"


def assert_factored(jaxpr, program, kind):
    """No product of the size of a kernel, and in loops no dense stack of a quantized base."""
    shapes = [shape for shape, _ in program.weights.values()]
    # Of a stack also a row of it.
    kernels = [sorted(shape[roles.count("b") if roles else 0 :]) for shape, roles in program.weights.values()]
    stacks = [math.prod(shape) for shape, roles in program.weights.values() if roles and roles[0] == "b"]
    for eqn in walk(jaxpr.jaxpr):
        for var in eqn.outvars:
            shape = var.aval.shape
            if eqn.primitive.name == "dot_general":
                assert sorted(shape) not in [*map(sorted, shapes), *kernels], f"a product {shape}: {eqn}"
            if program.loops and "nf4" in kind and jnp.issubdtype(var.aval.dtype, jnp.floating):
                assert math.prod(shape) not in stacks, f"a dense stack {shape}: {eqn.primitive}"


def check(name: str, kind: str, dtype: str) -> None:
    """What a program must show: factored, equal to the merged function, with its gradients, and other than the base."""
    program = PROGRAMS[name]
    params, x = make(program, kind, dtype)
    wrapped = jlora.wrap(program.fn)
    report = wrapped.check(params, x)
    assert report.ok and not report.materialized and report.totals()["factored"] >= len(params), str(report)

    adapted = "lora" in kind
    train, frozen = jlora.split(params) if adapted else (None, params)

    def of(fn, prepare):
        """Value, the same under vmap, and the gradients of x and the adapter of a fixed functional of the value."""

        def run(train, x):
            return fn(prepare(jlora.combine(train, frozen) if adapted else frozen), x)

        def functional(train, x):
            y = run(train, x).astype(jnp.float32)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

        def everything(train, x):
            grads = jax.grad(functional, (0, 1) if adapted else (1,))(train, x) if program.differentiable else ()
            mapped = jax.vmap(run, (None, 0))(train, x[None])[0] if program.maps else run(train, x)
            return run(train, x), mapped, grads

        return everything

    mine, theirs = of(wrapped, lambda p: p), of(program.fn, jlora.merge)
    jaxpr = jax.make_jaxpr(mine)(train, x)
    assert_factored(jaxpr, program, kind)

    @jax.jit
    def compared(train, x):
        base = wrapped(jlora.remove_lora(params), x) if adapted else None
        return mine(train, x), theirs(train, x), base

    (y, y_vmapped, grads), (y_merged, _, grads_merged), base = compared(train, x)
    tolerance = TOLERANCE["bfloat16" if "bf16[" in str(jaxpr) else "float32"]
    assert_close((y, y_vmapped), (y_merged, y_merged), tolerance)
    assert_close(grads, grads_merged, tolerance)
    if adapted:
        assert float(jnp.abs(base.astype(jnp.float32) - y.astype(jnp.float32)).max()) > 1e-3


def check_eagerly(name: str, kind: str, dtype: str) -> None:
    """The same without `jit`, and the same again: by the same wrapped function, and by one made anew in the same process."""
    program = PROGRAMS[name]
    params, x = make(program, kind, dtype)
    wrapped = jlora.wrap(program.fn)
    y = wrapped(params, x)
    for again in (wrapped, jlora.wrap(program.fn)):
        np.testing.assert_array_equal(np.asarray(again(params, x), np.float32), np.asarray(y, np.float32))
    jaxpr = str(jax.make_jaxpr(wrapped)(params, x))
    assert_close(y, program.fn(jlora.merge(params), x), TOLERANCE["bfloat16" if "bf16[" in jaxpr else "float32"])
