"""Quantized formats beside NF4 against their definitions: int4 in groups of 128, and MXFP4."""

import typing

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import jlora
from jlora.cli import main
from jlora.files.run_settings import RunSettings
from jlora.quant import SPECS, FormatName
from jlora.quant.codes import E2M1_CODE, nearest_e2m1
from jlora.quant.scales import E8M0
from jlora.train.memory import abstract_tree
from jlora.tree.paths import flatten

NEW = ("int4-g128", "mxfp4")
MODELS = (*NEW, "q4_1", "q8_0", "q4_0", "q5_0", "q5_1")


def draw(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def nibbles(q):
    """Codes [out, in] of a tensor that keeps its rows."""
    codes = np.asarray(q.codes)
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(codes.shape[0], -1)


def test_one_list_of_formats():
    """What a flag may be is what there is."""
    assert typing.get_args(FormatName) == tuple(SPECS)
    assert all(spec.name == name for name, spec in SPECS.items())


# ---- MXFP4: OCP Microscaling Formats (MX) Specification, version 1.0 --------------------------------------------------


def test_e2m1_codes_are_the_specifications():
    """Table 5 (section 5.3.3): S EE M, bias 1; by hand, and as ml_dtypes has them."""
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(E2M1_CODE, np.array([*table, *(-x for x in table)], np.float32))
    assert np.signbit(E2M1_CODE[8])
    np.testing.assert_array_equal(E2M1_CODE, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(float))


def test_e2m1_rounds_ties_to_even():
    middles = (E2M1_CODE[1:8] + E2M1_CODE[:7]) / np.float32(2)
    x = np.concatenate([s * y for s in (1, -1) for y in (np.linspace(0, 6, 4097, dtype=np.float32), middles)])
    around = np.concatenate([np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf)), x])
    around = around[np.abs(around) <= 6].astype(np.float32)
    expected = around.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(jax.jit(nearest_e2m1)(around), expected)
    assert nearest_e2m1(jnp.array([0.25, 0.75, 2.5, 5.0])).tolist() == [0, 2, 4, 6]


def test_e8m0_scales_are_powers_of_two():
    """Table 7 (section 5.4.1): all 256, 0 a subnormal number and 255 NaN."""
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    for decode in (E8M0.decode, jax.jit(E8M0.decode, static_argnums=1)):
        np.testing.assert_array_equal(decode(E8M0(jnp.asarray(codes)), 6.0), expected)
    np.testing.assert_array_equal(expected[1:255], 2.0 ** (np.arange(1, 255) - 127.0))


def reference_mxfp4(blocks):
    """Section 6.3 word for word, in float64: (exponents with their bias, elements) of [blocks, 32]."""
    largest = np.abs(blocks.astype(np.float64)).max(axis=-1)
    with np.errstate(divide="ignore"):
        shared = np.where(largest > 0, np.floor(np.log2(largest)), -np.inf) - 2  # emax of E2M1 is 2
    exponent = np.clip(shared, -127, 127)
    scaled = blocks / 2.0 ** exponent[:, None]
    elements = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (exponent + 127).astype(np.uint8), elements.view(np.uint8) & 15


WEIGHTS = {
    "random": draw(96, 128),
    "small": draw(64, 64, scale=1e-30),
    "large": draw(64, 64, scale=1e37),
    "powers of two": 2.0 ** np.arange(-64, 64, dtype=np.float32).reshape(2, 64) * np.float32(1.75),
    "zeros": np.zeros((2, 64), np.float32),
    "every tie": np.tile(np.concatenate([(E2M1_CODE[1:8] + E2M1_CODE[:7]) / 2, [6.0]]), (4, 8)).astype(np.float32),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_mxfp4_is_the_specification_and_its_readers(name):
    """Codes by the specification; values by transformers' reader of gpt-oss, gguf's, and bit for bit also under jit."""
    w = WEIGHTS[name]
    q = jlora.quantize(jnp.asarray(w).T, jlora.MXFP4())
    exponents, elements = reference_mxfp4(w.reshape(-1, 32))
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1), exponents)
    np.testing.assert_array_equal(nibbles(q).reshape(-1, 32), elements)
    ours = np.asarray(jlora.dequantize(q)).T
    np.testing.assert_array_equal(ours, np.asarray(jax.jit(jlora.dequantize)(q)).T)
    low_first = (elements[:, 0::2] | elements[:, 1::2] << 4).reshape(1, w.shape[0], -1, 16)
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(low_first), torch.from_numpy(exponents.reshape(1, w.shape[0], -1)), dtype=torch.float32
    )
    np.testing.assert_array_equal(ours, theirs[0].numpy().T)
    halves = elements[:, :16] | elements[:, 16:] << 4
    packed = np.concatenate([exponents[:, None], halves], axis=-1)
    read = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(ours.reshape(-1, 32), read)


def test_mxfp4_errors_are_within_the_bounds():
    """Within half a gap of a normal code, that is a sixth of it, but for what saturates: a quarter of the block's largest."""
    w = draw(256, 256)
    q = jlora.quantize(w, jlora.MXFP4())
    error = np.abs(np.asarray(jlora.dequantize(q)) - w).T.reshape(-1, 32)
    blocks = np.abs(w.T.reshape(-1, 32))
    scale = 2.0 ** (np.asarray(q.absmax, np.int32).reshape(-1, 1) - 127.0)
    saturated = blocks > 6 * scale
    assert saturated.any() and (blocks < 8 * scale).all()
    bound = np.where(saturated, blocks - 6 * scale, np.maximum(blocks / 5, 0.25 * scale))
    assert (error <= bound * (1 + 1e-6)).all()
    assert abs(error.mean() - 0.0855) < 1e-3


