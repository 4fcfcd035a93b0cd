"""GGUF files whose own blocks stay packed as the frozen base: `quantize="keep"`."""

import contextlib
import itertools
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf_files import RawFile, smollm2

import jlora
from jlora.files.gguf_packed import KeptDense, kept_specs, stacks_as_packed
from jlora.files.opened import open_checkpoint
from jlora.files.run_settings import RunSettings
from jlora.models import model_from_config
from jlora.quant import GGML_TYPES, SPECS, to_file
from jlora.train.memory import abstract_tree
from jlora.tree.paths import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {
    "llama": tiny.LLAMA | {"hidden_size": 256, "intermediate_size": 512},
    "gpt2": tiny.GPT2 | {"n_embd": 256, "n_inner": 512},
}
IDS = np.array([[5, 30, 17, 25, 9, 44, 12, 8, 61, 7, 35, 2]])


@pytest.fixture(scope="module")
def dense_files(tmp_path_factory):
    """Family -> its file in f32, with rows that every type of block divides."""
    tokenizer, made = tiny.tokenizer(tiny.CHATML), {}
    for family, fields in SIZES.items():
        model = model_from_config(fields | {"vocab_size": len(tokenizer)}, dtype=jnp.float32)
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        made[family] = tmp_path_factory.mktemp(family) / "model.gguf"
        jlora.save_gguf(made[family], model, params, tokenizer=tokenizer, dtype="f32")
    return made


