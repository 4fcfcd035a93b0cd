"""GGUF files, read back by transformers and by the gguf package; PyTorch state dicts, Modelfiles and `jlora export`."""

import dataclasses
import json
import re
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from gguf_files import ADAPTERS, IDS, NEEDS_CONFIG, ROWS, VARIANTS, loader, read, read_by_transformers
from oracles import LLAMA3_ROPE, torch_logits
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from trees import adapted

import jlora
from jlora.cli import main
from jlora.files import save_torch
from jlora.files.gguf import tensor_name
from jlora.files.ollama import ChatTemplate, modelfile
from jlora.files.vocabulary import Vocabulary, pre_tokenizer_name
from jlora.models import FAMILIES, abstract_params, family_of, model_from_config
from jlora.models.rope import Llama3Scaling
from jlora.storage.pre_tokenizers import PRE_TOKENIZERS
from jlora.tree.paths import flatten

pytestmark = pytest.mark.usefixtures("quick_compilation")

NOT_IN_TRANSFORMERS = ("smollm3",)  # whose GGUF files it does not read; tests/test_llama_cpp.py does


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer(tiny.CHATML)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loader(tmp_path_factory, VARIANTS)


# Models


@pytest.mark.few(2)
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in NOT_IN_TRANSFORMERS])
def test_float32_logits_are_ours(variant, loaded, tok, tmp_path):
    theirs, model, params = loaded(variant)
    path = tmp_path / "model.gguf"
    jlora.save_gguf(path, model, params, tokenizer=tok, dtype="f32")
    again = read_by_transformers(path, theirs.config if variant in NEEDS_CONFIG else None)
    ours = np.asarray(model.apply({"params": params}, IDS))
    np.testing.assert_allclose(torch_logits(again, IDS), ours, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bits"), [("f16", 11), ("bf16", 8)])
@pytest.mark.parametrize("variant", ["gpt2", "qwen2"])
def test_16_bit_weights_are_the_nearest(variant, dtype, bits, loaded, tok, tmp_path):
    """Half a unit in the last place of the significand, and logits that differ no more than such weights explain."""
    theirs, model, params = loaded(variant)
    jlora.save_gguf(tmp_path / "f32.gguf", model, params, tokenizer=tok, dtype="f32")
    jlora.save_gguf(tmp_path / "x.gguf", model, params, tokenizer=tok, dtype=dtype)
    exact, (fields, tensors, types) = read(tmp_path / "f32.gguf")[1], read(tmp_path / "x.gguf")
    for name, array in tensors.items():
        wide = array.ndim == 1 or name == "position_embd.weight"
        assert types[name] == ("F32" if wide else dtype.upper())
        error = np.abs(array - exact[name])
        assert (error <= (0 if wide else 2.0**-bits * np.abs(exact[name]) + 2.0**-25)).all(), name
    assert fields["general.file_type"] == {"f16": 1, "bf16": 32}[dtype]
    ours = np.asarray(model.apply({"params": params}, IDS))
    again = torch_logits(read_by_transformers(tmp_path / "x.gguf", theirs.config), IDS)
    assert np.abs(again - ours).max() < 2.0 ** (3 - bits) * np.abs(ours).max()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_q8_0_keeps_the_distributions_of_the_embedded_models(name, tmp_path):
    directory = f"examples/assets/{name}"
    tokenizer = jlora.load_tokenizer(directory)
    jlora.save_gguf(tmp_path / "model.gguf", *jlora.load(directory, dtype="float32"), tokenizer=tokenizer)
    original = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.array([tokenizer("The old baker walked to the river, because it was raining, and she said:")["input_ids"]])
    again = read_by_transformers(tmp_path / "model.gguf", original.config)
    p, q = (torch.log_softmax(torch.tensor(torch_logits(m, ids)).double(), -1) for m in (original, again))
    kl = (p.exp() * (p - q)).sum(-1)
    assert 0 < kl.mean() and kl.max() <= 1e-3
    assert set(read(tmp_path / "model.gguf")[2].values()) == {"Q8_0", "F32"}


def test_q8_0_blocks_are_those_of_the_gguf_package(loaded, tok, tmp_path):
    _, model, params = loaded("qwen2")
    jlora.save_gguf(tmp_path / "f32.gguf", model, params, tokenizer=tok, dtype="f32")
    jlora.save_gguf(tmp_path / "q8.gguf", model, params, tokenizer=tok, dtype="q8_0")
    dense = read(tmp_path / "f32.gguf")[1]
    types = {}
    for tensor in gguf.GGUFReader(tmp_path / "q8.gguf").tensors:
        types[tensor.name] = tensor.tensor_type.name
        expected = gguf.quants.quantize(dense[tensor.name], tensor.tensor_type)
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8), expected.view(np.uint8)), tensor.name
    # Rows of 48 do not divide into blocks of 32, rows of 64 do.
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.attn_q.bias"] == types["blk.1.attn_norm.weight"] == types["output_norm.weight"] == "F32"


