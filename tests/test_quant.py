"""Quantized weights against bitsandbytes (CPU), and as values in jit, grad, vmap and scan."""

import dataclasses
import hashlib
import os
import re

os.environ.setdefault("BNB_CUDA_VERSION", "")

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jlora
from jlora.quant import SPECS
from jlora.quant import codes as tables
from jlora.quant.matmul import IMPLEMENTATIONS, quantized_matmul


def draw(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def golden(rows, cols):
    """The structured weight of which the hashes below are known; every value is exact in float32."""
    k = np.arange(rows * cols)
    return ((((37 * k) % 101) - 50) / 64 * (1 + (k // 64) % 5)).astype(np.float32).reshape(rows, cols)


def outliers(*shape):
    w = draw(*shape)
    w.reshape(-1)[::517] *= 1000
    return w


def with_zero_blocks(*shape):
    w = draw(*shape)
    w.reshape(-1)[: w.size // 2] = 0
    return w


WEIGHTS = {  # [out, in], as PyTorch and bitsandbytes have them
    "random": draw(96, 128),
    "small": draw(64, 192, scale=1e-3),
    "outliers": outliers(48, 256),
    "zero blocks": with_zero_blocks(64, 128),
    "all zero": np.zeros((32, 64), np.float32),
    "constant": np.full((32, 64), 0.3, np.float32),
    "straddling rows": draw(24, 40),
    "partial last block": draw(7, 50),
    "odd count": draw(3, 7),
    "one element": draw(1, 1),
    "exact thresholds": np.tile(
        np.concatenate([(tables.NF4_CODE[1:] + tables.NF4_CODE[:-1]) / np.float32(2), np.ones(1, np.float32)]), (8, 4)
    ),
    "golden": golden(32, 128),
}


def bnb_quantize(w, *, block_size=64, double_quant=True, dtype=torch.float32):
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(w).to(dtype), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    return packed, state


def bnb_dequantize(packed, state):
    """What bitsandbytes decodes, float32 [out, in].

    As one row: 0.50.2's CPU kernel takes the wrong absmax where blocks straddle rows (error 1.6 rather than 0.5
    on N(0, 1), 64 x 64 in blocks of 128).
    """
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    flat = bnb.dequantize_4bit(packed, state)
    state.shape = shape
    if shape[1] % state.blocksize == 0:
        assert torch.equal(flat.reshape(shape), bnb.dequantize_4bit(packed, state))
    return flat.reshape(shape).float().numpy()


def quantize_rows(w, spec):
    """Quantizes a weight given as PyTorch has it."""
    return jlora.quantize(jnp.asarray(w).T, spec)


CASES = [(name, 64) for name in WEIGHTS] + [
    (name, size) for name in ("random", "odd count") for size in (128, 256, 512, 1024, 2048, 4096)
]


@pytest.mark.few(8)
@pytest.mark.parametrize(("name", "block_size"), CASES)
def test_codes_and_absmax_are_bitsandbytes(name, block_size):
    w = WEIGHTS[name]
    packed, state = bnb_quantize(w, block_size=block_size, double_quant=False)
    q = quantize_rows(w, jlora.NF4(block_size=block_size, double_quant=False))
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), packed.numpy().reshape(-1))
    # Exact, but that bitsandbytes clamps the absmax of a zero block in an only, partial block to 1e-38.
    np.testing.assert_allclose(np.asarray(q.absmax).reshape(-1), state.absmax.numpy(), rtol=0, atol=1e-37)
    expected = bnb_dequantize(packed, state)
    np.testing.assert_array_equal(np.asarray(jlora.dequantize(q)).T, expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(jlora.dequantize)(q)).T, expected)


@pytest.mark.few(5)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_double_quantization_is_bitsandbytes(name, dtype):
    w = WEIGHTS[name]
    packed, state = bnb_quantize(w, dtype=getattr(torch, dtype))
    q = quantize_rows(w.astype(jnp.dtype(dtype)), jlora.NF4())
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), packed.numpy().reshape(-1))
    codes, theirs = np.asarray(q.absmax, np.int32).reshape(-1), state.absmax.numpy().astype(np.int32)
    if float(q.scales.nested.max()) > 1e-6 * float(q.scales.offset):  # else all codes stand for the mean
        assert np.abs(codes - theirs).max() <= 1
        assert (codes != theirs).sum() <= max(1, 0.005 * codes.size)
    np.testing.assert_allclose(np.asarray(q.scales.nested), state.state2.absmax.numpy(), rtol=1e-5, atol=1e-6)
    assert abs(float(q.scales.offset) - float(state.offset)) <= 1e-6 * max(1, abs(float(state.offset)))


