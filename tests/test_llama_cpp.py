"""Our GGUF files in llama.cpp itself: the same tokens, logits and continuations, and adapters as it applies them.

`make slow` builds llama-cpp-python from its source distribution for this. Keys and values are cached in float32 (llama.cpp's
default is f16), so what differs in f32 files is the order of sums, and in GPT-2 the GELU: see `gelu_of_ggml`.

It is built without GGML_NATIVE, to compute the same on every machine: with it, on a CPU with AMX, llama-cpp-python 0.3.36
crashes in its repacked q8_0 products.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf_files import ADAPTERS, BIASED, ROWS
from oracles import make_torch_model
from tokenizer_kinds import PROBES, rebuilt, sentencepiece, texts_of
from tokenizers import processors
from trees import adapted

import jlora
from jlora.cli import main
from jlora.models import gpt2, model_from_config
from jlora.storage.pre_tokenizers import PRE_TOKENIZERS, SAME_RULES

pytestmark = pytest.mark.slow

PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
GEMMA3 = {
    "query_pre_attn_scalar": 16, "tie_word_embeddings": False, "final_logit_softcapping": 30.0,
    "layer_types": ["full_attention", *3 * ["sliding_attention"]], "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}  # fmt: skip
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", BIASED),
    "llama-plain-rope": ("llama", PLAIN_ROPE),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "smollm3-untied": ("smollm3", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16}),
    "gemma3-untied-capped": ("gemma3_text", GEMMA3),
}
EMBEDDED = ["tiny-gpt2", "tiny-llama"]
IDS = [int(i) for i in np.random.default_rng(0).integers(3, 400, 24)]
NEW_TOKENS = 32
PROMPT = "The old baker walked to the river, because it was raining, and she said:"


@contextlib.contextmanager
def opened(path, **options) -> Iterator:
    """The file in llama.cpp. Without the package the test fails: `make slow` installs it."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_threads=1,
        n_threads_batch=1, verbose=False, **options,
    )  # fmt: skip
    with contextlib.closing(model):
        yield model


def read(path, ids=IDS, **options):
    """(logits [len(ids), vocab], greedy continuation) of llama.cpp."""
    with opened(path, **options) as model:
        model.eval(ids)
        logits = np.array(model.scores[: len(ids)])
        return logits, list(itertools.islice(model.generate(ids, temp=0.0), NEW_TOKENS))


def ours(model, params, ids=IDS):
    """The same of ours."""
    logits = np.asarray(model.apply({"params": params}, np.array([ids])))[0]
    (row,) = jlora.generate(model, params, [ids], max_new_tokens=NEW_TOKENS, temperature=0.0, eos_token_id=[])
    assert len(row) == NEW_TOKENS
    return logits, row