def test_the_golden_block():
    """The 32 values and 34 bytes of ggml's quantize_row_q8_0_ref."""
    x = ((37 * np.arange(32) % 101 - 50) / 64).astype(np.float32)
    block = gguf.quants.quantize(x[None], gguf.GGMLQuantizationType.Q8_0)
    golden = "4d1e81df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc"
    assert block.tobytes().hex() == golden


def test_only_the_llama_architecture_permutes_queries_and_keys(loaded, tok, tmp_path):
    def order(rows, head_dim):
        """Neighbouring rows were half a head apart."""
        return [r - r % head_dim + r % head_dim // 2 + head_dim // 2 * (r % 2) for r in range(rows)]

    assert order(16, 8) == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    for variant, permuted in (("llama-biased", ("attn_q", "attn_k")), ("mistral", ("attn_q", "attn_k")), ("qwen2", ())):
        _, model, params = loaded(variant)
        jlora.save_gguf(tmp_path / f"{variant}.gguf", model, params, tokenizer=tok, dtype="f32")
        tensors = read(tmp_path / f"{variant}.gguf")[1]
        for name, module in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
            ours = {n: np.asarray(x) for n, x in params["model"]["layers"]["1"]["self_attn"][module].items()}
            n_rows = ours["kernel"].shape[1]
            rows = order(n_rows, model.config.head_dim) if name in permuted else list(range(n_rows))
            np.testing.assert_array_equal(tensors[f"blk.1.{name}.weight"], ours["kernel"].T[rows])
            if "bias" in ours:
                np.testing.assert_array_equal(tensors[f"blk.1.{name}.bias"], ours["bias"][rows])


ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
GATED = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
IN_A_LAYER = {
    "gpt2": ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    "llama": (*ATTENTION, *GATED),
    "qwen2": (*ATTENTION, *GATED),
    "mistral": (*ATTENTION, *GATED),
    "qwen3": (*ATTENTION, *HEAD_NORMS, *GATED),
    "smollm3": (*ATTENTION, *GATED),
    "gemma3_text": (*ATTENTION, *HEAD_NORMS, "post_attention_norm", *GATED, "post_ffw_norm"),
}
"""What llama.cpp's `src/models/` reads in each layer."""


def test_tensor_names_are_those_of_llama_cpp(loaded):
    assert {FAMILIES[m].gguf.architecture for m in ("llama", "mistral")} == {"llama"}
    for variant in VARIANTS:
        _, model, params = loaded(variant)
        modules = {p.rpartition("/")[0].replace("/", ".") for p in flatten(params)}
        names = sorted(tensor_name(module, model) for module in modules)
        outside = {"token_embd", "output_norm"} | ({"position_embd"} if "gpt2" in variant else set())
        outside |= set() if model.config.tie_word_embeddings else {"output"}
        kinds = IN_A_LAYER[model.config.model_type]
        assert names == sorted(outside | {f"blk.{i}.{kind}" for i in range(model.config.depth) for kind in kinds})
    with pytest.raises(ValueError, match="GGUF has no name for 'model.layers.0.mlp.router'"):
        tensor_name("model.layers.0.mlp.router", model)


def test_rope_scaling_becomes_a_tensor(tok, tmp_path):
    """Llama 3.2 1B: wavelengths beyond 8192 are slowed 32 times, short ones kept, and three lie between."""
    rope = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    fields = tiny.LLAMA | {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    fields |= {"vocab_size": ROWS, "rope_parameters": rope, "eos_token_id": [0, 2]}
    model = model_from_config(fields, dtype=jnp.float32)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(model))
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok, dtype="f16")
    written, tensors, types = read(tmp_path / "model.gguf")
    factors = tensors["rope_freqs.weight"]
    np.testing.assert_allclose(factors[:15], 1.0, rtol=1e-6)
    np.testing.assert_allclose(factors[15:18], [1.6513, 3.2923, 9.6667], rtol=1e-4)
    np.testing.assert_allclose(factors[18:], 32.0, rtol=1e-6)
    assert types["rope_freqs.weight"] == "F32" and factors.shape == (32,)
    assert not [key for key in written if "rope.scaling" in key]
    assert written["llama.rope.freq_base"] == 500000.0