def bitsandbytes_tensor(w, dtype=torch.float32, block_size=64, **kwargs):
    """(bitsandbytes' packed weight and state, the same bytes as an NF4Tensor)."""
    packed, state = bnb_quantize(w, dtype=dtype, block_size=block_size, **kwargs)
    q = quantize_rows(w, jlora.NF4(block_size=block_size, double_quant=state.nested))
    nested = {}
    if state.nested:
        nested = {"nested": jnp.asarray(state.state2.absmax.numpy()), "offset": jnp.float32(state.offset.item())}
    return (
        packed,
        state,
        dataclasses.replace(
            q,
            codes=jnp.asarray(packed.numpy()).reshape(q.codes.shape),
            scales=dataclasses.replace(
                q.scales, blocks=jnp.asarray(state.absmax.numpy()).reshape(q.absmax.shape), **nested
            ),
            logical_dtype=str(dtype).removeprefix("torch."),
        ),
    )


@pytest.mark.few(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*WEIGHTS, "large"])
def test_the_same_bytes_decode_to_the_same_bits(name, dtype):
    """Also under jit, where XLA would contract the product and the sum of the absmax to one rounding."""
    w = draw(640, 1024) if name == "large" else WEIGHTS[name]
    packed, state, q = bitsandbytes_tensor(w, dtype)
    expected = bnb_dequantize(packed, state)
    for decode in (jlora.dequantize, jax.jit(jlora.dequantize)):
        np.testing.assert_array_equal(np.asarray(decode(q), np.float32).T, expected)


def test_the_same_bits_inside_the_scanned_matmul():
    """An identity as x makes the product the weight itself."""
    layers = [bitsandbytes_tensor(draw(96, 128, seed=i)) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(q for _, _, q in layers))
    eye = jnp.eye(128)

    @jax.jit
    def run(stacked):
        return jax.lax.scan(lambda carry, q: (carry, jlora.linear(eye, q)), 0, stacked)[1]

    for ours, (packed, state, _) in zip(run(stacked), layers, strict=True):
        np.testing.assert_array_equal(np.asarray(ours).T, bnb_dequantize(packed, state))


@pytest.mark.parametrize(
    ("shape", "bytes_", "absmax", "dense", "nested"),
    [
        ((4, 64), "21786e1c1cd80ff7", "411d97242758c86b", "7c866dbcc8f7e165", ([0, 47, 207, 255], 1.171875, 1.953125)),
        ((32, 128), "2e744bd89d3bdc33", "77186b1f5d32e0ce", "d584b976eedfd323", ([2, 37, 161, 220, 255], 1.5883789, 2.31787109375)),
        ((6, 40), "64e6a03e23e3b680", "411d97242758c86b", "30ac3595288c253b", ([0, 47, 207, 255], 1.171875, 1.953125)),
        ((3, 7), "942982dcee65e5a5", "569244e6449e7f38", "eb08fc775b2f7742", ([127], 0.0, 0.78125)),
    ],
)  # fmt: skip
def test_golden_vectors(shape, bytes_, absmax, dense, nested):
    digest = lambda x: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]  # noqa: E731
    q = quantize_rows(golden(*shape), jlora.NF4(double_quant=False))
    assert digest(q.codes) == bytes_
    assert digest(q.absmax) == absmax
    assert digest(np.asarray(jlora.dequantize(q)).T) == dense
    codes, scale, offset = nested
    q = quantize_rows(golden(*shape), jlora.NF4())
    assert np.asarray(q.absmax).reshape(-1)[: len(codes)].tolist() == codes
    np.testing.assert_allclose([float(q.scales.nested[0]), float(q.scales.offset)], [scale, offset], rtol=1e-7)