def divergence(logits, other):
    """Mean KL of next-token distributions, in nats."""
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (logits, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


def gelu_of_ggml(x):
    """ggml looks GELU up in a table by its argument rounded to f16, in results rounded to f16 (`ggml_vec_gelu_f32`)."""
    rounded = x.astype(jnp.float16).astype(jnp.float32)
    looked_up = jax.nn.gelu(rounded, approximate=True).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(x <= -10, 0.0, jnp.where(x >= 10, x, looked_up)).astype(x.dtype)


def assert_close(model, logits, expected):
    """To 2e-5 of the largest logit where sums of float32 differ by 2e-6; to 1e-3 where GELU's table makes 4e-4."""
    relative = 1e-3 if model.config.model_type in ("gpt2", "gemma3_text") else 2e-5
    np.testing.assert_allclose(logits, expected, atol=relative * np.abs(expected).max())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """variant -> (our model, parameters, tokenizer)."""
    made = {}

    def get(variant):
        if variant not in made:
            if variant in EMBEDDED:
                directory = f"examples/assets/{variant}"
                tokenizer = jlora.load_tokenizer(directory)
            else:
                family, changes = VARIANTS[variant]
                directory, tokenizer = tmp_path_factory.mktemp(variant), tiny.tokenizer(tiny.CHATML)
                make_torch_model(family, vocab_size=ROWS, **changes).save_pretrained(directory)
            made[variant] = *jlora.load(directory, dtype="float32"), tokenizer
        return made[variant]

    return get


def written(path, model, params, tokenizer, dtype="f32"):
    jlora.save_gguf(path, model, params, tokenizer=tokenizer, dtype=dtype)
    return path


# Models


@pytest.mark.parametrize("variant", [*VARIANTS, *EMBEDDED])
def test_logits_and_greedy_continuations_are_ours(variant, loaded, tmp_path):
    model, params, tokenizer = loaded(variant)
    ids = tokenizer(PROMPT)["input_ids"] if variant in EMBEDDED else IDS
    logits, row = read(written(tmp_path / "model.gguf", model, params, tokenizer), ids)
    expected, expected_row = ours(model, params, ids)
    assert np.ptp(expected) > 5, "the comparison means nothing on flat logits"
    assert_close(model, logits, expected)
    assert row == expected_row
    assert variant not in EMBEDDED or len(set(row)) > 10
    assert divergence(expected, logits) < 1e-6


def test_what_differs_in_gpt2_is_the_gelu(loaded, tmp_path, monkeypatch):
    """With ggml's table in our graph the mean difference falls to less than a third. (Not to nothing: sums that differ in
    the last bit can round to the next f16.)"""
    model, params, tokenizer = loaded("gpt2")
    logits, _ = read(written(tmp_path / "model.gguf", model, params, tokenizer))
    exact = np.abs(ours(model, params)[0] - logits).mean()
    monkeypatch.setattr(gpt2, "gelu", gelu_of_ggml)
    tabled = np.abs(np.asarray(model.apply({"params": params}, np.array([IDS])))[0] - logits).mean()
    assert tabled < exact / 3


def test_scaled_rotary_frequencies_are_read(loaded, tmp_path):
    model, params, tokenizer = loaded("llama")
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=None))
    scaled, _ = read(written(tmp_path / "scaled.gguf", model, params, tokenizer))
    unscaled, _ = read(written(tmp_path / "plain.gguf", plain, params, tokenizer))
    assert_close(plain, unscaled, ours(plain, params)[0])
    assert np.abs(scaled - unscaled).max() > 1e-1


def test_a_window_that_llama_cpp_has_not_is_the_context_of_the_file(tmp_path):
    """Up to it llama.cpp computes the same, and the file says so."""
    make_torch_model("mistral", vocab_size=ROWS, sliding_window=20).save_pretrained(tmp_path / "hf")
    model, params = jlora.load(tmp_path / "hf", dtype="float32")
    with pytest.warns(UserWarning, match="without its sliding window: it computes the same for 20 tokens"):
        path = written(tmp_path / "model.gguf", model, params, tiny.tokenizer())
    with opened(path) as there:
        assert there.metadata["llama.context_length"] == "20"
        there.eval(IDS)
        logits = np.array(there.scores[: len(IDS)])
    expected = np.asarray(model.apply({"params": params}, np.array([IDS])))[0]
    assert_close(model, logits[:20], expected[:20])
    assert np.abs(logits[20:] - expected[20:]).max() > 1e-2


@pytest.mark.parametrize(("dtype", "nats"), [("f16", 1e-6), ("bf16", 2e-4), ("q8_0", 1e-3)])
@pytest.mark.parametrize("name", EMBEDDED)
def test_smaller_weights_keep_the_distributions(name, dtype, nats, loaded, tmp_path):
    """Measured 4e-7, 5e-5 and 4e-4 nats. llama.cpp rounds activations to the weights' type before each product."""
    model, params, tokenizer = loaded(name)
    ids = tokenizer(PROMPT)["input_ids"]
    logits, _ = read(written(tmp_path / "model.gguf", model, params, tokenizer, dtype), ids)
    assert divergence(ours(model, params, ids)[0], logits) < nats


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "qwen2", "qwen3", "smollm3", "gemma3"])
def test_every_family_loads_in_every_type(variant, dtype, loaded, tmp_path):
    """Rows of 48 do not divide into blocks of 32: those matrices of a q8_0 file are f16."""
    model, params, tokenizer = loaded(variant)
    logits, _ = read(written(tmp_path / "model.gguf", model, params, tokenizer, dtype))
    assert 0 < divergence(ours(model, params)[0], logits) < 1e-2


