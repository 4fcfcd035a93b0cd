"""Our graphs against transformers', in both execution forms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import LLAMA3_ROPE, VOCAB, make_torch_model

import jlora
from jlora.models import abstract_params, model_from_config
from jlora.models.attention import attention_kernel
from jlora.models.rope import Llama3Scaling, rope_frequencies

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2 narrow MLP": ("gpt2", {"n_inner": 56}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama GQA, llama3 rope": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama plain rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "qwen2 tied": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
}
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 60))


def logits_of(model, params, ids=IDS, **kwargs):
    return np.asarray(model.apply({"params": params}, jnp.asarray(ids), **kwargs))


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    family, changes = CASES[case]
    oracle = make_torch_model(family, **changes)
    # Several shards for one of them.
    oracle.save_pretrained(tmp_path, max_shard_size="40KB" if case == "llama biases" else "1GB")
    expected = oracle(torch.tensor(IDS)).logits.detach().numpy()
    assert np.ptp(expected) > 5, "the comparison means nothing on flat logits"
    for stack in (False, True):
        model, params = jlora.load(tmp_path, dtype=jnp.float32, stack=stack)
        actual = logits_of(model, params)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.few(1)
def test_bfloat16_is_near(checkpoint):
    directory, oracle = checkpoint
    expected = oracle(torch.tensor(IDS)).logits.detach().numpy()
    model, params = jlora.load(directory, dtype=jnp.bfloat16)
    actual = logits_of(model, params)
    assert actual.dtype == np.float32
    # Eight bits of mantissa through two layers: a few percent of the spread of the logits.
    assert np.abs(actual - expected).mean() < 0.03 * expected.std()


@pytest.mark.slow
def test_remat_changes_no_value_and_no_gradient(checkpoint):
    directory, _ = checkpoint
    for stack in (False, True):
        results = []
        for remat in ("none", "layer"):
            model, params = jlora.load(directory, dtype=jnp.float32, stack=stack, remat=remat)

            def loss(params, model=model):
                return jnp.mean(jnp.square(model.apply({"params": params}, jnp.asarray(IDS[:, :12]))))

            results.append(jax.jit(jax.value_and_grad(loss))(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *results)


@pytest.mark.slow
def test_a_segment_sees_itself_alone(checkpoint):
    directory, _ = checkpoint
    model, params = jlora.load(directory, dtype=jnp.float32)
    ids = jnp.asarray(IDS[:1, :12])
    segments = jnp.array([[1] * 4 + [2] * 6 + [0] * 2])
    packed = model.apply({"params": params}, ids, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :4], model.apply({"params": params}, ids[:, :4]), atol=1e-4)
    np.testing.assert_allclose(packed[:, 4:10], model.apply({"params": params}, ids[:, 4:10]), atol=1e-4)
    padding = model.apply({"params": params}, ids, segment_ids=jnp.zeros_like(ids))
    assert np.isfinite(padding).all()


@pytest.mark.slow
def test_positions_are_used(checkpoints):
    """Learned positions tell where a token is; rotary ones only how far apart two are."""
    moved = jnp.broadcast_to(jnp.arange(7, 19), (2, 12))
    for family, absolute in (("gpt2", True), ("llama", False)):
        model, params = jlora.load(checkpoints[family][0], dtype=jnp.float32)
        plain = logits_of(model, params, IDS[:, :12])
        shifted = logits_of(model, params, IDS[:, :12], positions=moved)
        assert (np.abs(plain - shifted).max() > 1e-2) == absolute


def test_llama3_rope_golden_values():
    """Llama-3.2-1B, computed by transformers: head_dim 64, theta 5e5, factor 32."""
    inv = rope_frequencies(64, 500000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    np.testing.assert_allclose(inv[:4], [1, 0.663601, 0.440367, 0.292228], rtol=1e-5)
    np.testing.assert_allclose(inv[14:19], [0.00321145, 0.00129055, 0.000429557, 9.70829e-05, 1.94616e-05], rtol=1e-5)
    np.testing.assert_allclose(inv[31], 9.41831e-08, rtol=1e-5)
    assert inv.dtype == np.float32


def test_no_recompilation_and_no_allocation(checkpoint):
    directory, _ = checkpoint
    model, params = jlora.load(directory, dtype=jnp.float32)
    traces = []

    @jax.jit
    def apply(params, ids):
        traces.append(ids.shape)
        return model.apply({"params": params}, ids)

    for seed in range(3):
        apply(params, jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (2, 8))))
    assert len(traces) == 1
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract_params(model)))


def test_attention_kernel_table():
    def choose(**changes):
        return attention_kernel(
            **(
                {"dtype": jnp.bfloat16, "head_dim": 64, "seq": 8, "kv_len": 8, "masked": False, "backend": "gpu"}
                | changes
            )
        )

    for change in ({}, {"masked": True}, {"seq": 7, "kv_len": 7}):
        assert choose(**change) == "cudnn"
    of_a_cache = {"seq": 1, "masked": True}
    odd = {"seq": 7, "kv_len": 7, "masked": True}
    for change in ({"backend": "cpu"}, {"dtype": jnp.float32}, {"head_dim": 36}, {"head_dim": 256}, of_a_cache, odd):
        assert choose(**change) == "xla"


LLAMA = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
REFUSED = {
    "unknown family": ({"model_type": "bert"}, "'bert'"),
    "activation": ({"model_type": "gpt2", "activation_function": "relu"}, "`activation_function` = 'relu'"),
    "attention scale": ({"model_type": "gpt2", "scale_attn_weights": False}, "`scale_attn_weights` = False"),
    "layer scale": ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "tied gpt2": ({"model_type": "gpt2", "tie_word_embeddings": 1}, "tie_word_embeddings"),
    "heads": ({"model_type": "gpt2", "n_embd": 48, "n_head": 5}, "`n_head` in config.json must divide `n_embd` = 48"),
    "integer": ({"model_type": "gpt2", "n_layer": "two"}, "`n_layer`"),
    "number": (LLAMA | {"rms_norm_eps": 0}, "`rms_norm_eps`"),
    "flag": (LLAMA | {"mlp_bias": "yes"}, "`mlp_bias`"),
    "token id": (LLAMA | {"eos_token_id": "x"}, "`eos_token_id`"),
    "rope": (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "rope field": (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
    "window": (
        LLAMA | {"model_type": "mistral", "sliding_window": 0},
        "`sliding_window` in config.json must be an integer",
    ),
    "qwen window": (LLAMA | {"model_type": "qwen2", "layer_types": 32 * ["sliding_attention"]}, "no `sliding_window`"),
    "layer type": (LLAMA | {"layer_types": ["full_attention", "chunked"], "num_hidden_layers": 2}, "'chunked'"),
    "llama with a window": (
        LLAMA | {"layer_types": 32 * ["sliding_attention"]},
        "'full_attention' in each of its 32 layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graphs_do_not_compute_is_refused(case):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        model_from_config(fields, dtype=jnp.float32)
    assert message in str(error.value)


@pytest.mark.slow
def test_mistral_without_a_window_is_a_llama(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, sliding_window=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    oracle = transformers.MistralForCausalLM(config).eval()
    oracle.save_pretrained(tmp_path)
    model, params = jlora.load(tmp_path, dtype=jnp.float32)
    expected = oracle(torch.tensor(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(logits_of(model, params), expected, atol=1e-4)


def test_both_spellings_of_rope(checkpoints, tmp_path):
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    directory, oracle = checkpoints["llama"]
    oracle.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("rope_parameters")["factor"] == 32.0
    old = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    old["type"] = old.pop("rope_type")
    fields |= {"rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": old}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert jlora.load(tmp_path)[0].config == jlora.load(directory)[0].config


@pytest.mark.slow
def test_full_size_gpt2(tmp_path):
    """124 million random parameters, as transformers initializes them."""
    import transformers

    torch.manual_seed(0)
    oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    oracle.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50257, (1, 64))
    model, params = jlora.load(tmp_path, dtype=jnp.float32)
    assert jlora.count(params) == 124_439_808
    expected = oracle(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(logits_of(model, params, ids), expected, atol=1e-4)