def test_code_tables_are_bitsandbytes():
    np.testing.assert_array_equal(tables.NF4_CODE, bnb.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(tables.DYNAMIC_CODE, bnb.create_dynamic_map().numpy())
    unsigned = bnb.create_dynamic_map(signed=False).numpy()
    np.testing.assert_array_equal(tables.UNSIGNED_DYNAMIC_CODE, unsigned)
    assert hashlib.sha256(tables.DYNAMIC_CODE.astype("<f4").tobytes()).hexdigest().startswith("e732639a65f497b4")


def test_nf4_code_is_the_papers_quantiles():
    """QLoRA, appendix E: quantiles of N(0, 1), 8 of the positive half and 7 of the negative, scaled to 1, and a zero."""
    from statistics import NormalDist

    offset = 0.9677083
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    code = np.sort(np.array([*positive, *negative, 0.0]))
    np.testing.assert_allclose(code / code.max(), tables.NF4_CODE, atol=1e-6)


def test_every_way_to_decode_is_the_table():
    codes = np.arange(256, dtype=np.uint8) % 16
    for decode in (tables.look_up, tables.choose_by_bits):
        np.testing.assert_array_equal(jax.jit(lambda c, d=decode: d(tables.NF4_CODE, c))(codes), tables.NF4_CODE[codes])


def test_error_on_a_normal_weight():
    w = draw(1024, 1024)
    for double_quant in (False, True):
        q = jlora.quantize(w, jlora.NF4(double_quant=double_quant))
        assert abs(float(jnp.abs(jlora.dequantize(q) - w).mean()) - 0.0728) < 5e-4


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (jlora.NF4(), 4.127),
        (jlora.NF4(double_quant=False), 4.5),
        (jlora.Int8(), 8.5),
        (jlora.Int4(), 4.5),
        (jlora.Int8(double_quant=True), 8.127),
        (jlora.Int4G128(), 4.125),
        (jlora.MXFP4(), 4.25),
        (jlora.Q8_0(), 8.5),
        (jlora.Q4_0(), 4.5),
        (jlora.Q4_1(), 5.0),
        (jlora.Q5_0(), 5.5),
        (jlora.Q5_1(), 6.0),
    ],
)
def test_bits_per_parameter(spec, bits):
    q = jlora.quantize(jnp.ones((1024, 1024)), spec)
    assert abs(q.bits_per_param - bits) < 0.001
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q)) == jlora.nbytes({"kernel": q})


# ---- every format ----------------------------------------------------------------------------------------------------