def test_hyperparameters(loaded, tok, tmp_path):
    common = {
        "GGUF.version": 3, "general.type": "model", "general.name": "model", "general.file_type": 7,
        "general.quantization_version": 2,
    }  # fmt: skip
    expected = {
        "gpt2": {
            "block_count": 2, "context_length": 64, "embedding_length": 48, "feed_forward_length": 192,
            "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5, "vocab_size": ROWS,
        },
        "llama": {
            "block_count": 2, "context_length": 2048, "embedding_length": 48, "feed_forward_length": 64,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
            "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 16,
            "rope.freq_base": 500000.0, "vocab_size": ROWS,
        },
    }  # fmt: skip
    for variant, values in expected.items():
        _, model, params = loaded(variant)
        (tmp_path / variant).mkdir()
        jlora.save_gguf(tmp_path / variant / "model.gguf", model, params, tokenizer=tok)
        fields, tensors, _ = read(tmp_path / variant / "model.gguf")
        assert common | {"general.architecture": variant} == {k: fields[k] for k in [*common, "general.architecture"]}
        written = {k.removeprefix(f"{variant}."): v for k, v in fields.items() if k.startswith(f"{variant}.")}
        assert written == pytest.approx(values)
        assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)
        assert ("rope_freqs.weight" in tensors) == (variant == "llama")
    # Fused queries, keys and values, and every matrix as [out, in].
    shapes = {n: t.shape for n, t in read(tmp_path / "gpt2" / "model.gguf")[1].items()}
    assert shapes["blk.0.attn_qkv.weight"] == (144, 48) and shapes["blk.0.ffn_down.weight"] == (48, 192)
    assert shapes["position_embd.weight"] == (64, 48) and shapes["token_embd.weight"] == (ROWS, 48)


def test_what_gemmas_layers_differ_in_is_said(loaded, tok, tmp_path):
    _, model, params = loaded("gemma3")
    capped = dataclasses.replace(model, config=dataclasses.replace(model.config, final_logit_softcapping=30.0))
    jlora.save_gguf(tmp_path / "model.gguf", capped, params, tokenizer=tok, dtype="f32")
    fields, tensors, _ = read(tmp_path / "model.gguf")
    values = {
        "attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False, True, False],
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0, "context_length": 256,
        "attention.key_length": 16,
    }  # fmt: skip
    assert {name: fields[f"gemma3.{name}"] for name in values} == values
    for name in ("input_layernorm", "post_attention_layernorm"):
        stored = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}[name]
        scale = np.asarray(params["model"]["layers"]["2"][name]["scale"])
        np.testing.assert_array_equal(tensors[f"blk.2.{stored}.weight"], scale + 1, "llama.cpp multiplies by 1 + scale")