def blocks(rows, kind):
    """Blocks of a type: of these values where the package makes it, otherwise drawn, with values of about that size."""
    if kind in ("F32", "F16") or GGML_TYPES[kind].name in SPECS:
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]).tobytes()
    spec, draw = GGML_TYPES[kind](), np.random.default_rng(rows.size)
    made = draw.integers(0, 256, (rows.size // spec.block_size, spec.file_bytes), np.uint8)
    start = 0
    for _, dtype, count in spec.fields:
        if dtype is np.float16:
            made[:, start : start + 2] = draw.normal(0, 1e-5, (len(made), 1)).astype(np.float16).view(np.uint8)
        start += np.dtype(dtype).itemsize * count
    return made.tobytes()


def packed_as(source, path, kind_of):
    """The file with its kernels in the types that `kind_of` names for their tensors; None: as they are."""
    raw = RawFile.read(source)
    for name, (dims, _, data) in raw.tensors.items():
        kind = kind_of(name) if name.startswith("blk") and len(dims) == 2 else None
        if kind is not None:
            rows = np.frombuffer(data, np.float32).reshape(dims[::-1])
            raw.tensors[name] = dims, int(gguf.GGMLQuantizationType[kind]), blocks(rows, kind)
    return raw.write(path)


def packed_leaves(params):
    return {path: leaf for path, leaf in flatten(params).items() if isinstance(leaf, jlora.QuantizedTensor)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [*itertools.product(["llama"], GGML_TYPES), ("gpt2", "Q8_0"), ("gpt2", "Q5_K")]
)
def test_a_kept_file_is_the_decoded_one(family, kind, dense_files, tmp_path):
    """To the bit, its bytes its own, stacked or not; embeddings, norms and the head are dense."""
    path = packed_as(dense_files[family], tmp_path / "model.gguf", lambda name: kind)
    model, decoded = jlora.load(path, dtype="float32")
    _, kept = jlora.load(path, dtype="float32", quantize="keep")
    leaves, plain = packed_leaves(kept), flatten(decoded)
    layers = [leaf for leaf in plain if leaf.endswith("/kernel") and "lm_head" not in leaf]
    assert sorted(leaves) == sorted(layers) and all(q.spec == GGML_TYPES[kind]() for q in leaves.values())
    for leaf, value in flatten(kept).items():
        np.testing.assert_array_equal(jlora.dequantize(value) if leaf in leaves else value, plain[leaf])
    checkpoint = open_checkpoint(path)
    stored = {leaf: checkpoint.file.tensors[checkpoint.paths[leaf]] for leaf in leaves}
    assert sum(q.nbytes for q in leaves.values()) == sum(tensor.nbytes for tensor in stored.values())
    for leaf, q in leaves.items():
        rows = checkpoint.file.read(checkpoint.paths[leaf])
        there = (
            rows if not leaf.endswith(("q_proj/kernel", "k_proj/kernel")) else checkpoint.blocks(checkpoint.paths[leaf])
        )
        np.testing.assert_array_equal(to_file(q), there)
        np.testing.assert_array_equal(np.sort(there, axis=0), np.sort(rows, axis=0))
    expected = model.apply({"params": decoded}, IDS)
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(model.apply({"params": kept}, IDS), expected, atol=1e-5 * largest)
    _, stacked = jlora.load(path, dtype="float32", quantize="keep", stack=True)
    jax.tree.map(np.testing.assert_array_equal, jlora.stack_layers(kept), stacked)
    np.testing.assert_allclose(model.apply({"params": stacked}, IDS), expected, atol=1e-5 * largest)
    for stack, params in ((False, kept), (True, stacked)):
        specs = kept_specs(checkpoint, model, stack=stack, where=path)
        predicted = abstract_tree(model, None, dtype=jnp.float32, quantize=specs, stack=stack)
        assert jax.tree.structure(predicted) == jax.tree.structure(params)
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(str(a)), predicted, params)


@pytest.mark.slow
def test_layers_in_several_formats(dense_files, tmp_path, fails, call):
    """As llama.cpp's Q4_K_M has them: every second one stays in more bits. They load, and do not stack."""
    path = packed_as(
        dense_files["llama"],
        tmp_path / "model.gguf",
        lambda name: "Q6_K" if name == "blk.1.ffn_down.weight" else "Q4_K",
    )
    assert not stacks_as_packed(path)
    model, kept = jlora.load(path, dtype="float32", quantize="keep")
    assert {leaf: q.spec.name for leaf, q in packed_leaves(kept).items() if "down_proj" in leaf} == {
        "model/layers/0/mlp/down_proj/kernel": "q4_k",
        "model/layers/1/mlp/down_proj/kernel": "q6_k",
    }
    expected = model.apply({"params": jlora.load(path, dtype="float32")[1]}, IDS)
    np.testing.assert_allclose(model.apply({"params": kept}, IDS), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    with pytest.raises(
        ValueError, match=r"cannot be stacked as they are packed: 'model/layers/mlp/down_proj/kernel'.*per-layer"
    ):
        jlora.load(path, quantize="keep", stack=True)
    memory = ["memory", "--model", str(path), "--quantize", "keep", "--max-length", "16", "--dtype", "float32"]
    assert "cannot be stacked" in fails(*memory)
    assert json.loads(call(*memory, "--form", "per-layer", "--json").out)["weights"] == jlora.nbytes(kept)


@pytest.mark.slow
def test_types_without_a_packed_form_are_decoded_and_said(dense_files, tmp_path):
    raw = RawFile.read(packed_as(dense_files["llama"], tmp_path / "model.gguf", lambda name: "Q4_1"))
    dims, _, _ = raw.tensors["blk.0.ffn_up.weight"]
    raw.tensors["blk.0.ffn_up.weight"] = dims, 11, bytes(dims[0] * dims[1] // 256 * 110)  # Q3_K
    path = raw.write(tmp_path / "mixed.gguf")
    with pytest.warns(KeptDense, match=r"1 of the 14 linear kernels of .* are decoded, not kept: they are Q3_K"):
        _, kept = jlora.load(path, quantize="keep")
    assert len(packed_leaves(kept)) == 13


@pytest.mark.slow
def test_refusals(dense_files, llama_dir, text_file, tmp_path, fails):
    cases = {
        "leaves the blocks of a GGUF file as they are, and .* is none": llama_dir,
        "those of .* are F32; packed forms there are of Q8_0, Q4_0": dense_files["llama"],
    }
    for words, name in cases.items():
        with pytest.raises(ValueError, match=words):
            jlora.load(name, quantize="keep")
    with warnings.catch_warnings():  # not by the checker of annotations: by the function
        load = getattr(jlora.load, "__wrapped__", jlora.load)
        with pytest.raises(Exception, match="nf4"):
            load(llama_dir, quantize="nf4")
    for command in (
        ["generate", "--prompts", "a"],
        ["finetune", "--data", text_file, "--output", tmp_path / "run"],
        ["finetune", "--data", text_file, "--output", tmp_path / "run", "--form", "per-layer"],
    ):
        assert "leaves the blocks of a GGUF file as they are" in fails(
            *command, "--model", llama_dir, "--quantize", "keep"
        )


@pytest.mark.slow
def test_a_run_on_a_kept_file(dense_files, text_file, call, tmp_path):
    """Trained, and taken as it was trained by every command; merged into dense weights."""
    path = packed_as(dense_files["llama"], tmp_path / "model.gguf", lambda name: "Q4_1")
    flags = [
        "--data",
        text_file,
        "--output",
        str(tmp_path / "run"),
        "--max-length",
        "16",
        "--batch-size",
        "2",
        "--rank",
        "2",
    ]
    finetune = ["finetune", "--model", str(path), *flags, "--quantize", "keep", "--learning-rate", "1e-2", "--steps"]
    said = call(*finetune, "4", "--checkpoint-every", "2")
    assert "q4_1 (5.00 bits a parameter) and float32" in " ".join(said.out.split())
    adapter = tmp_path / "run" / "adapter"
    assert RunSettings.read(adapter).quantize == "keep"
    model, kept = jlora.load(path, dtype="float32", quantize="keep")
    _, decoded = jlora.load(path, dtype="float32")
    on_kept, on_decoded = (jlora.load_adapter(adapter, params) for params in (kept, decoded))
    for a, b in zip(jax.tree.leaves(jlora.merge(on_kept)), jax.tree.leaves(jlora.merge(on_decoded)), strict=True):
        np.testing.assert_array_equal(a, b)
    prompt = ["--adapter", str(adapter), "--prompts", "The keeper", "--max-new-tokens", "4", "--temperature", "0"]
    assert "quantize keep" in call("generate", *prompt).err
    assert "perplexity" in call("evaluate", "--adapter", str(adapter)).out
    assert call("compare", *prompt[:-2]).out
    call("merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    _, merged = jlora.load(tmp_path / "merged", dtype="float32")
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(jlora.merge(on_kept)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)  # in the file's own dtype
    call("export", "--to", "gguf-adapter", "--adapter", str(adapter), "--output", str(tmp_path / "a.gguf"))
    assert gguf.GGUFReader(tmp_path / "a.gguf").tensors


# ---- the real model: SmolLM2-135M-Instruct in Q4_1 ---------------------------------------------------------------------

STYLE = Path(__file__).parents[1] / "examples" / "assets" / "style.txt"
PROMPT = "<|im_start|>user\nTell me about the lighthouse keeper.<|im_end|>\n<|im_start|>assistant\n"
NEW_TOKENS = 32


class Real(NamedTuple):
    model: Any
    decoded: Any
    kept: Any
    adapted: Any
    """`kept` with an adapter that was trained on it."""
    config: jlora.LoraConfig
    tokenizer: Any

    def loss(self, params):
        """On 512 tokens of the style text that the adapter was not trained on."""
        ids = np.array(self.tokenizer(STYLE.read_text()[-4000:])["input_ids"][:512]).reshape(4, 128)
        total, count = jax.jit(jlora.train.causal_lm_loss(self.model))(params, {"input_ids": ids, "labels": ids}, None)
        return float(total) / float(count)

    def logits(self, params, ids):
        return np.asarray(self.model.apply({"params": params}, np.array([ids])))[0]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2")
    (directory / "style.txt").write_text(STYLE.read_text()[:-4000])
    result = jlora.finetune(
        jlora.FinetuneConfig(
            model=str(smollm2()), data=str(directory / "style.txt"), output=str(directory / "run"), quantize="keep", steps=8,
            batch_size=2, max_length=64, eval_fraction=0.0, checkpoint_every=8, rank=8, dtype="float32", learning_rate=2e-3,
            quiet=True,
        )
    )  # fmt: skip
    model, kept = jlora.load(smollm2(), dtype="float32", quantize="keep")
    return Real(
        model,
        jlora.load(smollm2(), dtype="float32")[1],
        kept,
        jlora.load_adapter(result.adapter_dir, kept),
        jlora.LoraConfig.load(result.adapter_dir),
        jlora.load_tokenizer(smollm2()),
    )


@pytest.mark.slow
def test_the_real_model_kept_is_the_decoded_one(real):
    leaves = packed_leaves(real.kept)
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2()).tensors}
    there = sum(int(tensor.n_bytes) for name, tensor in file.items() if name.startswith("blk") and "norm" not in name)
    assert len(leaves) == 210 and sum(q.nbytes for q in leaves.values()) == there
    assert abs(real.loss(real.kept) - real.loss(real.decoded)) <= 1e-5


@pytest.mark.slow
def test_what_llama_cpp_serves_is_what_was_trained(real, tmp_path):
    """The file with the adapter beside it. llama.cpp rounds activations to 8 bits before each product with packed weights, which
    makes 2e-3 nats of its own, with or without an adapter; of the same weights in float32 it gives our distributions."""
    adapter, dense = str(tmp_path / "adapter.gguf"), tmp_path / "f32.gguf"
    jlora.save_gguf_adapter(adapter, real.adapted, config=real.config, model=real.model)
    jlora.save_gguf(dense, real.model, real.decoded, tokenizer=real.tokenizer, dtype="f32")
    prompt = real.tokenizer(PROMPT)["input_ids"]
    (row,) = jlora.generate(
        real.model, real.adapted, [prompt], max_new_tokens=NEW_TOKENS, temperature=0.0, eos_token_id=[]
    )
    ids = prompt + row
    ours, base = real.logits(real.adapted, ids), real.logits(real.kept, ids)
    assert divergence(ours, base) > 0.02  # the adapter does something
    served = of_llama_cpp(smollm2(), ids, lora_path=adapter)
    nats, of_base = divergence(served, ours), divergence(of_llama_cpp(smollm2(), ids), base)
    exact = divergence(of_llama_cpp(dense, ids, lora_path=adapter), ours)
    print(f"nats: {nats:.1e} of Q4_1 with the adapter, {of_base:.1e} without, {exact:.1e} in float32 with it")
    assert exact < 1e-6
    assert nats < 4e-3 and nats < 1.5 * of_base
    at = slice(len(prompt) - 1, -1)
    theirs = served[at].argmax(-1)
    # A near tie may fall the other way.
    behind = ours[at].max(-1) - ours[at][np.arange(NEW_TOKENS), theirs]
    assert (theirs == row).sum() >= NEW_TOKENS - 3 and behind.max() < 0.2


def of_llama_cpp(path, ids, **options):
    """Its logits [len(ids), vocab]."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_threads=1,
        n_threads_batch=1, verbose=False, **options,
    )  # fmt: skip
    with contextlib.closing(model):
        model.eval(ids)
        return np.array(model.scores[: len(ids)])


def divergence(logits, other):
    """Mean KL of next-token distributions, in nats."""
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (logits, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


@pytest.mark.slow
def test_merging_into_the_file_again_loses_most_of_the_adapter(real):
    """The other way to serve it: merged, and packed again in the type of the file."""
    merged = jlora.merge(real.adapted)
    again = jlora.quantize_params(merged, jlora.Q4_1())
    losses = {
        "base": real.loss(real.kept),
        "adapter beside": real.loss(real.adapted),
        "merged, float32": real.loss(merged),
        "merged, Q4_1 again": real.loss(again),
        "base, NF4": real.loss(jlora.quantize_params(real.decoded, jlora.NF4())),
    }
    print(", ".join(f"{name}: {loss:.3f}" for name, loss in losses.items()))
    gain = losses["base"] - losses["adapter beside"]
    assert gain > 0.05 and abs(losses["merged, float32"] - losses["adapter beside"]) < 1e-4
    assert losses["merged, Q4_1 again"] > losses["adapter beside"] + 0.3 * gain
    assert losses["base, NF4"] > losses["base"] + 0.05