SETTINGS = [
    (name, double)
    for name, spec in SPECS.items()
    for double in ((False, True) if hasattr(spec, "double_quant") else (None,))
]
SHAPES = [(128, 96), (2, 50, 6), (64,), (100,), (40, 24), (7, 3), (3, 128, 96), (2, 3, 64, 8)]


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "double_quant"), SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(name, double_quant, shape):
    w = draw(*shape)
    spec = SPECS[name](**({} if double_quant is None else {"double_quant": double_quant}))
    q = jlora.quantize(w, spec)
    assert (q.shape, q.ndim, q.dtype, q.size) == (shape, len(shape), jnp.float32, w.size)
    assert isinstance(q, jlora.NF4Tensor) == (name == "nf4")
    dense = jlora.dequantize(q)
    assert dense.shape == shape and dense.dtype == jnp.float32
    # Half the widest gap between two codes, of the block's absmax, which is at most the weight's; more for its own coding.
    # ggml's: half a step, a whole one at the end that has no code, and what float16 rounds off the scale and the minimum.
    gap = {
        "nf4": 0.152,
        "int8": 0.5 / 127,
        "int4": 0.5 / 7,
        "int4-g128": 0.503 / 7.5,
        "mxfp4": 0.25,
        "q8_0": 0.5 / 127 + 0.0005,
        "q4_0": 1 / 8 + 0.0005,
        "q4_1": 1 / 15 + 0.001,
        "q5_0": 1 / 16 + 0.0005,
        "q5_1": 1 / 31 + 0.001,
    }[name]
    assert np.abs(dense - w).max() <= (gap + 0.05 * bool(double_quant)) * np.abs(w).max()
    assert jlora.dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16
    again = jlora.quantize(dense, spec)
    if not double_quant and name != "int4-g128":  # whose largest code is not its absmax
        np.testing.assert_array_equal(again.codes, q.codes)
    layers = jax.tree.leaves(jax.jit(lambda w: jlora.quantize(w, spec))(w))
    for a, b in zip(layers, jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", SPECS)
def test_a_stack_is_its_layers(name):
    w = draw(3, 64, 32)
    stacked = jlora.quantize(w, SPECS[name]())
    for i in range(3):
        layer = jlora.quantize(w[i], SPECS[name]())
        for a, b in zip(
            jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], stacked)), jax.tree.leaves(layer), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_integer_formats_round_as_the_paper_writes_them():
    w = draw(2, 64)
    absmax = np.abs(w).max(-1, keepdims=True)
    for spec, unit in ((jlora.Int8(), 127), (jlora.Int4(), 7)):
        q = quantize_rows(w, spec)
        codes = np.asarray(q.codes)
        nibbles = np.stack([codes >> 4, codes & 15], axis=-1).reshape(codes.shape[0], -1)
        values = (codes if unit == 127 else nibbles).astype(np.int32) - (unit + 1)
        np.testing.assert_array_equal(values, np.round(w * (np.float32(unit) / absmax)))
        np.testing.assert_allclose(np.asarray(jlora.dequantize(q)).T, values * (absmax / np.float32(unit)), rtol=3e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", [(128, 96), (40, 24)], ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_and_their_gradient(name, implementation, transpose, shape):
    q = jlora.quantize(draw(*shape), SPECS[name]())
    dense = jlora.dequantize(q)
    x = jnp.asarray(draw(5, shape[1 if transpose else 0], seed=1))

    def ours(x):
        return quantized_matmul(implementation, transpose, jnp.float32, jnp.float32, x, q)

    def plain(x):
        return jnp.matmul(x, dense.T if transpose else dense, precision="highest")

    for f in map(jax.jit, (ours, jax.remat(ours))):
        np.testing.assert_allclose(f(x), plain(x), atol=2e-5)
        gradient, expected = (jax.jit(jax.grad(lambda x, g=g: jnp.sum(jnp.sin(g(x)))))(x) for g in (f, plain))
        np.testing.assert_allclose(gradient, expected, atol=1e-3)
    np.testing.assert_allclose(jax.vmap(lambda x: jlora.linear(x, q, transpose=transpose))(x), plain(x), atol=2e-5)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", SPECS)
def test_products_of_a_stack_under_vmap(name):
    w = draw(3, 64, 32)
    x = jnp.asarray(draw(3, 5, 64))
    q = jlora.quantize(w, SPECS[name]())
    ours = jax.vmap(jlora.linear)(x, q)
    np.testing.assert_allclose(ours, jnp.einsum("lti,lio->lto", x, jlora.dequantize(q)), atol=2e-5)


@pytest.mark.slow
def test_bfloat16_products_sum_in_float32():
    q = jlora.quantize(draw(512, 64).astype(jnp.bfloat16), jlora.NF4())
    x = jnp.asarray(draw(4, 512), jnp.bfloat16)
    exact = np.asarray(x, np.float32) @ np.asarray(jlora.dequantize(q), np.float32)
    np.testing.assert_allclose(jlora.linear(x, q, out_dtype=jnp.float32), exact, rtol=1e-4, atol=1e-3)
    assert jlora.linear(x, q).dtype == jnp.bfloat16


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", [(128, 64), (50, 6)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_a_quantized_embedding(name, shape):
    q = jlora.quantize(draw(*shape), SPECS[name]())
    ids = jnp.array([[0, 1, shape[0] - 1], [7, 7, 999]])
    np.testing.assert_array_equal(jlora.embed(ids, q), jlora.dequantize(q)[jnp.clip(ids, 0, shape[0] - 1)])


def test_the_weight_gets_no_gradient():
    q = jlora.quantize(draw(64, 32), jlora.NF4())
    gradient = jax.grad(lambda q, x: jnp.sum(jlora.linear(x, q)), allow_int=True)(q, jnp.ones((2, 64)))
    assert all(g.dtype == jax.dtypes.float0 or not np.asarray(g).any() for g in jax.tree.leaves(gradient))


def test_repr_and_casting():
    q = jlora.quantize(draw(128, 64), jlora.NF4())
    assert repr(q) == "NF4Tensor(shape=(128, 64), dtype=float32, block_size=64, double_quant)"
    assert repr(jlora.quantize(draw(128, 64), jlora.Int8())) == (
        "QuantizedTensor(int8, shape=(128, 64), dtype=float32, block_size=64)"
    )
    cast = jlora.cast({"kernel": q}, jnp.bfloat16)["kernel"]
    assert cast.dtype == jnp.bfloat16 and cast.codes is q.codes
    assert jlora.dequantize(cast).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match=r"jlora\.linear"):
        jnp.sin(q)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jlora.quantize(np.array([1.0, np.nan]), jlora.NF4()), ValueError, "1 of the 2"),
        (lambda: jlora.quantize(np.array([[1.0, np.inf]]), jlora.Int8()), ValueError, "NaN or infinite"),
        (lambda: jlora.quantize(np.arange(8), jlora.NF4()), TypeError, "int"),
        (lambda: jlora.quantize(np.float32(1), jlora.NF4()), ValueError, "at least one axis"),
        (lambda: jlora.quantize(np.zeros((0, 4), np.float32), jlora.NF4()), ValueError, "one element"),
        (
            lambda: jlora.quantize(jlora.quantize(np.ones(64, np.float32), jlora.NF4()), jlora.NF4()),
            TypeError,
            "already",
        ),
        (lambda: jlora.NF4(block_size=48), ValueError, "block_size.*48"),
        (lambda: jlora.Int8(block_size=64.0), ValueError, "block_size"),
        (lambda: jlora.MXFP4(block_size=64), ValueError, "block_size` of MXFP4 must be 32; got 64"),
        (lambda: jlora.Int4G128(block_size=64), ValueError, "block_size` of Int4G128 must be 128; got 64"),
    ],
)
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_under_jit_a_bad_block_decodes_to_nan():
    q = jax.jit(lambda w: jlora.quantize(w, jlora.NF4(double_quant=False)))(jnp.ones(128).at[3].set(jnp.nan))
    dense = jlora.dequantize(q)
    assert np.isnan(dense[:64]).all() and (dense[64:] == 1).all()