@pytest.mark.parametrize(
    ("variant", "changes", "says"),
    [
        ("gemma3", {"query_pre_attn_scalar": 24}, "`query_pre_attn_scalar` = 24"),
        ("smollm3", {"no_rope_layers": (1,)}, r"`no_rope_layers` = \[1, 1, 1, 1\]"),
        ("smollm3", {"mlp_bias": True}, "`mlp_bias` = True"),
        ("qwen3", {"o_bias": True, "qkv_bias": True}, "`o_bias` = True"),
        ("qwen2", {"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 32)}, "`rope_scaling` = Llama3Scaling"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(variant, changes, says, loaded, tok, tmp_path):
    _, model, params = loaded(variant)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
    params_of = jlora.add_lora(params, jlora.LoraConfig(rank=2), key=jax.random.key(0))
    with pytest.raises(ValueError, match=says):
        jlora.save_gguf(tmp_path / "model.gguf", other, params, tokenizer=tok)
    with pytest.raises(ValueError, match=says):
        jlora.save_gguf_adapter(tmp_path / "a.gguf", params_of, config=jlora.LoraConfig(rank=2), model=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_an_adapter_on_a_quantized_base_is_merged_in_float32(variant, loaded, tok, tmp_path):
    _, model, params = loaded(variant)
    names = ["c_fc"] if variant == "gpt2" else ["up_proj"]
    params = jlora.quantize_params(jlora.cast(params, "bfloat16"), jlora.NF4(), targets=names)
    params = adapted(params, jlora.LoraConfig(rank=4, targets=names))
    jlora.save_gguf(tmp_path / "layers.gguf", model, params, tokenizer=tok, dtype="f32")
    tensors = read(tmp_path / "layers.gguf")[1]
    layers = params["transformer"]["h"] if variant == "gpt2" else params["model"]["layers"]
    w = layers["1"]["mlp"][names[0]]["kernel"]
    exact = np.asarray(w.base.dense(jnp.float32)) + w.scaling * np.asarray(w.lora_A) @ np.asarray(w.lora_B)
    np.testing.assert_allclose(tensors["blk.1.ffn_up.weight"], exact.T, atol=1e-6)
    assert np.abs(np.asarray(jlora.merge(w), np.float32) - exact).max() > 1e-4, "bfloat16 would have rounded it"
    jlora.save_gguf(tmp_path / "stacked.gguf", model, jlora.stack_layers(params), tokenizer=tok, dtype="f32")
    stacked = read(tmp_path / "stacked.gguf")[1]
    assert stacked.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(stacked[name], tensors[name])


def test_a_tied_head_stays_what_it_is_beside_an_adapted_embedding(loaded, tok, tmp_path):
    theirs, model, params = loaded("gpt2")
    table = params["transformer"]["wte"]["embedding"]
    a, b = (0.1 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((ROWS, 2), (2, 48))))
    wte = {"embedding": jlora.LoraWeight(base=table, lora_A=a, lora_B=b, scaling=2.0)}
    params = params | {"transformer": params["transformer"] | {"wte": wte}}
    with pytest.raises(ValueError, match=re.escape("`model, params = jlora.untie(model, params)`")):
        jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok, dtype="f32")
    assert not list(tmp_path.iterdir())
    jlora.save_gguf(tmp_path / "model.gguf", *jlora.untie(model, params), tokenizer=tok, dtype="f32")
    tensors = read(tmp_path / "model.gguf")[1]
    np.testing.assert_array_equal(tensors["output.weight"], table)
    np.testing.assert_allclose(tensors["token_embd.weight"], table + 2.0 * a @ b, atol=1e-5)


# Vocabulary

TEXT = "<|im_start|>user\nWho keeps the lamp's  oil? 1234\n\n\tÜber 灯台<|im_end|>"


def test_tokens_types_and_merges(loaded, tmp_path):
    tokenizer = tiny.tokenizer(tiny.CHATML)
    tokenizer.add_tokens(["<tool call>"])  # plain: a user's token, not a mark
    tokenizer.pad_token = "<|im_end|>"
    _, model, params = loaded("llama")
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tokenizer)
    fields, _, _ = read(tmp_path / "model.gguf")
    tokens, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == ROWS
    n = len(tokenizer)
    assert n < ROWS
    kinds = {t: gguf.TokenType(kind).name for t, kind in zip(tokens, types, strict=True)}
    assert tokens[:n] == [tokenizer.convert_ids_to_tokens(i) for i in range(n)]
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, ROWS)]
    assert {kinds[t] for t in tokens[n:]} == {"UNUSED"}
    assert [t for t in tokens if kinds[t] == "CONTROL"] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [t for t in tokens if kinds[t] == "USER_DEFINED"] == ["<tool call>"]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges] != []
    assert {k: fields[f"tokenizer.ggml.{k}"] for k in ("model", "pre", "add_bos_token", "add_eos_token")} == {
        "model": "gpt2", "pre": "gpt-2", "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip
    assert {k: fields[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")} == {
        "bos": 0, "eos": 0, "padding": 2,
    }  # fmt: skip
    assert fields["tokenizer.chat_template"] == tiny.CHATML


def test_a_tokenizer_made_of_the_file_gives_the_same_tokens(loaded, tok, tmp_path):
    _, model, params = loaded("qwen2")
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok)
    fields, _, _ = read(tmp_path / "model.gguf")
    backend = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    control = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens([token for token, kind in control if kind == gguf.TokenType.CONTROL])
    assert backend.encode(TEXT).ids == tok(TEXT)["input_ids"]


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_transformers_reads_the_tokenizer_back(variant, loaded, tok, tmp_path):
    _, model, params = loaded(variant)
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again(TEXT)["input_ids"] == tok(TEXT)["input_ids"]
    assert (again.eos_token, again.chat_template) == (tiny.EOT, tiny.CHATML)


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split_by(expression):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTES])


@pytest.mark.parametrize(
    ("name", "pre", "ignore_merges"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        ("llama-bpe", split_by(WORDS), True),
        ("smaug-bpe", split_by(WORDS), False),
        ("qwen2", split_by(WORDS.replace("{1,3}", "")), False),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            False,
        ),
    ],
)
def test_the_pre_tokenizer_is_named_by_its_rules(name, pre, ignore_merges):
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre
    backend.normalizer = normalizers.NFC()
    assert pre_tokenizer_name(json.loads(backend.to_str())) == name
    assert name in PRE_TOKENIZERS.values()


def test_transformers_own_tokenizers_have_names():
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    for kind, name in ((transformers.GPT2Tokenizer, "gpt-2"), (transformers.Qwen2Tokenizer, "qwen2")):
        tokenizer = kind(vocab=vocab, merges=[("a", "b")])
        assert pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name


