"""Every family beside transformers and PEFT: what their layers differ in, in both execution forms, beyond their windows."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from oracles import VOCAB, dequantized_logits, load_4bit, make_torch_model, quantized_by_transformers, torch_logits
from trees import perturbed

import jlora
from jlora.models import FAMILIES, family_of, model_from_config, replace
from jlora.models.attention import attention
from jlora.models.context import LayerKind
from jlora.models.rope import Rope

pytestmark = pytest.mark.usefixtures("quick_compilation")

LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
WINDOW = 8
VARIANTS = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral, tied": ("mistral", {"sliding_window": WINDOW, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "smollm3": ("smollm3", {}),
    "smollm3, untied, windows": ("smollm3", {
        "tie_word_embeddings": False, "no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW,
        "mlp_bias": True, "attention_bias": True,
    }),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text, untied, caps": ("gemma3_text", {
        "tie_word_embeddings": False, "final_logit_softcapping": 5.0, "rope_parameters": LINEAR,
        "layer_types": ["full_attention", *3 * ["sliding_attention"]],
    }),
}  # fmt: skip
ONE_EACH = ("gemma3_text", "smollm3", "qwen3", "mistral")
IDS = np.random.default_rng(0).integers(2, VOCAB, (2, 40))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """variant -> (directory, transformers model, our model, per-layer float32 parameters), made once each."""
    made = {}

    def get(variant):
        if variant not in made:
            family, changes = VARIANTS[variant]
            oracle, directory = make_torch_model(family, **changes), tmp_path_factory.mktemp("family")
            # Several shards for those with a head of their own.
            oracle.save_pretrained(directory, max_shard_size="1GB" if oracle.config.tie_word_embeddings else "60KB")
            made[variant] = directory, oracle, *jlora.load(directory, dtype=jnp.float32)
        return made[variant]

    return get


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params, ids, **kwargs):
    return model.apply({"params": params}, ids, **kwargs)


def forms(params):
    return {"per layer": params, "stacked": jlora.stack_layers(params)}


# Reading and writing


@pytest.mark.few(5)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, loaded):
    directory, oracle, model, params = loaded(variant)
    expected = torch_logits(oracle, IDS)
    assert np.ptp(expected) > 5, "the comparison means nothing on flat logits"
    assert len(list(directory.glob("*.safetensors"))) > (not oracle.config.tie_word_embeddings)
    for tree in (params, jlora.load(directory, dtype=jnp.float32, stack=True)[1]):
        np.testing.assert_allclose(apply(model, tree, IDS), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("qwen3", {"rms_norm_eps": 1e-1}),
        ("qwen3, windows", {"max_window_layers": 2}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
        ("gemma3_text", {"sliding_window": WINDOW + 1}),
        ("gemma3_text", {"query_pre_attn_scalar": 16}),
        ("gemma3_text", {"layer_types": ["full_attention", *3 * ["sliding_attention"]]}),
        ("gemma3_text, untied, caps", {"final_logit_softcapping": None}),
        ("gemma3_text, untied, caps", {"rope_parameters": LINEAR | {"full_attention": LINEAR["sliding_attention"]}}),
    ],
)
def test_these_fields_change_the_logits_beyond_the_tolerance(variant, changes, loaded):
    family, fields = VARIANTS[variant]
    other = make_torch_model(family, **(fields | changes))
    assert np.abs(torch_logits(other, IDS) - torch_logits(loaded(variant)[1], IDS)).max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_transformers_and_we_read(variant, loaded, tmp_path):
    directory, oracle, model, params = loaded(variant)
    for name, base in (("new", None), ("base", directory)):
        jlora.save_pretrained(tmp_path / name, model, params, base=base, max_shard_bytes=60_000)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert type(again) is type(oracle)
        np.testing.assert_allclose(torch_logits(again, IDS), torch_logits(oracle, IDS), atol=1e-5)
        assert jlora.load(tmp_path / name, dtype=jnp.float32)[0].config == model.config
    written = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "base", directory))
    assert next(written) == next(written)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_defaults_is_transformers_both_ways(family):
    config = model_from_config({"model_type": family}, dtype=jnp.float32).config
    written = family_of(config).write(config)
    assert model_from_config(written, dtype=jnp.float32).config == config
    theirs = type(transformers.AutoConfig.for_model(family)).from_dict(written)
    default = transformers.AutoConfig.for_model(family)
    for name in ("sliding_window", "layer_types", "no_rope_layers", "rope_parameters", "query_pre_attn_scalar"):
        assert getattr(theirs, name, None) == getattr(default, name, None), name
    assert transformers.AutoModelForCausalLM._model_mapping[type(default)].__name__ == FAMILIES[family].architecture


GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 8}


@pytest.mark.parametrize(
    ("fields", "global_rope", "local"),
    [
        ({}, Rope(1e6, None), 1e4),
        ({"rope_theta": 5e5, "rope_local_base_freq": 2e4}, Rope(5e5, None), 2e4),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, Rope(1e6, (8.0,)), 1e4),
        ({"rope_parameters": LINEAR}, Rope(5e4, (4.0,)), 500.0),
        ({"rope_parameters": {"full_attention": None}}, Rope(1e6, None), 1e4),
    ],
)
def test_both_spellings_of_gemmas_two_rotations(fields, global_rope, local):
    config = model_from_config(GEMMA | fields, dtype=jnp.float32).config
    assert config.kinds == (*5 * (LayerKind(4096, Rope(local, None)),), LayerKind(None, global_rope), config.kinds[0])
    theirs = transformers.Gemma3TextConfig(**{k: v for k, v in (GEMMA | fields).items() if k != "model_type"})
    assert theirs.rope_parameters["full_attention"]["rope_theta"] == global_rope.theta
    assert theirs.rope_parameters["sliding_attention"]["rope_theta"] == local


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (GEMMA | {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping` = 50.0"),
        (GEMMA | {"use_bidirectional_attention": True}, "`use_bidirectional_attention` = True"),
        (GEMMA | {"hidden_activation": "silu"}, "`hidden_activation` = 'silu'"),
        (GEMMA | {"final_logit_softcapping": -1.0}, "`final_logit_softcapping`"),
        (GEMMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "must have an object for"),
        (GEMMA | {"rope_parameters": LINEAR | {"sliding_attention": LINEAR["full_attention"]}}, "scales the rotation"),
        (GEMMA | {"sliding_window": None}, "no `sliding_window` that is used"),
        ({"model_type": "gemma3"}, "jlora runs gpt2, llama, qwen2, mistral, qwen3, smollm3, gemma3_text"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "`no_rope_layers` = [1, 0]"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 0}, "`sliding_window`"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, says):
    with pytest.raises(ValueError) as error:
        model_from_config(fields, dtype=jnp.float32)
    assert says in str(error.value)


# Attention


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_window_of_attention_is_its_mask_forward_and_backward(dtype):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 12, heads, 8), dtype) for i, heads in enumerate((4, 2, 2)))
    distance = np.arange(12)[:, None] - np.arange(12)
    for window in (1, 5, 12, 30):
        mask = jnp.asarray((distance >= 0) & (distance < window))[None]

        def value_and_grad(**options):
            return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(attention(*x, **options).astype(jnp.float32))))(
                (q, k, v)
            )

        got, expected = value_and_grad(mask=None, window=window, scale=0.3), value_and_grad(mask=mask, scale=0.3)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got, expected)
        scaled = np.abs(np.asarray(got[0]) - np.asarray(value_and_grad(mask=mask)[0])) > 1e-3
        assert scaled == (window > 1), "one key has all the weight"


@pytest.mark.slow
def test_families_without_windows_keep_the_mask_free_attention():
    """Long rows of them must not get a mask of seq x seq that a fused kernel would have to read."""
    for variant, masks in (("qwen3", 0), ("smollm3", 0), ("gemma3_text", 1)):
        family, changes = VARIANTS[variant]
        fields = make_torch_model(family, **changes).config.to_dict()
        model = model_from_config(fields, dtype=jnp.float32)
        ids = jnp.zeros((1, 33), jnp.int32)
        params = jlora.stack_layers(model.init(jax.random.key(0), ids)["params"])
        program = str(jax.make_jaxpr(lambda p, model=model, ids=ids: model.apply({"params": p}, ids))(params))
        # A stack of masks, one a kind of layer, exists in families whose layers differ in their windows alone.
        assert ("bool[2,1,33,33]" in program) == bool(masks), variant


# Packing and padding

SEGMENTS = np.array([[1] * 17 + [2] * 5 + [3] * 12 + [0] * 6, [5] * 4 + [2] * 28 + [0] * 8], np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v in ONE_EACH or "windows" in v])
def test_each_segment_equals_the_segment_alone(variant, loaded):
    _, _, model, params = loaded(variant)
    for tree in forms(params).values():
        packed = apply(model, tree, IDS, segment_ids=SEGMENTS)
        assert np.isfinite(packed).all()
        for row in range(2):
            for name in set(SEGMENTS[row]) - {0}:
                span = np.flatnonzero(SEGMENTS[row] == name)
                alone = np.pad(IDS[row, span], (0, 40 - len(span)))[None]
                np.testing.assert_allclose(packed[row, span], apply(model, tree, alone)[0, : len(span)], atol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("variant", ONE_EACH)
def test_padding_on_the_left_is_that_of_transformers(variant, loaded):
    _, oracle, model, params = loaded(variant)
    mask = np.ones_like(IDS)
    mask[1, :13] = 0
    positions = np.broadcast_to(np.arange(40), IDS.shape)
    expected = torch_logits(oracle, IDS, attention_mask=mask, position_ids=positions)
    for tree in forms(params).values():
        logits = apply(model, tree, IDS, attention_mask=mask)
        np.testing.assert_allclose(logits[0], expected[0], atol=1e-4)
        np.testing.assert_allclose(logits[1, 13:], expected[1, 13:], atol=1e-4)


# Training


@pytest.mark.few(1)
@pytest.mark.parametrize("variant", ["gemma3_text, untied, caps", *ONE_EACH])
def test_loss_and_gradients_are_those_of_peft(variant, loaded, tmp_path):
    """On linear kernels and, where Gemma scales it, on the embedding; in both forms, the stack's layers rematerialized."""
    directory, _, model, params = loaded(variant)
    family, changes = VARIANTS[variant]
    targets = ["q_proj", "k_proj", "o_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=True)
    theirs = peft.get_peft_model(make_torch_model(family, **changes), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    labels = np.where(np.random.default_rng(1).random(IDS.shape) < 0.7, IDS, -100)
    loss = theirs(torch.tensor(IDS), labels=torch.tensor(labels)).loss
    loss.backward()
    gradients = {
        name.removesuffix(".weight").replace(".default", ""): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    batch = {"input_ids": IDS, "labels": labels}
    adapted = jlora.load_adapter(tmp_path, params)
    assert len(jlora.lora.adapted_modules(adapted)) * 2 == len(gradients) > 8
    for remat, tree in zip(("none", "layer"), forms(adapted).values(), strict=True):
        adapter, base = jlora.split(tree)
        lossy = jlora.train.causal_lm_loss(replace(model, remat=remat))

        def mean(adapter, base=base, lossy=lossy):
            total, count = lossy(jlora.combine(adapter, base), batch, None)
            return total / count

        ours, gradient = jax.jit(jax.value_and_grad(mean))(adapter)
        assert abs(float(ours) - loss.item()) < 1e-4
        whole = jlora.combine(gradient, base)
        if jlora.lora.is_stacked(whole):
            whole = jlora.unstack_layers(whole)
        for module, weight in jlora.lora.adapted_modules(whole).items():
            for half in ("A", "B"):
                name = "lora_embedding_" if module.endswith("embed_tokens") else "lora_"
                expected = gradients[f"base_model.model.{module}.{name}{half}"]
                got = np.asarray(getattr(weight, f"lora_{half}")).T
                np.testing.assert_allclose(got, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


# Generation


# Gemma with its head tied repeats the last token: random embeddings, scaled up, outweigh two layers.
GENERATING = [v for v in reversed(VARIANTS) if v in ("mistral", "qwen3", "smollm3") or "windows" in v or "caps" in v]


@pytest.mark.slow
@pytest.mark.parametrize("variant", GENERATING)
def test_greedy_continuations_beyond_the_window_are_those_of_transformers(variant, loaded):
    _, oracle, model, params = loaded(variant)
    prompts = [IDS[0, :21].tolist(), IDS[1, :3].tolist()]
    expected = []
    for prompt in prompts:
        out = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert len(set(map(tuple, expected))) == 2 and len(set(expected[0])) > 3
    for tree in forms(params).values():
        assert jlora.generate(model, tree, prompts, max_new_tokens=24, temperature=0.0, eos_token_id=[]) == expected


# Packed bases, and functions that know nothing of our values


@pytest.mark.slow
@pytest.mark.parametrize("variant", ONE_EACH)
def test_a_packed_base_under_wrap_is_the_explicit_path(variant, loaded, tmp_path):
    directory, _, model, _ = loaded(variant)
    _, packed = jlora.load(directory, dtype=jnp.float32, quantize=jlora.NF4(block_size=32))
    jlora.save_quantized(tmp_path, model, packed)
    reread = jlora.load(tmp_path, dtype=jnp.float32)[1]
    np.testing.assert_array_equal(apply(model, reread, IDS), apply(model, packed, IDS))
    packed = jlora.stack_layers(packed)
    params = perturbed(jlora.add_lora(packed, jlora.LoraConfig(rank=2, targets="all-linear"), key=jax.random.key(0)))
    adapter, base = jlora.split(params)
    wrapped = jlora.wrap(model.apply)
    report = wrapped.check({"params": params}, IDS)
    assert report.ok and not report.materialized, str(report)

    def value_and_grad(f):
        def loss(adapter):
            return jnp.mean(jnp.square(f({"params": jlora.combine(adapter, base)}, IDS)))

        return jax.jit(jax.value_and_grad(loss))(adapter)

    for a, b in zip(*map(jax.tree.leaves, map(value_and_grad, (wrapped, model.apply))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(np.abs(b).max())))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ONE_EACH)
def test_a_packed_checkpoint_is_bitsandbytes_own(variant, tmp_path):
    """Packed here, unpacked there; and packed there, read here. In widths that are multiples of bitsandbytes' blocks."""
    family, changes = VARIANTS[variant]
    oracle = make_torch_model(family, **changes, hidden_size=64, intermediate_size=128, head_dim=16)
    oracle.save_pretrained(tmp_path / "dense")
    model, packed = jlora.load(tmp_path / "dense", dtype=jnp.float32, quantize=jlora.NF4(block_size=64))
    jlora.save_quantized(tmp_path / "ours", model, packed)
    logits = apply(model, packed, IDS)
    np.testing.assert_allclose(logits, dequantized_logits(load_4bit(tmp_path / "ours"), IDS), atol=1e-3)
    theirs = quantized_by_transformers(tmp_path / "dense")
    theirs.save_pretrained(tmp_path / "theirs")
    read = jlora.load(tmp_path / "theirs", dtype=jnp.float32)[1]
    np.testing.assert_allclose(apply(model, read, IDS), dequantized_logits(theirs, IDS), atol=1e-3)