# ---- trees -----------------------------------------------------------------------------------------------------------


def tree(dtype=jnp.float32):
    def kernel(i, a, b):
        return {"kernel": jnp.asarray(draw(a, b, seed=i)).astype(dtype)}

    def layer(i):
        norm = {"scale": jnp.ones(64)}
        return {"attn": {"q_proj": kernel(i, 64, 64)}, "mlp": {"up": kernel(9 + i, 64, 128), "norm": norm}}

    return {
        "model": {"embed": {"embedding": jnp.asarray(draw(50, 64))}, "layers": {"0": layer(0), "1": layer(1)}},
        "lm_head": kernel(99, 64, 50),
    }


def quantized_paths(params):
    from jlora.tree.paths import flatten

    return [path for path, leaf in flatten(params).items() if isinstance(leaf, jlora.QuantizedTensor)]


def test_quantize_params_takes_linear_kernels_only():
    params = tree()
    q = jlora.quantize_params(params, jlora.NF4())
    assert quantized_paths(q) == [f"model/layers/{i}/{m}/kernel" for i in (0, 1) for m in ("attn/q_proj", "mlp/up")]
    assert q["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    assert quantized_paths(jlora.quantize_params(params, jlora.NF4(), targets=["up"])) == [
        f"model/layers/{i}/mlp/up/kernel" for i in (0, 1)
    ]
    assert quantized_paths(jlora.quantize_params(params, jlora.NF4(), targets=r".*\.1\..*up")) == [
        "model/layers/1/mlp/up/kernel"
    ]
    assert jlora.count(q) == jlora.count(params)