def with_backend(change):
    backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    change(backend)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tiny.EOT, eos_token=tiny.EOT)


def _set(**values):
    return lambda backend: [setattr(backend, name, value) for name, value in values.items()]


def _ends(single):
    return _set(post_processor=processors.TemplateProcessing(single=single, special_tokens=[(tiny.EOT, 0)]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre-tokenizer {'type': 'ByteLevel'"),
        (_set(pre_tokenizer=pre_tokenizers.Metaspace()), "'Metaspace'"),
        (_set(pre_tokenizer=split_by(r"\p{N}+")), "pre-tokenizer"),
        (_set(normalizer=normalizers.Lowercase()), "normalizer {'type': 'Lowercase'}"),
        (
            _set(model=models.BPE(vocab={tiny.EOT: 0, "a": 1}, merges=[], byte_fallback=True)),
            "a token for every byte",
        ),
        (_set(model=models.WordLevel({tiny.EOT: 0, "a": 1}, unk_token="a")), "model 'WordLevel'"),
        (lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)]), "'<x>' has `lstrip` set"),
        (lambda backend: backend.add_tokens([f"<{i}>" for i in range(200)]), f"the embedding has {ROWS} rows"),
        (_ends(f"{tiny.EOT} {tiny.EOT} $A"), "Change its `post_processor`"),
    ],
    ids=["prefix space", "metaspace", "regex", "normalizer", "bytes", "words", "lstrip", "too many", "ends"],
)
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(change, says, loaded, tmp_path):
    _, model, params = loaded("llama")
    with pytest.raises(ValueError, match=re.escape(says)):
        jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=with_backend(change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("single", "ends"),
    [("$A", (False, False)), (f"{tiny.EOT} $A", (True, False)), (f"{tiny.EOT} $A {tiny.EOT}", (True, True))],
)
def test_whether_a_text_begins_with_bos(single, ends, loaded):
    config = loaded("llama")[1].config
    vocabulary = Vocabulary.of(with_backend(_ends(single)), config)
    assert (vocabulary.add_bos, vocabulary.add_eos) == ends


def test_special_tokens_of_the_config_fill_in(loaded):
    config = loaded("llama")[1].config
    backend = tiny.tokenizer().backend_tokenizer
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = Vocabulary.of(bare, dataclasses.replace(config, bos_token_id=1, eos_token_id=(2, 0))).ids
    assert ids == {"bos": 1, "eos": 2, "eot": 0}
    with pytest.raises(ValueError, match="has an end-of-text token"):
        Vocabulary.of(bare, dataclasses.replace(config, eos_token_id=None))
    with pytest.raises(ValueError, match="must be a fast transformers tokenizer; got object"):
        Vocabulary.of(object(), config)


def test_named_chat_templates(loaded, tok, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": tiny.CHATML, "rag": "{{ documents }}"}
    _, model, params = loaded("llama")
    jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tokenizer)
    fields, _, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.chat_template"] == tiny.CHATML
    assert fields["tokenizer.chat_template.rag"] == "{{ documents }}"


# Adapters


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("variant", ["gpt2", "llama", "qwen2"])
def test_base_plus_adapter_is_the_merged_model(variant, kind, loaded, tok, tmp_path):
    """By llama.cpp's rule: each matrix gets `alpha / rows of lora_a * lora_b @ lora_a`."""
    _, model, params = loaded(variant)
    config = jlora.LoraConfig(**ADAPTERS[kind])
    params = adapted(params, config)
    jlora.save_gguf(tmp_path / "merged.gguf", model, params, tokenizer=tok, dtype="f32")
    jlora.save_gguf(tmp_path / "base.gguf", model, jlora.remove_lora(params), tokenizer=tok, dtype="f32")
    jlora.save_gguf_adapter(tmp_path / "adapter.gguf", params, config=config, model=model)
    base, merged = (read(tmp_path / f"{name}.gguf")[1] for name in ("base", "merged"))
    fields, factors, types = read(tmp_path / "adapter.gguf")
    wanted = {
        "general.architecture": family_of(model.config).gguf.architecture, "general.type": "adapter",
        "adapter.type": "lora", "adapter.lora.alpha": config.alpha,
    }  # fmt: skip
    assert {key: fields[key] for key in wanted} == wanted
    assert set(types.values()) == {"F32"}
    moved = set()
    for name, array in base.items():
        update = 0.0
        if f"{name}.lora_a" in factors:
            a, b = factors.pop(f"{name}.lora_a"), factors.pop(f"{name}.lora_b")
            update = fields["adapter.lora.alpha"] / b.shape[1] * b @ a
            moved.add(name.removeprefix("blk.").split(".", 1)[-1])
        np.testing.assert_allclose(array + update, merged[name], atol=2e-6)
    assert not factors
    names = "attn_qkv attn_output ffn_up ffn_down"
    if variant != "gpt2":
        names = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
    assert moved == {f"{name}.weight" for name in names.split()}