# Adapters


def apart(tmp_path, model, params, config, tokenizer):
    """(merged file, base file, adapter file) of adapted parameters."""
    merged = written(tmp_path / "merged.gguf", model, params, tokenizer)
    base = written(tmp_path / "base.gguf", model, jlora.remove_lora(params), tokenizer)
    jlora.save_gguf_adapter(tmp_path / "adapter.gguf", params, config=config, model=model)
    return merged, base, tmp_path / "adapter.gguf"


LORAS = [
    *itertools.product(["gpt2", "gpt2-untied", "llama", "llama-biased", "mistral", "qwen2"], ADAPTERS),
    *itertools.product(["qwen3", "smollm3", "gemma3"], ADAPTERS),
    ("llama", "head"),
    ("qwen2-untied", "head"),
    ("gpt2", "pissa"),
    ("llama", "pissa"),
]
KINDS = ADAPTERS | {
    "head": {"rank": 4, "alpha": 16.0, "targets": ["lm_head", "c_attn"]},
    "pissa": {"rank": 3, "init": "pissa", "use_rslora": True},
}


@pytest.mark.parametrize(("variant", "kind"), LORAS)
def test_base_plus_adapter_is_the_merged_model(variant, kind, loaded, tmp_path):
    model, params, tokenizer = loaded(variant)
    fields = KINDS[kind]
    if kind == "head":
        fields = fields | {"targets": ["lm_head", "q_proj"]}
    config = jlora.LoraConfig(**fields)
    params = adapted(params, config)
    merged, base, adapter = apart(tmp_path, model, params, config, tokenizer)
    expected, expected_row = ours(model, params)
    for logits, row in (read(merged), read(base, lora_path=str(adapter))):
        assert_close(model, logits, expected)
        assert row == expected_row
    assert np.abs(read(base)[0] - expected).max() > 1e-1, "the adapter must show"
    # Half of it, as with `--lora-scaled adapter.gguf 0.5`: the update is linear in the scale.
    halved = jax.tree.map(
        lambda w: dataclasses.replace(w, scaling=w.scaling / 2) if isinstance(w, jlora.LoraWeight) else w,
        params,
        is_leaf=lambda x: isinstance(x, jlora.Weight),
    )
    if kind != "pissa":
        half, _ = read(base, lora_path=str(adapter), lora_scale=0.5)
        assert_close(model, half, ours(model, halved)[0])


@pytest.mark.parametrize("variant", ["gpt2", "llama-tied", "qwen2"])
def test_what_no_adapter_file_holds_is_merged(variant, loaded, tmp_path):
    """An NF4 base, DoRA, trained biases, and an embedding whose head goes on using the original."""
    model, params, tokenizer = loaded(variant)
    names = {"gpt2": ["c_fc", "wte"]}.get(variant, ["up_proj", "embed_tokens"])
    params = jlora.quantize_params(params, jlora.NF4(), targets=names[:1])
    config = jlora.LoraConfig(rank=4, targets=names, use_dora=True, bias="none" if "llama" in variant else "all")
    adapter, base = jlora.split(adapted(params, config))
    params = jlora.combine(jax.tree.map(lambda x: x * 1.1 + 0.01, adapter), base)
    with pytest.raises(ValueError, match="nothing else; this one has more"):
        jlora.save_gguf_adapter(tmp_path / "adapter.gguf", params, config=config, model=model)
    logits, row = read(written(tmp_path / "model.gguf", *jlora.untie(model, params), tokenizer))
    expected, expected_row = ours(model, params)
    assert_close(model, logits, expected)
    assert row == expected_row


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_what_the_command_exports(to, tmp_path):
    directory = "examples/assets/tiny-llama"
    model, params = jlora.load(directory, dtype="float32")
    config = jlora.LoraConfig(rank=4, use_rslora=True)
    params = adapted(params, config)
    jlora.save_adapter(tmp_path / "adapter", params, config=config, base_model=directory)
    flags = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    main(["export", "--to", to, *flags, "--gguf-dtype", "f32"])
    file = tmp_path / "out" / "out.gguf" if to == "ollama" else tmp_path / "out"
    logits, row = read(file)
    expected, expected_row = ours(model, params)
    assert_close(model, logits, expected)
    assert row == expected_row