@pytest.mark.slow
def test_stacking_and_quantizing_commute():
    one = jlora.quantize_params(jlora.stack_layers(tree()), jlora.NF4())
    other = jlora.stack_layers(jlora.quantize_params(tree(), jlora.NF4()))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    back = jlora.unstack_layers(one)
    assert jax.tree.structure(back) == jax.tree.structure(jlora.quantize_params(tree(), jlora.NF4()))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["nope"], "matches no linear kernel"),
        (["lm_head"], "output head"),
        (["upp"], "Did you mean 'up'"),
        ("up", "no linear kernel"),
    ],
)
def test_quantize_params_refuses_targets(targets, words):
    with pytest.raises(ValueError, match=words):
        jlora.quantize_params(tree(), jlora.NF4(), targets=targets)


def test_quantize_params_refuses_wrapped_kernels():
    q = jlora.quantize_params(tree(), jlora.NF4())
    with pytest.raises(ValueError, match="NF4Tensor"):
        jlora.quantize_params(q, jlora.NF4())
    adapted = jlora.add_lora(tree(), jlora.LoraConfig(rank=2), key=jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape("then `add_lora`")):
        jlora.quantize_params(adapted, jlora.NF4())


def test_adapters_on_a_quantized_base():
    q = jlora.quantize_params(tree(), jlora.NF4())
    params = jlora.add_lora(q, jlora.LoraConfig(rank=2), key=jax.random.key(0))
    for a, b in zip(jax.tree.leaves(jlora.merge(params)), jax.tree.leaves(jlora.merge(q)), strict=True):
        np.testing.assert_array_equal(a, b)
    adapter, base = jlora.split(params)
    combined = jlora.combine(adapter, base)
    assert jax.tree.structure(combined) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jlora.count(adapter) == sum(x.size for x in jax.tree.leaves(adapter))
    assert jax.tree.structure(jlora.remove_lora(params)) == jax.tree.structure(q)
    weight = params["model"]["layers"]["0"]["mlp"]["up"]["kernel"]
    assert isinstance(weight.base, jlora.NF4Tensor)


@pytest.mark.parametrize(("rows", "product"), [(1, "reduce"), (2, "dot_general"), (512, "dot_general")])
def test_what_a_gpu_would_run(rows, product, monkeypatch):
    """Lowered for CUDA, not run: codes are looked up in a table, and a few rows multiply without writing the kernel."""
    q = jlora.quantize(draw(128, 64), jlora.NF4())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = jax.jit(lambda x, q: jlora.linear(x, q)).trace(jnp.ones((rows, 128), jnp.bfloat16), q)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.gather" in text and "tensor<16xf32>" in text
    assert ("stablehlo.dot_general" in text) == (product == "dot_general")
    assert "optimization_barrier" in text
