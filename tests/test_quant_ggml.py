"""ggml's block formats against the `gguf` package, values, codes and bytes bit for bit; and as the values they are."""

import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jlora
from jlora.quant import GGML_TYPES, SPECS, from_file, to_file

MADE = [name for name, spec in GGML_TYPES.items() if spec.name in SPECS]
READ = [name for name in GGML_TYPES if name not in MADE]


def draw(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def ggml_type(name):
    return gguf.GGMLQuantizationType[name]


def dequantized(rows, name):
    """The `gguf` package's values, float32 [out, in]."""
    return gguf.quants.dequantize(rows, ggml_type(name))


def random_rows(name, d_out, d_in, *, seed=0, halves=None):
    """Bytes of a weight [out, in] in which every bit is drawn but those of the float16 numbers, which are N(0, 0.1) or `halves`."""
    spec, rng = GGML_TYPES[name](), np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (d_out, d_in // spec.block_size, spec.file_bytes), dtype=np.uint8)
    start = 0
    for _, kind, count in spec.fields:
        if kind is np.float16:
            drawn = (
                rng.standard_normal(blocks.shape[:2]) * 0.1 if halves is None else rng.choice(halves, blocks.shape[:2])
            )
            blocks[..., start : start + 2] = drawn.astype(np.float16)[..., None].view(np.uint8)
        start += np.dtype(kind).itemsize * count
    return blocks.reshape(d_out, -1)


def random_kernel(name, d_in, d_out, seed=0):
    return from_file(jnp.asarray(random_rows(name, d_out, d_in, seed=seed)), GGML_TYPES[name](), "float32")


def test_they_are_ggmls():
    """Elements and bytes of a block, and the fields' names, as the package lists them."""
    for name, kind in GGML_TYPES.items():
        spec = kind()
        assert (spec.block_size, spec.file_bytes) == gguf.GGML_QUANT_SIZES[ggml_type(name)]
        assert {field for field, *_ in spec.fields} == {"codes", *spec.stored.by_block}


HALVES = {
    "as in models": None,
    "the ends of float16": [65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0],
    "not finite": [np.inf, -np.inf, np.nan, 1.0],
}


@pytest.mark.few(12)
@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("name", GGML_TYPES)
def test_any_block_decodes_to_the_packages_bits(name, halves):
    rows = random_rows(name, 24, 768, halves=HALVES[halves])
    with np.errstate(all="ignore"):
        expected = dequantized(rows, name)
    q = from_file(jnp.asarray(rows), GGML_TYPES[name](), "float32")
    assert q.shape == (768, 24) and q.nbytes == rows.nbytes
    for decode in (jlora.dequantize, jax.jit(jlora.dequantize)):
        ours = np.asarray(decode(q)).T
        np.testing.assert_array_equal(ours, expected)
        if halves != "not finite":
            np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))
    rounded = np.asarray(jlora.dequantize(q, jnp.bfloat16), np.float32).T
    np.testing.assert_array_equal(rounded, expected.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(to_file(q), rows)


WEIGHTS = {
    "random": draw(96, 256),
    "small": draw(64, 256, scale=1e-4),
    "large": draw(64, 256, scale=1e3),
    "outliers": draw(48, 256) * np.where(np.arange(256) % 61, 1, 1000).astype(np.float32),
    "zeros": np.zeros((4, 256), np.float32),
    "constant": np.full((4, 256), -0.3, np.float32),
    "positive": np.abs(draw(16, 256)) + 1,
    "ties of the largest": np.tile(np.array([1.5, -1.5], np.float32), (8, 128)) * (1 - 2 * (np.arange(8) % 2))[:, None],
    "halves of a step": (np.arange(8 * 256).reshape(8, 256) % 255 - 127).astype(np.float32) / 2,
}


@pytest.mark.few(8)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MADE)
def test_quantizing_makes_the_packages_bytes(name, weight):
    w = WEIGHTS[weight].astype(np.float32)
    expected = gguf.quants.quantize(w, ggml_type(name))
    q = jlora.quantize(jnp.asarray(w).T, GGML_TYPES[name]())
    np.testing.assert_array_equal(to_file(q), expected)
    np.testing.assert_array_equal(np.asarray(jlora.dequantize(q)).T, dequantized(expected, name))