# Vocabulary


def vocabulary_file(path, tokenizer):
    """The tokenizer in a GGUF file, with a model of a few rows more than it has tokens."""
    model = model_from_config(tiny.LLAMA | {"vocab_size": len(tokenizer) + 3}, dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return written(path, model, params, tokenizer, "f16")


def tokens(model, text, special=True):
    return model.tokenize(text.encode(), add_bos=True, special=special)


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS.values()])
def test_tokens_are_those_of_transformers(name, tmp_path):
    tokenizer = rebuilt(name)
    path = vocabulary_file(tmp_path / "model.gguf", tokenizer)
    texts = texts_of(2000)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    with opened(path, vocab_only=True) as model:
        for text, ids in zip(texts, expected, strict=True):
            assert tokens(model, text) == ids, text
            assert model.detokenize(ids, special=True) == text.encode()
        # A mark that a user typed is text. (llama.cpp takes a user's own token for one all the same, as transformers does.)
        plain = tokenizer(PROBES[4], split_special_tokens=True)["input_ids"]
        assert tokens(model, PROBES[4], special=False) == plain != expected[4]
    # The probes tell names apart.
    other = "llama-bpe" if name in ("gpt-2", "smollm") else "gpt-2"
    with opened(path, vocab_only=True, kv_overrides={"tokenizer.ggml.pre": other}) as model:
        assert [tokens(model, text) for text in texts] != expected


@pytest.mark.parametrize("name", SAME_RULES)
def test_names_of_the_same_rules(name, tmp_path):
    tokenizer = rebuilt(SAME_RULES[name])
    path = vocabulary_file(tmp_path / "model.gguf", tokenizer)
    with opened(path, vocab_only=True, kv_overrides={"tokenizer.ggml.pre": name}) as model:
        for text in texts_of(1000):
            assert tokens(model, text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("before", [False, True], ids=["gemma", "mistral"])
def test_tokens_of_sentencepiece_are_those_of_transformers(before, tmp_path):
    tokenizer = sentencepiece(tiny.text() + "a,b.c-d e'f", before=before, users=() if before else ("▁▁", "▁▁▁", "\n\n"))
    path = vocabulary_file(tmp_path / "model.gguf", tokenizer)
    texts = [tiny.text(60), *texts_of(1000, more=(*tiny.text(60).split(), " ", " the", "  ", "keeper"))]
    with opened(path, vocab_only=True) as model:
        assert model.metadata["tokenizer.ggml.model"] == "llama"
        for text in filter(None, texts):
            # Of marks such as "<s>" llama.cpp and transformers think alike only in what they are for.
            assert tokens(model, text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", EMBEDDED)
def test_tokens_of_the_embedded_models(name, loaded, tmp_path):
    model, params, tokenizer = loaded(name)
    with opened(written(tmp_path / "model.gguf", model, params, tokenizer), vocab_only=True) as model:
        for text in PROBES:
            assert tokens(model, text) == tokenizer(text)["input_ids"], text
        assert (model.token_bos(), model.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize(
    "single", ["$A", f"{tiny.EOT} $A", f"{tiny.EOT} $A {tiny.EOT}"], ids=["bare", "bos", "bos eos"]
)
def test_a_text_begins_and_ends_as_in_transformers(name, single, tmp_path):
    """llama.cpp adds a bos token to "llama-bpe" of its own accord; the file says whether."""
    tokenizer = rebuilt(name)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(tiny.EOT, 0)]
    )
    expected = tokenizer("The keeper's 3 lamps")["input_ids"]
    assert expected.count(0) == single.count(tiny.EOT)
    with opened(vocabulary_file(tmp_path / "model.gguf", tokenizer), vocab_only=True) as model:
        assert tokens(model, "The keeper's 3 lamps") == expected