def test_pissa_is_an_update_of_the_original_base(loaded, tok, tmp_path):
    """Twice the rank: what was trained, less what was taken out of the base."""
    _, model, params = loaded("llama")
    config = jlora.LoraConfig(rank=2, init="pissa", targets=["q_proj", "up_proj"])
    params = adapted(params, config)
    jlora.save_gguf(tmp_path / "merged.gguf", model, params, tokenizer=tok, dtype="f32")
    jlora.save_gguf(tmp_path / "base.gguf", model, jlora.remove_lora(params), tokenizer=tok, dtype="f32")
    jlora.save_gguf_adapter(tmp_path / "adapter.gguf", params, config=config, model=model)
    base, merged = (read(tmp_path / f"{name}.gguf")[1] for name in ("base", "merged"))
    fields, factors, _ = read(tmp_path / "adapter.gguf")
    for name in {key.rpartition(".lora_")[0] for key in factors}:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert b.shape[1] == 4
        update = fields["adapter.lora.alpha"] / b.shape[1] * b @ a
        assert np.abs(update).max() > 1e-3
        np.testing.assert_allclose(base[name] + update, merged[name], atol=1e-5)


def test_factors_that_need_no_folding_are_stored_as_they_are(loaded, tmp_path):
    """Where alpha / rank is the scaling already. Halves of `split` and stacked trees give the same file."""
    _, model, params = loaded("qwen2")
    config = jlora.LoraConfig(rank=6, alpha=7.0, targets=["up_proj"])
    params = adapted(params, config)
    adapter, _ = jlora.split(params)
    for name, tree in (("whole", params), ("half", adapter), ("stacked", jlora.stack_layers(params))):
        jlora.save_gguf_adapter(tmp_path / f"{name}.gguf", tree, config=config, model=model)
    factors = read(tmp_path / "whole.gguf")[1]
    assert len(factors) == 4
    for i in ("0", "1"):
        w = params["model"]["layers"][i]["mlp"]["up_proj"]["kernel"]
        np.testing.assert_array_equal(factors[f"blk.{i}.ffn_up.weight.lora_a"], np.asarray(w.lora_A).T)
        np.testing.assert_array_equal(factors[f"blk.{i}.ffn_up.weight.lora_b"], np.asarray(w.lora_B).T)
    for name in ("half", "stacked"):
        again = read(tmp_path / f"{name}.gguf")[1]
        assert again.keys() == factors.keys()
        assert all(np.array_equal(again[key], factors[key]) for key in factors)


def test_adapters_that_are_refused(loaded, tmp_path):
    def nested(w):
        return dataclasses.replace(w, base=w) if isinstance(w, jlora.LoraWeight) else w

    _, model, params = loaded("llama")
    config = jlora.LoraConfig(rank=2, targets=["q_proj"])
    whole = adapted(params, config)
    table = params["model"]["embed_tokens"]["embedding"]
    embedding = jlora.LoraWeight(base=table, lora_A=jnp.ones((ROWS, 2)), lora_B=jnp.ones((2, 48)), scaling=8.0)
    broken = jax.tree.map(lambda x: x * jnp.nan, whole)
    more = {"model": params["model"] | {"embed_tokens": {"embedding": embedding}}}
    twice = jax.tree.map(nested, whole, is_leaf=lambda x: isinstance(x, jlora.Weight))
    path = tmp_path / "adapter.gguf"
    for tree, of, into, says in (
        (params, config, model, "found no adapter"),
        (whole, jlora.LoraConfig(rank=2, alpha=4.0, targets=["q_proj"]), model, "not the one these parameters"),
        (broken, config, model, "is not finite"),
        (jlora.split(more)[0], config, model, "nothing else; this one has more: model.embed_tokens"),
        (twice, config, model, "nothing else; this one has more: model.layers.0.self_attn.q_proj, model.layers.1"),
        (whole, config, loaded("gpt2")[1], "nothing else; this one has more: model.layers.0.self_attn.q_proj"),
    ):
        with pytest.raises(ValueError, match=says):
            jlora.save_gguf_adapter(path, tree, config=of, model=into)
    assert not list(tmp_path.iterdir())
    path.touch()
    with pytest.raises(FileExistsError, match="choose another file name"):
        jlora.save_gguf_adapter(path, whole, config=config, model=model)
    assert path.stat().st_size == 0