@pytest.mark.parametrize("name", READ)
def test_what_only_files_hold_is_refused_by_name(name):
    spec = GGML_TYPES[name]()
    for make in (
        lambda: jlora.quantize(jnp.ones((256, 8)), spec),
        lambda: jlora.quantize_params({"up": {"kernel": jnp.ones((256, 8))}}, spec),
    ):
        with pytest.raises(ValueError, match=rf"cannot be brought to {spec.name}.*keep.*Q4_1\(\)"):
            make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jlora.quantize(jnp.full((64, 2), 1e8), jlora.Q4_0()), "1e.08, is beyond .* q4_0.*Int8"),
        (lambda: jlora.quantize(jnp.full((64, 2), -7e4), jlora.Q5_1()), "7e.04, is beyond .* q5_1"),
        (lambda: jlora.Q4_K(block_size=32), "`block_size` of Q4_K must be 256; got 32"),
        (lambda: to_file(jlora.quantize(jnp.ones((64, 2)), jlora.NF4())), "blocks of a GGUF file; got NF4Tensor"),
        (lambda: to_file(jlora.quantize(jnp.ones((40, 2)), jlora.Q4_0())), "rows of whole blocks"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_checkpoint_beyond_the_scales_is_refused(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "large")
    (file,) = (tmp_path / "large").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name] * 0 + 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinite: model.layers.0.mlp.up_proj.weight \(as q5_1\)"):
        jlora.load(tmp_path / "large", dtype=jnp.float32, quantize=jlora.Q5_1())


# ---- as values -------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("name", GGML_TYPES)
def test_products_lookups_and_gradients(name):
    q = random_kernel(name, 512, 24)
    dense = jlora.dequantize(q)
    for transpose in (False, True):
        x = jnp.asarray(draw(5, 24 if transpose else 512, seed=1))

        def ours(x, transpose=transpose):
            return jlora.linear(x, q, transpose=transpose)

        def plain(x, transpose=transpose):
            return jnp.matmul(x, dense.T if transpose else dense, precision="highest")

        largest = float(jnp.abs(plain(x)).max())
        np.testing.assert_allclose(jax.jit(ours)(x), plain(x), atol=1e-5 * largest)
        gradient, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(x) for f in (ours, plain))
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    ids = jnp.array([[0, 1, 511], [255, 256, 31]])
    np.testing.assert_array_equal(jlora.embed(ids, q), dense[ids])


@pytest.mark.few(3)
@pytest.mark.parametrize("name", GGML_TYPES)
def test_stacked_scanned_and_sharded(name):
    layers = [random_kernel(name, 256, 16, seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    assert stacked.shape == (3, 256, 16) and stacked.nbytes == 3 * layers[0].nbytes
    dense = np.stack([jlora.dequantize(q) for q in layers])
    np.testing.assert_array_equal(jlora.dequantize(stacked), dense)
    eye = jnp.eye(256)
    _, products = jax.jit(lambda s: jax.lax.scan(lambda carry, q: (carry, jlora.linear(eye, q)), 0, s))(stacked)
    np.testing.assert_array_equal(products, dense)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        placed = jax.device_put(layers[0], NamedSharding(mesh, spec))
        np.testing.assert_array_equal(jax.jit(jlora.linear)(eye, placed), dense[0])


@pytest.mark.few(3)
@pytest.mark.parametrize("name", GGML_TYPES)
def test_adapted_wrapped_and_merged(name):
    """`jlora.wrap` of a plain function, LoRA on the packed kernel, and the merged weight, which is dense."""
    q = random_kernel(name, 256, 16)
    x = jnp.asarray(draw(4, 256, seed=3))
    wrapped = jlora.wrap(lambda params, x: jnp.sin(0.01 * x @ params["up"]["kernel"]))
    params = jlora.add_lora({"up": {"kernel": q}}, jlora.LoraConfig(rank=2, targets=["up"]), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    adapter = jax.tree.map(lambda a: a + 0.01, adapter)
    params = jlora.combine(adapter, base)
    merged = jlora.merge(params)["up"]["kernel"]
    factors = params["up"]["kernel"]
    np.testing.assert_allclose(
        merged,
        np.asarray(jlora.dequantize(q)) + factors.scaling * np.asarray(factors.lora_A @ factors.lora_B),
        atol=1e-5 * float(jnp.abs(merged).max()),
    )
    np.testing.assert_allclose(wrapped(params, x), jnp.sin(0.01 * x @ merged), atol=1e-3)
    gradient = jax.grad(lambda a: jnp.sum(wrapped(jlora.combine(a, base), x)))(adapter)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    assert jlora.nbytes(jlora.remove_lora(params)) == q.nbytes and jlora.count(base) == q.size
    assert jlora.cast({"k": q}, jnp.bfloat16)["k"].scales.blocks.dtype == q.scales.blocks.dtype


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_step_of_a_kernel_holds_no_dense_one(name):
    """Nothing of the kernel's size is kept for the backward pass."""
    q = random_kernel(name, 512, 64)
    x = jnp.ones((2, 512))
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: jlora.linear(x, q), x)[1], x))
    assert all(leaf.size * leaf.dtype.itemsize < q.size for leaf in kept if leaf.dtype != jnp.uint8)
