"""GGUF files as models: what is written is read again, and what others write is read as they mean it."""

import dataclasses
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf_files import ARRAY, BOOL, F32, IDS, ROWS, STRING, U32, VARIANTS, RawFile, loader, value
from oracles import torch_logits

import jlora
from jlora.files.hf import PackedTwice
from jlora.files.opened import open_checkpoint
from jlora.models import family_of, model_from_config
from jlora.models import gguf as layouts
from jlora.models.rope import LinearScaling, Llama3Scaling
from jlora.storage.gguf import TYPES
from jlora.tree.paths import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer(tiny.CHATML)


MORE = VARIANTS | {
    "llama-tied-unscaled": (
        "llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3-untied-capped": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16, "tie_word_embeddings": False, "final_logit_softcapping": 30.0,
            "layer_types": ["full_attention", *3 * ["sliding_attention"]], "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loader(tmp_path_factory, MORE)


def logits(model, params):
    return np.asarray(model.apply({"params": params}, IDS))


@pytest.mark.few(2)
@pytest.mark.parametrize("stack", [False, True], ids=["per-layer", "stacked"])
@pytest.mark.parametrize("variant", MORE)
def test_a_written_file_is_the_model_again(variant, stack, loaded, tok, tmp_path):
    theirs, model, params = loaded(variant)
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok, dtype="f32")
    again, read = jlora.load(tmp_path / "model.gguf", dtype="float32", stack=stack)
    if not family_of(model.config).gguf.scale_offset:  # 1 + scale is what is stored, and what the graph computes with
        expected = jlora.stack_layers(params) if stack else params
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, read))
    if not stack:
        np.testing.assert_array_equal(logits(again, read), logits(model, params))
    else:
        np.testing.assert_allclose(logits(again, read), logits(model, params), atol=1e-4)
    np.testing.assert_allclose(logits(again, read), torch_logits(theirs, IDS), atol=1e-4)
    ids = {"bos_token_id": 0, "eos_token_id": (0, 2, 1), "model_type": again.config.model_type}
    assert dataclasses.replace(model.config, **ids) == again.config


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_written_type_is_read(variant, dtype, loaded, tok, tmp_path):
    """To the bit, as the package gguf decodes it."""
    _, model, params = loaded(variant)
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok, dtype=dtype)
    again, read = jlora.load(tmp_path / "model.gguf", dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    theirs = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    layout = family_of(model.config).gguf
    for path, leaf in flatten(read).items():
        stored = theirs[checkpoint.paths[path]]
        leaf = np.asarray(leaf)
        leaf = leaf.T if path.endswith("/kernel") else leaf + np.float32(layout.scale_offset * path.endswith("/scale"))
        if layout.rotates_pairs and ("q_proj" in path or "k_proj" in path):
            stored, leaf = np.sort(stored, axis=0), np.sort(leaf, axis=0)  # their order is tested by the logits
        np.testing.assert_array_equal(leaf, stored, err_msg=path)
    dense = logits(model, params)
    assert 0 < np.abs(logits(again, read) - dense).max() < 0.1 * np.abs(dense).max()


def test_the_table_of_types_is_the_packages():
    assert {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == TYPES


WIDE = tiny.LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def wide(tok, tmp_path_factory):
    """A file with rows of 256, which every type of block divides."""
    model = model_from_config(WIDE | {"vocab_size": ROWS}, dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("wide") / "model.gguf"
    jlora.save_gguf(path, model, params, tokenizer=tok, dtype="f32")
    return path


BLOCKS = [kind for kind, row in TYPES.items() if row.block > 1 and row.name not in ("Q8_1", "Q8_K", "Q1_0")]


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", BLOCKS, ids=[TYPES[kind].name for kind in BLOCKS])
def test_every_type_of_block_is_decoded_as_by_gguf(kind, wide, tmp_path):
    raw, draw = RawFile.read(wide), np.random.default_rng(0)
    for name, (dims, _, _) in raw.tensors.items():
        if len(dims) == 2:
            blocks = draw.integers(0, 256, (math.prod(dims) // TYPES[kind].block, TYPES[kind].size), np.uint8)
            # Any bytes are a block, but for scales that are NaN or infinite: f16 ones have the bits of a large exponent cleared.
            blocks[:, :] = np.where(np.arange(blocks.shape[1]) % 2, blocks & 0xBF, blocks)
            raw.tensors[name] = dims, kind, blocks.tobytes()
    path = raw.write(tmp_path / "model.gguf")
    with np.errstate(all="ignore"):
        theirs = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    checkpoint = open_checkpoint(path)
    assert checkpoint.packed == [TYPES[kind].name]
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"):
        np.testing.assert_array_equal(checkpoint.read(name), theirs[name])


def test_blocks_are_decoded_some_rows_at_a_time(wide, tmp_path, monkeypatch):
    """The package's decoders make several copies of what they are given."""
    raw, kind = RawFile.read(wide), 8
    dims, _, data = raw.tensors["token_embd.weight"]
    blocks = gguf.quants.quantize(np.frombuffer(data, np.float32).reshape(dims[::-1]), gguf.GGMLQuantizationType.Q8_0)
    raw.tensors["token_embd.weight"] = dims, kind, blocks.tobytes()
    path, seen, decode = raw.write(tmp_path / "model.gguf"), [], gguf.quants.dequantize
    monkeypatch.setattr("jlora.files.gguf_read._DECODED", 5000)
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: seen.append(len(data)) or decode(data, kind))
    read = open_checkpoint(path).read("token_embd.weight")
    assert max(seen) == 5000 // 256 and sum(seen) == ROWS + 1  # and once, whether it is decoded at all
    np.testing.assert_array_equal(read, decode(blocks, gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_factors_that_are_all_the_same(factor, files, tmp_path):
    raw = RawFile.read(files("llama-tied-unscaled"))
    raw.tensors["rope_freqs.weight"] = [8], 0, np.full(8, factor, np.float32).tobytes()
    config = jlora.load(raw.write(tmp_path / "m.gguf"))[0].config
    assert config.rope_scaling == (None if factor == 1 else LinearScaling(4.0))
    raw = RawFile.read(files("qwen2"))
    raw.tensors["rope_freqs.weight"] = [6], 0, np.full(6, factor, np.float32).tobytes()
    with pytest.raises(ValueError, match="unexpected: rope_freqs.weight"):  # llama.cpp has none in this architecture
        jlora.load(raw.write(tmp_path / "m.gguf"))


def test_types_that_gguf_does_not_decode_are_refused(wide, tmp_path):
    raw = RawFile.read(wide)
    dims, _, _ = raw.tensors["blk.0.ffn_up.weight"]
    raw.tensors["blk.0.ffn_up.weight"] = dims, 15, bytes(math.prod(dims) // 256 * 292)
    with pytest.raises(ValueError, match="dtype: blk.0.ffn_up.weight is Q8_K, should be F64 or F32 or F16 or BF16"):
        jlora.load(raw.write(tmp_path / "model.gguf"))


@pytest.mark.slow
def test_packing_a_packed_file_is_said(loaded, tok, tmp_path):
    _, model, params = loaded("llama")
    jlora.save_gguf(tmp_path / "f16.gguf", model, params, tokenizer=tok, dtype="f16")
    _, packed = jlora.load(tmp_path / "f16.gguf", quantize=jlora.NF4())
    assert jlora.nbytes(packed) < 0.8 * jlora.nbytes(jlora.load(tmp_path / "f16.gguf")[1])
    jlora.save_gguf(tmp_path / "q8.gguf", *wide_model(tok), tokenizer=tok, dtype="q8_0")
    with pytest.warns(PackedTwice, match=r"is quantized already \(Q8_0\); packing what it decodes to as NF4") as said:
        _, packed = jlora.load(tmp_path / "q8.gguf", quantize=jlora.NF4())
    assert len(said) == 1
    dense = jlora.load(tmp_path / "q8.gguf")[1]
    kernel = ("model", "layers", "0", "mlp", "up_proj", "kernel")
    for key in kernel:
        packed, dense = packed[key], dense[key]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), packed, jlora.quantize(dense, jlora.NF4())))


def wide_model(tok):
    model = model_from_config(WIDE | {"vocab_size": ROWS}, dtype=jnp.float32)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


# Metadata


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (500000.0, 64, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        (500000.0, 128, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        (500000.0, 16, Llama3Scaling(32.0, 1.0, 4.0, 32)),
        (10000.0, 64, Llama3Scaling(4.0, 1.0, 4.0, 3000)),
        (1000000.0, 32, Llama3Scaling(16.0, 1.0, 4.0, 4096)),
        (500.0, 4, Llama3Scaling(16.0, 1.0, 4.0, 16)),
    ],
)
def test_the_scaling_is_found_by_its_factors(theta, head_dim, scaling):
    factors = layouts._factors(head_dim, theta, scaling)
    assert layouts.scaling_of(factors, head_dim, theta, where="f") == scaling


def test_any_scaling_of_the_kind_is_found_by_its_factors():
    """Three of its numbers are known but for a common factor: it is the factors that must be the same."""
    scaling = Llama3Scaling(12.0, 1.5, 7.0, 5000)
    factors = layouts._factors(64, 30000.0, scaling)
    found = layouts.scaling_of(factors, 64, 30000.0, where="f")
    np.testing.assert_allclose(layouts._factors(64, 30000.0, found), factors, rtol=1e-5)
    assert layouts.scaling_of(np.ones(8, np.float32), 16, 1e4, where="f") is None
    assert layouts.scaling_of(np.full(8, 4, np.float32), 16, 1e4, where="f") == LinearScaling(4.0)
    with pytest.raises(ValueError, match="no rotation of the type 'llama3' gives"):
        layouts.scaling_of(np.linspace(1, 3, 8, dtype=np.float32), 16, 1e4, where="f")


def changed(path, target, **fields):
    raw = RawFile.read(path)
    for key, new in fields.items():
        if new is None:
            del raw.fields[key]
        else:
            raw.fields[key] = new
    return raw.write(target)


@pytest.fixture(scope="module")
def files(loaded, tok, tmp_path_factory):
    """variant -> its file."""
    directory = tmp_path_factory.mktemp("files")

    def get(variant):
        path = directory / f"{variant}.gguf"
        if not path.exists():
            _, model, params = loaded(variant)
            jlora.save_gguf(path, model, params, tokenizer=tok, dtype="f32")
        return path

    return get


def test_what_llama_cpp_takes_for_absent_fields(loaded, files, tmp_path):
    """Others write fewer: no length of the heads, no vocabulary size, a list for the heads of keys."""
    _, model, params = loaded("qwen2")
    fields = {
        f"qwen2.{key}": None
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
    }
    fields |= {"qwen2.attention.head_count_kv": value(ARRAY, (U32, [2, 2])), "qwen2.expert_count": value(U32, 0)}
    again, read = jlora.load(changed(files("qwen2"), tmp_path / "m.gguf", **fields), dtype="float32")
    np.testing.assert_array_equal(logits(again, read), logits(model, params))
    # Gemma's windows by a period.
    _, model, params = loaded("gemma3")
    for pattern in (value(U32, 2), value(ARRAY, (BOOL, [True, False, True, False]))):
        path = changed(files("gemma3"), tmp_path / "g.gguf", **{"gemma3.attention.sliding_window_pattern": pattern})
        assert jlora.load(path)[0].config.layer_types == model.config.layer_types
    path = changed(files("gemma3"), tmp_path / "g.gguf", **{"gemma3.attention.sliding_window_pattern": None})
    assert jlora.load(path)[0].config.layer_types == ("sliding_attention",), "every sixth, and there are four"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"general.architecture": value(STRING, "mamba")}, "`general.architecture` 'mamba'; jlora runs gemma3, smollm3"),
        ({"general.type": value(STRING, "adapter")}, "holds no model: its `general.type` is 'adapter'. Load its base model"),
        ({"llama.block_count": None}, "`llama.block_count` is missing; it must be an integer from 1"),
        ({"llama.block_count": value(F32, 2.0)}, "`llama.block_count` must be an integer from 1 to 16777216; got 2.0"),
        ({"llama.block_count": value(U32, 1000)}, "says that it has 1000 layers, and holds 22 tensors"),
        ({"llama.block_count": value(U32, 3)}, r"missing: blk.2.attn_norm.weight \(48,\)"),
        ({"llama.expert_count": value(U32, 8)}, "`llama.expert_count` = 8; jlora's llama does not compute that"),
        ({"llama.something": value(ARRAY, (U32, [1, 2]))}, r"`llama.something` = \[1, 2\]; jlora's llama does not"),
        ({"llama.attention.sliding_window": value(U32, 16)}, "`llama.attention.sliding_window` = 16; jlora's"),
        ({"llama.rope.scaling.type": value(STRING, "yarn")}, "`llama.rope.scaling.type` must be 'none' or 'linear'; got 'yarn'"),
        ({"llama.attention.value_length": value(U32, 8)}, "_length` = 8 and `llama.attention.key_length` = 16"),
        ({"llama.attention.head_count_kv": value(U32, 3)}, "`num_key_value_heads` by its metadata must divide"),
        ({"llama.attention.head_count_kv": value(ARRAY, (U32, [1, 2]))}, r"must be an integer from 1 to 16777216; got \[1, 2\]"),
        ({"llama.feed_forward_length": value(U32, 65)}, r"shape: blk.0.ffn_gate.weight is \(64, 48\), should be \(65, 48\)"),
        ({"llama.attention.layer_norm_rms_epsilon": value(F32, float("nan"))}, "must be a positive number"),
        ({"llama.rope.freq_base": value(F32, 0.0)}, "`llama.rope.freq_base` must be a positive number"),
        ({"llama.rope.scaling.type": value(STRING, "linear")}, "scales its rotation twice"),
    ],
)  # fmt: skip
def test_metadata_that_are_refused(fields, says, files, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        jlora.load(changed(files("llama"), tmp_path / "m.gguf", **fields))
    assert "m.gguf" in str(error.value)


def test_files_that_are_not_there(tmp_path, files):
    with pytest.raises(FileNotFoundError, match="There is no file 'no.gguf'"):
        jlora.load("no.gguf")
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(FileNotFoundError, match="is not a directory and no GGUF file"):
        jlora.load(tmp_path / "a.txt")
    (tmp_path / "m.gguf").write_bytes(files("gpt2").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"There is no config.json in .*It holds m.gguf: pass one of them"):
        jlora.load(tmp_path)
    (tmp_path / "m.gguf").rename(tmp_path / "model")
    assert jlora.load(tmp_path / "model")[0].config.model_type == "gpt2", "by its first bytes"


def test_a_layout_says_what_its_keys_are(loaded):
    """`reads` and `keys` of each family name all that its writer gives, and no more than once."""
    for variant in MORE:
        _, model, _ = loaded(variant)
        layout = family_of(model.config).gguf
        assert set(layout.fields(model.config)) <= {*layout.keys, *layout.reads}
        assert not set(layout.keys) & set(layout.reads)