# Refusals of models


def test_models_that_are_refused(loaded, tok, tmp_path):
    _, model, params = loaded("gpt2")
    path = tmp_path / "model.gguf"

    def refused(tree, says, **options):
        with pytest.raises(ValueError, match=f"(?s){says}"):
            jlora.save_gguf(path, model, tree, **({"tokenizer": tok, "dtype": "f16"} | options))
        assert not list(tmp_path.iterdir())

    wte = params["transformer"]["wte"]["embedding"]
    for value, says in ((jnp.nan, "'token_embd.weight' is not finite"), (1e5, "up to 100000, and f16 ends at 65504")):
        wrong = params["transformer"] | {"wte": {"embedding": wte.at[3, 3].set(value)}}
        refused({"transformer": wrong}, says)
    refused(params, "must be one of f32, f16, bf16, q8_0; got 'q4_k'.*llama-quantize", dtype="q4_k")
    without = {name: leaf for name, leaf in params["transformer"].items() if name != "ln_f"}
    refused({"transformer": without}, "missing: transformer/ln_f/bias")
    refused(loaded("llama")[2], "missing: transformer/h/0/attn/c_attn/bias .*there is model/layers/0/self_attn/v_proj")
    whole = adapted(params, jlora.LoraConfig(rank=2))
    for half in jlora.split(whole):
        refused(half, "half of a `split`. Pass `combine")
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another file name"):
        jlora.save_gguf(path, model, params, tokenizer=tok)
    assert path.read_text() == "mine"


def test_without_the_package(loaded, tok, tmp_path, monkeypatch):
    _, model, params = loaded("gpt2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'jlora[gguf]'")):
        jlora.save_gguf(tmp_path / "model.gguf", model, params, tokenizer=tok)
    with pytest.raises(ImportError, match=re.escape("pip install 'jlora[gguf]'")):
        jlora.save_gguf_adapter(tmp_path / "a.gguf", params, config=jlora.LoraConfig(), model=model)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        save_torch(tmp_path / "model.pt", model, params)
    assert not list(tmp_path.iterdir())


# PyTorch state dicts


@pytest.mark.few(2)
@pytest.mark.parametrize("variant", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_dict(variant, dtype, loaded, tmp_path):
    theirs, model, params = loaded(variant)
    params = adapted(jlora.cast(params, dtype), jlora.LoraConfig(rank=4))
    save_torch(tmp_path / "new" / "model.pt", model, params)
    state = torch.load(tmp_path / "new" / "model.pt", weights_only=True)
    assert {str(t.dtype) for t in state.values()} == {f"torch.{dtype}"}
    again = type(theirs)(theirs.config).eval()
    again.load_state_dict(state)
    ours = np.asarray(model.apply({"params": jlora.cast(jlora.merge(params), "float32")}, IDS))
    np.testing.assert_allclose(torch_logits(again.float(), IDS), ours, atol=1e-4)
    if model.config.tie_word_embeddings:
        embedding = next(t for name, t in state.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
        assert state["lm_head.weight"].data_ptr() == embedding.data_ptr()
    with pytest.raises(FileExistsError):
        save_torch(tmp_path / "new" / "model.pt", model, params)


def test_state_dict_of_an_untied_model(loaded, tmp_path):
    theirs, model, params = loaded("gpt2")
    params = jlora.add_lora(params, jlora.LoraConfig(rank=4, targets=["wte", "c_fc"]), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    params = jlora.combine(jax.tree.map(lambda x: x + 0.05, adapter), base)
    with pytest.raises(ValueError, match="one merged tensor cannot be both"):
        save_torch(tmp_path / "model.pt", model, params)
    save_torch(tmp_path / "model.pt", *jlora.untie(model, params))
    config = transformers.GPT2Config.from_dict(theirs.config.to_dict() | {"tie_word_embeddings": False})
    again = transformers.GPT2LMHeadModel(config).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    np.testing.assert_allclose(torch_logits(again, IDS), np.asarray(model.apply({"params": params}, IDS)), atol=1e-4)


# Ollama


QWEN = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<h>' + m.role + '</h>\\n\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<h>assistant</h>\\n\\n' }}{% endif %}"
)


def test_modelfile(loaded):
    config = loaded("llama")[1].config
    assert modelfile("m.gguf", tiny.tokenizer(), config) == (
        'FROM ./m.gguf\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_start|>"\n'
    )  # the model's own end of text is id 1
    said = modelfile("m.gguf", tiny.tokenizer(QWEN), dataclasses.replace(config, eos_token_id=(0, 2)))
    turn = "<|im_start|>{0}\n{{{{ .Content }}}}<|im_end|>\n"
    assert said == (
        'FROM ./m.gguf\nTEMPLATE """{{ if not .System }}<|im_start|>system\nBe helpful.<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "system" }}' + turn.format("system")
        + '{{ else if eq .Role "user" }}' + turn.format("user")
        + '{{ else if eq .Role "assistant" }}' + turn.format("assistant")
        + '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
    )  # fmt: skip


@pytest.mark.parametrize("template", [tiny.CHATML, QWEN, LLAMA3], ids=["chatml", "qwen", "llama3"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_chat_templates_render_alike(template, add_bos):
    tokenizer = tiny.tokenizer(template)
    found = ChatTemplate.of(tokenizer, add_bos)
    messages = [
        {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"), ("user", "Who?"))
    ]
    for chat in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert found.render(chat) == (text.removeprefix(tiny.EOT) if add_bos else text)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ strftime_now('%d') }}" + tiny.CHATML,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + tiny.CHATML,
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ '{{' }}" + tiny.CHATML,
        tiny.CHATML + '{{ \'"""\' }}',
        "{{ messages | length }}" + tiny.CHATML,
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
    ids=["none", "date", "no system", "numbered", "braces", "quotes", "counted", "twice"],
)
def test_chat_templates_that_do_more_are_left_to_ollama(template):
    assert ChatTemplate.of(tiny.tokenizer(template), False) is None