# ---- int4 in groups of 128 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_int4_groups_are_torchs(scale):
    """PyTorch's fake quantization of each group as a channel, with the scale that is stored."""
    w = draw(24, 384, scale=scale)
    w[0, :128] = 0
    q = jlora.quantize(jnp.asarray(w).T, jlora.Int4G128())
    groups = w.reshape(-1, 128)
    scales = torch.from_numpy(np.abs(groups).max(-1) / np.float32(7.5)).to(torch.bfloat16).float()
    np.testing.assert_array_equal(np.asarray(q.absmax, np.float32).reshape(-1), scales.numpy())
    theirs = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(groups), scales, torch.zeros(len(groups), dtype=torch.int32), 0, -8, 7
    )
    np.testing.assert_array_equal(np.asarray(jlora.dequantize(q)).T.reshape(-1, 128), theirs.numpy())
    codes = nibbles(q).view(ml_dtypes.int4).astype(np.int32)
    assert codes.min() == -8 and codes.max() == 7
    np.testing.assert_array_equal(codes.reshape(-1, 128) * scales.numpy()[:, None], theirs.numpy())


def test_int4_groups_are_within_half_a_step():
    w = draw(256, 256)
    q = jlora.quantize(w, jlora.Int4G128())
    step = np.asarray(q.absmax, np.float32).reshape(-1, 1)
    error = np.abs(np.asarray(jlora.dequantize(q)) - w).T.reshape(-1, 128)
    # The scale may be rounded down by 1/256 of it, which the largest of 7.5 steps is then beyond.
    assert (error <= step * (0.5 + 7.5 / 255)).all()
    narrow = jlora.dequantize(jlora.quantize(w, jlora.Int4(block_size=128)))
    assert error.mean() < np.abs(narrow - w).mean()


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_a_bad_block_decodes_to_nan(name):
    for bad in (jnp.nan, jnp.inf):
        q = jax.jit(lambda w: jlora.quantize(w, SPECS[name]()))(jnp.ones(256).at[3].set(bad))
        dense, size = np.asarray(jlora.dequantize(q)), q.block_size
        assert not np.isfinite(dense[3]) and np.isfinite(dense[size:]).all()


@pytest.mark.parametrize("name", NEW)
def test_they_shard_along_either_side(name):
    """`[out, in/2]` codes and `[out, groups]` scales where groups do not straddle rows."""
    q = jlora.quantize(draw(256, 64), SPECS[name]())
    assert q.codes.shape == (64, 128) and q.absmax.shape == (64, 256 // q.block_size)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    x = draw(3, 256)
    expected = x @ np.asarray(jlora.dequantize(q))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        placed = jax.device_put(q, NamedSharding(mesh, spec))
        np.testing.assert_allclose(jax.jit(jlora.linear)(x, placed), expected, atol=1e-4)
    flat = jlora.quantize(draw(40, 6), SPECS[name]())
    assert flat.codes.ndim == flat.absmax.ndim == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_them(name, llama_dir, tmp_path, capsys):
    """Loaded packed, stacked or not, predicted, adapted, merged, and refused by name where no file holds it."""
    spec = SPECS[name]()
    model, params = jlora.load(llama_dir, dtype=jnp.float32, quantize=spec)
    _, stacked = jlora.load(llama_dir, dtype=jnp.float32, quantize=spec, stack=True)
    for a, b in zip(jax.tree.leaves(jlora.stack_layers(params)), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(a, b)
    weights = [leaf for leaf in flatten(params).values() if isinstance(leaf, jlora.QuantizedTensor)]
    assert weights and all(weight.spec == spec for weight in weights)
    predicted = abstract_tree(model, None, dtype=jnp.float32, quantize=spec, stack=False)
    assert jlora.nbytes(predicted) == jlora.nbytes(params)
    ids = jnp.arange(12).reshape(1, 12)
    logits = model.apply({"params": params}, ids)
    np.testing.assert_allclose(model.apply({"params": stacked}, ids), logits, atol=1e-4)
    np.testing.assert_allclose(model.apply({"params": jlora.merge(params)}, ids), logits, atol=1e-4)
    config = jlora.LoraConfig(rank=2)
    adapted = jlora.add_lora(params, config, key=jax.random.key(0))
    jlora.save_adapter(tmp_path / "adapter", adapted, config=config, base_model="base")
    jlora.save_pretrained(tmp_path / "merged", model, adapted)
    _, back = jlora.load(tmp_path / "merged", dtype=jnp.float32)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(jlora.merge(params)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=rf"writes dense weights and nf4 .*is a {name} QuantizedTensor"):
        jlora.save_quantized(tmp_path / "packed", model, params)
    with pytest.raises(SystemExit):
        main(["quantize", "--model", str(llama_dir), "--output", str(tmp_path / "packed"), "--format", name])
    assert f"not '{name}'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "packed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_commands_take_them(name, llama_dir, text_file, tmp_path, capsys):
    main(["memory", "--model", str(llama_dir), "--quantize", name, "--max-length", "16", "--json"])
    assert '"weights"' in capsys.readouterr().out
    flags = ["--model", str(llama_dir), "--data", text_file, "--output", str(tmp_path / "run"), "--quantize", name]
    main(["finetune", *flags, "--steps", "2", "--max-length", "16", "--batch-size", "2", "--rank", "2"])
    assert RunSettings.read(tmp_path / "run" / "adapter").quantize == name
    assert name in capsys.readouterr().out
    prompt = ["--prompts", "a", "--max-new-tokens", "2", "--temperature", "0"]
    main(["generate", "--adapter", str(tmp_path / "run" / "adapter"), "--model", str(llama_dir), *prompt])
    assert f"quantize {name}" in capsys.readouterr().err
