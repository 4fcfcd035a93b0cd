"""What the model graphs promise beyond plain logits: positions, segments, forms, and a strict reading of config.json."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from oracles import LLAMA3_ROPE, VOCAB, make_torch_model, torch_logits

import jlora
from jlora.models import FAMILIES, abstract_params, model_from_config, replace
from jlora.models.rope import Llama3Scaling, rope_angles, rope_frequencies

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def token_ids(batch=2, seq=48, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, seq)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "head"))
def apply(model, params, ids, **kwargs):
    return model.apply({"params": params}, ids, **kwargs)


def difference(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def in_form(params, form):
    return jlora.stack_layers(params) if form == "stacked" else params


both_forms = pytest.mark.parametrize("form", ["per layer", "stacked"])


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """family -> (module, per-layer float32 parameters)."""
    return {family: jlora.load(directory, dtype=jnp.float32) for family, (directory, _) in checkpoints.items()}


@pytest.fixture(params=["gpt2", "llama"])
def graph(request):
    """A family of each module class."""
    return request.param


@pytest.fixture
def model_and_params(loaded, graph):
    return loaded[graph]


# Parity with transformers

CONFIGS = {
    "gpt2 epsilon": ("gpt2", {"layer_norm_epsilon": 1e-2}),
    "llama all heads": ("llama", {"num_key_value_heads": 4, "rope_parameters": DEFAULT_ROPE}),
    "llama one kv head, small head_dim": ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
    "llama epsilon and theta": ("llama", {"rms_norm_eps": 1e-2, "rope_parameters": DEFAULT_ROPE | {"rope_theta": 9.0}}),
    "llama other scaling": ("llama", {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0, "low_freq_factor": 0.5}}),
    "llama attention bias": ("llama", {"attention_bias": True}),
    "mistral head_dim": ("mistral", {"head_dim": 16}),
    "mistral tied": ("mistral", {"tie_word_embeddings": True}),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(tmp_path, name):
    family, changes = CONFIGS[name]
    oracle = make_torch_model(family, **changes)
    oracle.save_pretrained(tmp_path)
    model, params = jlora.load(tmp_path, dtype=jnp.float32, stack=True)
    ids = token_ids()
    assert difference(apply(model, params, ids), torch_logits(oracle, ids)) <= 1e-4


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE | {"rope_type": "default"}}),
        ("llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0}}),
        ("llama", {"rms_norm_eps": 1e-2}),
        ("gpt2", {"layer_norm_epsilon": 1e-2}),
    ],
)
def test_these_fields_change_the_logits_beyond_the_tolerance(family, changes):
    """The negative twin: the same weights under another field are far off, so parity means that it was used."""
    ids = token_ids()
    logits = [torch_logits(make_torch_model(family, **fields), ids) for fields in ({}, changes)]
    assert difference(*logits) > 1e-2


def test_llama3_scaling_far_beyond_the_original_context(checkpoints, loaded):
    """Positions up to 1800 with an original context of 32: slowed wavelengths decide the logits."""
    _, oracle = checkpoints["llama"]
    model, params = loaded["llama"]
    ids, positions = token_ids(1, 40), np.linspace(0, 1800, 40).astype(np.int32)[None]
    expected = torch_logits(oracle, ids, position_ids=positions)
    # float32 angles near 1800 radians carry 1e-4 of rounding of their own, in both implementations.
    assert difference(apply(model, params, ids, positions=positions), expected) <= 5e-4
    assert difference(apply(model, params, ids), expected) > 1e-1


def test_explicit_positions_equal_transformers(checkpoints, loaded, graph):
    _, oracle = checkpoints[graph]
    model, params = loaded[graph]
    ids = token_ids(2, 16)
    positions = np.sort(np.random.default_rng(1).permutation(60)[:32].reshape(2, 16), axis=1).astype(np.int32)
    logits = apply(model, params, ids, positions=positions)
    assert difference(logits, torch_logits(oracle, ids, position_ids=positions)) <= 1e-4
    assert difference(logits, apply(model, params, ids)) > 1e-2


@pytest.mark.few(1)
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(checkpoint):
    directory, oracle = checkpoint
    ids = token_ids()
    exact = torch_logits(oracle, ids)
    half = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    model, params = jlora.load(directory, dtype=jnp.bfloat16)
    ours, theirs = (np.abs(np.asarray(x) - exact) for x in (apply(model, params, ids), torch_logits(half, ids)))
    assert 1e-4 < ours.mean() <= 1.25 * theirs.mean()


def test_hidden_states_equal_transformers_and_make_the_logits(checkpoints, loaded, graph):
    _, oracle = checkpoints[graph]
    model, params = loaded[graph]
    ids = token_ids()
    hidden = apply(model, params, ids, head=False)
    with torch.no_grad():
        expected = oracle(torch.tensor(ids, dtype=torch.long), output_hidden_states=True).hidden_states[-1]
    assert hidden.dtype == model.dtype and difference(hidden, expected.numpy()) <= 1e-4
    weight, transpose = model.output_head(params)
    assert difference(jlora.linear(hidden, weight, transpose=transpose), apply(model, params, ids)) <= 1e-5


def test_a_tied_head_multiplies_by_the_base_of_an_adapted_embedding(loaded):
    model, params = loaded["gpt2"]
    table = params["transformer"]["wte"]["embedding"]
    factors = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(VOCAB, 2), (2, 48)])]
    adapted = {"transformer": params["transformer"] | {"wte": {"embedding": jlora.LoraWeight(table, *factors, 1.0)}}}
    ids = token_ids()
    hidden = apply(model, adapted, ids, head=False)
    np.testing.assert_allclose(apply(model, adapted, ids), hidden @ table.T, atol=1e-4)
    assert difference(hidden, apply(model, params, ids, head=False)) > 1e-2


# Rotary frequencies


def test_llama_3_2_scaling_by_pair():
    scaled = rope_frequencies(64, 500000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    ratio = rope_frequencies(64, 500000.0, None) / scaled
    np.testing.assert_allclose(ratio[:15], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[15:18], [1.6513, 3.2923, 9.6667], rtol=1e-4)
    np.testing.assert_allclose(ratio[18:], 32.0, rtol=1e-6)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, LLAMA3_ROPE | {"factor": 8.0}, DEFAULT_ROPE])
def test_frequencies_equal_transformers(rope):
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=rope)
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    scaled = Llama3Scaling(*(rope[f] for f in Llama3Scaling._fields)) if rope["rope_type"] == "llama3" else None
    np.testing.assert_allclose(rope_frequencies(64, rope["rope_theta"], scaled), expected, rtol=1e-6)


def test_angles_of_neighbouring_positions_differ():
    """In bfloat16, positions 256 and 257 are the same number."""
    cos, sin = rope_angles(jnp.array([[256, 257]]), rope_frequencies(8, 10000.0, None))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, :, 0], np.cos([256.0, 257.0]), atol=1e-5)
    np.testing.assert_allclose(sin[0, :, 4], np.sin([256.0, 257.0]), atol=1e-5)


# Segments

SEGMENTS = np.array([[1] * 7 + [2] * 5 + [3] * 9 + [0] * 3, [5] * 4 + [2] * 12 + [0] * 8], np.int32)


def spans(row):
    edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.few(1)
@both_forms
def test_each_segment_equals_the_segment_alone(model_and_params, form):
    model, params = model_and_params
    params, ids = in_form(params, form), token_ids(2, SEGMENTS.shape[1])
    packed = apply(model, params, ids, segment_ids=SEGMENTS)
    assert np.isfinite(packed).all()
    segments = [(row, span) for row in range(2) for span in spans(SEGMENTS[row])]
    # A causal model does not see what follows, so the segments may be padded to one width.
    padded = np.zeros((len(segments), SEGMENTS.shape[1]), np.int32)
    for line, (row, span) in zip(padded, segments, strict=True):
        line[: span.stop - span.start] = ids[row, span]
    for logits, (row, span) in zip(apply(model, params, padded), segments, strict=True):
        assert difference(packed[row, span], logits[: span.stop - span.start]) <= 1e-4


def test_the_mask_and_the_restart_of_positions_each_matter(loaded):
    """Learned positions show both; without either, later segments have other logits."""
    model, params = loaded["gpt2"]
    ids = token_ids(2, SEGMENTS.shape[1])
    index = np.broadcast_to(np.arange(SEGMENTS.shape[1]), SEGMENTS.shape).astype(np.int32)
    restarted = np.array([np.concatenate([np.arange(s.stop - s.start) for s in spans(row)]) for row in SEGMENTS])
    packed = apply(model, params, ids, segment_ids=SEGMENTS)
    assert difference(packed, apply(model, params, ids, segment_ids=SEGMENTS, positions=restarted)) == 0
    no_mask = apply(model, params, ids, positions=restarted)
    no_restart = apply(model, params, ids, segment_ids=SEGMENTS, positions=index)
    for other in (no_mask, no_restart):
        assert difference(packed[0, :7], other[0, :7]) <= 1e-4
        assert difference(packed[0, 7:12], other[0, 7:12]) > 1e-1


def test_rows_of_padding_are_finite_and_leave_the_others_alone(model_and_params):
    model, params = model_and_params
    ids, segments = token_ids(), np.ones((2, 48), np.int32)
    segments[1] = 0
    logits = apply(model, params, ids, segment_ids=segments)
    assert np.isfinite(logits).all()
    assert difference(logits[0], apply(model, params, ids)[0]) <= 1e-5


@pytest.mark.few(1)
def test_gradients_are_finite_with_rows_of_padding(model_and_params):
    model, params = model_and_params
    ids, segments = token_ids(2, 8), np.array([[1] * 5 + [0] * 3, [0] * 8], np.int32)

    @jax.jit
    def loss(params):
        return jnp.sum(model.apply({"params": params}, ids, segment_ids=segments)[0, :5] ** 2)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


# Forms, rematerialization, allocation


@both_forms
def test_rematerialization_keeps_less_for_the_backward_pass(model_and_params, form):
    model, params = model_and_params
    params, ids = in_form(params, form), token_ids(2, 12)

    def residuals(model):
        _, pull = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply({"params": p}, ids), p), params)
        return jlora.nbytes(pull)

    assert residuals(replace(model, remat="layer")) < 0.8 * residuals(model)


@pytest.mark.slow
def test_both_forms_have_the_same_gradients(model_and_params):
    model, params = model_and_params
    ids = token_ids(2, 12)

    @jax.jit
    def grads(params):
        return jax.grad(lambda p: jnp.mean(jax.nn.log_softmax(model.apply({"params": p}, ids))[..., 0]))(params)

    per_layer, stacked = grads(params), grads(jlora.stack_layers(params))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(per_layer)), "every parameter has a gradient"
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, jlora.stack_layers(per_layer), stacked)


def test_a_stack_is_one_block_in_the_program(loaded):
    """Compile time does not grow with depth: the program of four layers is as long as that of two."""
    model, params = loaded["gpt2"]

    def lines(depth):
        deeper = model.clone(config=type(model.config)(**(vars(model.config) | {"n_layer": depth})))
        layers = {str(i): params["transformer"]["h"]["0"] for i in range(depth)}
        tree = jlora.stack_layers({"transformer": params["transformer"] | {"h": layers}})
        program = jax.make_jaxpr(lambda p: deeper.apply({"params": p}, token_ids(1, 4)))(tree)
        return str(program).count("\n")

    assert lines(2) == lines(4)


def test_abstract_params_allocate_nothing_and_have_the_shapes(model_and_params):
    model, params = model_and_params
    before = len(jax.live_arrays())
    abstract = abstract_params(model)
    assert len(jax.live_arrays()) == before
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, params)


def test_abstract_params_of_a_model_larger_than_memory():
    """Eight layers of Llama 3.1 405B."""
    fields = {
        "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
        "num_key_value_heads": 8, "num_hidden_layers": 8, "vocab_size": 128256,
    }  # fmt: skip
    model = model_from_config(fields, dtype=jnp.bfloat16)
    assert round(jlora.count(abstract_params(model)) / 1e9) == 30


# Reading config.json

GPT2, LLAMA = {"model_type": "gpt2"}, {"model_type": "llama"}


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_sizes_have_transformers_defaults(family):
    config = model_from_config({"model_type": family}, dtype=jnp.float32).config
    theirs = transformers.AutoConfig.for_model(family)
    sizes = {
        "gpt2": ["n_layer", "n_head", "n_embd", "n_positions", "layer_norm_epsilon"],
    }.get(family, ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"] + [
        "intermediate_size", "max_position_embeddings", "rms_norm_eps"
    ])  # fmt: skip
    for name in ["vocab_size", "tie_word_embeddings", *sizes]:
        assert getattr(config, name) == getattr(theirs, name), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_null_kv_heads_are_one_a_head(family):
    fields = {"model_type": family, "num_attention_heads": 16, "num_key_value_heads": None, "sliding_window": None}
    assert model_from_config(fields, dtype=jnp.float32).config.num_key_value_heads == 16


def rope(**fields):
    return LLAMA | {"rope_parameters": LLAMA3_ROPE | fields}


REFUSED = [
    ({}, ["`model_type`", "None", "gpt2, llama, qwen2, mistral"]),
    ({"model_type": "bert"}, ["`model_type`", "'bert'", "jlora.add_lora"]),
    (GPT2 | {"add_cross_attention": True}, ["`add_cross_attention` = True", "False", "gpt2"]),
    (GPT2 | {"n_layer": 0}, ["`n_layer`", "an integer from 1", "got 0"]),
    (GPT2 | {"n_embd": True}, ["`n_embd`", "an integer from 1", "True"]),
    (GPT2 | {"n_positions": 2.5}, ["`n_positions`", "an integer from 1", "2.5"]),
    (GPT2 | {"vocab_size": [7]}, ["`vocab_size`", "an integer from 1", "[7]"]),
    (GPT2 | {"layer_norm_epsilon": -1.0}, ["`layer_norm_epsilon`", "positive number", "-1.0"]),
    (GPT2 | {"layer_norm_epsilon": float("nan")}, ["`layer_norm_epsilon`", "positive number", "nan"]),
    (GPT2 | {"layer_norm_epsilon": "1e-5"}, ["`layer_norm_epsilon`", "positive number", "'1e-5'"]),
    (GPT2 | {"eos_token_id": -1}, ["`eos_token_id`", "an integer from 0", "-1"]),
    (GPT2 | {"eos_token_id": [1, "x"]}, ["`eos_token_id`", "an integer from 0", "'x'"]),
    (GPT2 | {"bos_token_id": True}, ["`bos_token_id`", "an integer from 0", "True"]),
    (LLAMA | {"hidden_act": "gelu"}, ["`hidden_act` = 'gelu'", "'silu'", "llama"]),
    (LLAMA | {"pretraining_tp": 2}, ["`pretraining_tp` = 2"]),
    (LLAMA | {"attention_bias": "yes"}, ["`attention_bias`", "true or false", "'yes'"]),
    (LLAMA | {"mlp_bias": 1}, ["`mlp_bias`", "true or false", "got 1"]),
    (LLAMA | {"num_key_value_heads": 5}, ["`num_key_value_heads`", "`num_attention_heads` = 32", "got 5"]),
    (LLAMA | {"rope_theta": "big"}, ["`rope_theta`", "positive number", "'big'"]),
    (LLAMA | {"rope_scaling": "linear"}, ["`rope_scaling`", "object", "'linear'"]),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, ["linear rope scaling", "lacks factor"]),
    (LLAMA | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["rope type 'longrope'", "'default', 'llama3', 'linear'"]),
    (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope type 'dynamic'"]),
    (LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["rope type 'yarn'"]),
    (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["lacks low_freq_factor", "['factor'"]),
    (rope(factor=None), ["lacks factor"]),
    (rope(factor="8"), ["`factor`", "positive number", "'8'"]),
    (rope(original_max_position_embeddings=-1), ["`original_max_position_embeddings`", "an integer from 1", "-1"]),
    (rope(high_freq_factor=1.0), ["`high_freq_factor`", "greater than `low_freq_factor`", "1.0 and 1.0"]),
    (rope(partial_rotary_factor=0.5), ["`partial_rotary_factor` = 0.5", "llama"]),
    ({"model_type": "mistral", "sliding_window": "all"}, ["`sliding_window`", "an integer from 1", "'all'"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "parts"), REFUSED, ids=[" ".join(parts[:2]) for _, parts in REFUSED])
def test_a_refusal_names_the_field_the_value_and_what_is_accepted(fields, parts):
    with pytest.raises(ValueError) as error:
        model_from_config(fields, dtype=jnp.float32)
    for part in parts:
        assert part in str(error.value)


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="`remat` must be one of 'none', 'attention', 'dots', 'layer'; got 'all'"):
        model_from_config(GPT2, dtype=jnp.float32, remat="all")


@pytest.mark.parametrize("ids", [7, [7], [7, 8], None])
def test_end_of_text_may_be_one_id_or_several(ids):
    config = model_from_config(LLAMA | {"eos_token_id": ids}, dtype=jnp.float32).config
    assert config.eos_token_id == (tuple(ids) if isinstance(ids, list) else ids)


def test_modules_of_equal_configs_are_equal(checkpoints):
    """A module is a static argument of jitted functions: equal ones share a compilation."""
    text = (checkpoints["llama"][0] / "config.json").read_text()
    first, second = (model_from_config(json.loads(text), dtype="float32") for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert replace(first, dtype=jnp.bfloat16) != first