# The command


@pytest.fixture(scope="module")
def adapter_dir(llama_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "adapter"
    _, params = jlora.load(llama_dir, dtype="float32")
    config = jlora.LoraConfig(rank=4, use_rslora=True)
    jlora.save_adapter(directory, adapted(params, config), config=config, base_model=llama_dir)
    return directory


def export(to, adapter, output, *flags):
    main(["export", "--to", to, "--adapter", str(adapter), "--output", str(output), *flags])


@pytest.mark.slow
def test_export_writes_the_same_model_everywhere(llama_dir, adapter_dir, tmp_path, capsys):
    out = {to: tmp_path / to for to in ("transformers", "torch", "gguf", "gguf-adapter", "ollama")}
    for to, path in out.items():
        export(to, adapter_dir, path, *(["--gguf-dtype", "f32"] if to in ("gguf", "ollama") else []))
        assert str(path) in capsys.readouterr().out.replace("\n", "")
    model, params = jlora.load(llama_dir, dtype="float32")
    ours = np.asarray(model.apply({"params": jlora.load_adapter(adapter_dir, params)}, IDS % 100))
    assert np.abs(np.asarray(model.apply({"params": params}, IDS % 100)) - ours).max() > 1e-2
    merged = transformers.AutoModelForCausalLM.from_pretrained(out["transformers"]).eval()
    np.testing.assert_allclose(torch_logits(merged, IDS % 100), ours, atol=1e-4)
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja", "config.json"} <= {
        p.name for p in out["transformers"].iterdir()
    }
    written = json.loads((out["transformers"] / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    again = transformers.LlamaForCausalLM(merged.config).eval()
    again.load_state_dict(torch.load(out["torch"], weights_only=True))
    np.testing.assert_allclose(torch_logits(again, IDS % 100), ours, atol=1e-4)
    read_back = torch_logits(read_by_transformers(out["gguf"]), IDS % 100)
    np.testing.assert_allclose(read_back, ours, atol=1e-4)
    assert sorted(p.name for p in out["ollama"].iterdir()) == ["Modelfile", "ollama.gguf"]
    assert (out["ollama"] / "Modelfile").read_text().startswith('FROM ./ollama.gguf\nTEMPLATE """{{ range')
    tensors, plain = (read(p)[1] for p in (out["ollama"] / "ollama.gguf", out["gguf"]))
    assert all(np.array_equal(tensors[name], plain[name]) for name in plain)
    fields, _, _ = read(out["gguf-adapter"])
    assert (fields["general.type"], fields["adapter.lora.alpha"]) == ("adapter", 16.0)


def test_what_export_refuses(llama_dir, adapter_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").touch()
    for flags, says in (
        (["--model", llama_dir, "--to", "gguf-adapter", "--output", str(tmp_path / "x")], "without --adapter"),
        (["--model", llama_dir, "--to", "gguf", "--output", str(tmp_path / "there")], "choose another file name"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *flags])
        assert says in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit):
        export("gguf", adapter_dir, tmp_path / "x")
    said = capsys.readouterr().err
    assert "pip install 'jlora[gguf]'" in said and "JLORA_TRACEBACK" not in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
