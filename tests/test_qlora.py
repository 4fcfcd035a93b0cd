"""QLoRA: 4-bit checkpoints from and to bitsandbytes, and a training step in which the model is never dense."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from jaxprs import walk
from oracles import (
    FAMILIES,
    VOCAB,
    dequantized_logits,
    load_4bit,
    make_torch_model,
    quantized_by_transformers,
    torch_logits,
)
from safetensors.numpy import load_file, save_file

import jlora
from jlora.quant.tensor import QuantizedTensor
from jlora.tree.paths import flatten
from jlora.wrapping.liveness import scan_counts

pytestmark = pytest.mark.usefixtures("quick_compilation")
IDS = np.random.default_rng(3).integers(0, VOCAB, (2, 9))
# Every kernel's input divides into blocks of 64: where blocks straddle rows, bitsandbytes 0.50.2 decodes wrongly on CPU
# (see test_quant.py), so that its logits are no oracle.
_LLAMA = {"hidden_size": 64, "intermediate_size": 128}
CHANGES = {"gpt2": {"n_embd": 64}, "llama": _LLAMA, "qwen2": _LLAMA}
LINEAR = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def our_logits(model, params):
    return np.asarray(model.apply({"params": params}, jnp.asarray(IDS)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """family -> directory of a dense checkpoint."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(f"dense-{family}")
        make_torch_model(family, **CHANGES[family]).save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def four_bit(dense, tmp_path_factory):
    """family -> (dense directory, directory that transformers wrote in 4 bits, its model)."""
    made = {}
    for family in FAMILIES:
        theirs = quantized_by_transformers(dense[family])
        directory = tmp_path_factory.mktemp(f"bnb-{family}")
        theirs.save_pretrained(directory)
        made[family] = dense[family], directory, theirs
    return made


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
def test_a_checkpoint_of_transformers_gives_its_logits(four_bit, family, stack):
    _, directory, theirs = four_bit[family]
    model, params = jlora.load(directory, dtype=jnp.float32, stack=stack)
    assert sum(isinstance(leaf, jlora.NF4Tensor) for leaf in flatten(params).values()) >= 4
    np.testing.assert_allclose(our_logits(model, params), dequantized_logits(theirs, IDS), atol=1e-4)


@pytest.mark.slow
def test_without_double_quantization_and_in_bfloat16(dense, family, tmp_path):
    theirs = quantized_by_transformers(dense[family], dtype=torch.bfloat16, double_quant=False)
    theirs.save_pretrained(tmp_path / "bnb")
    # The same weights, which decode to bfloat16, under float32 activations: bfloat16 sums differ by their order.
    for module in theirs.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    for parameter in theirs.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    model, params = jlora.load(tmp_path / "bnb", dtype=jnp.float32)
    weights = [leaf for leaf in flatten(params).values() if isinstance(leaf, jlora.NF4Tensor)]
    assert all(w.dtype == jnp.bfloat16 and not w.double_quant for w in weights)
    np.testing.assert_allclose(our_logits(model, params), dequantized_logits(theirs, IDS), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True])
def test_a_checkpoint_of_ours_loads_in_transformers(four_bit, family, stack, tmp_path):
    dense, directory, theirs = four_bit[family]
    model, params = jlora.load(dense, dtype=jnp.float32, quantize=jlora.NF4(), stack=stack)
    jlora.save_quantized(tmp_path / "ours", model, params, max_shard_bytes=20_000)
    back = load_4bit(tmp_path / "ours")
    kinds = [type(m).__name__ for m in back.modules()]
    assert kinds.count("Linear4bit") == [type(m).__name__ for m in theirs.modules()].count("Linear4bit")
    ours, reference = dequantized_logits(back, IDS), dequantized_logits(theirs, IDS)
    np.testing.assert_allclose(ours, our_logits(model, params), atol=1e-4)
    stored = {}
    for where in (tmp_path / "ours", directory):
        files = [load_file(f) for f in sorted(where.glob("*.safetensors"))]
        stored[where] = {name: tensor for file in files for name, tensor in file.items()}
    a, b = stored.values()
    extra = {n.replace("lm_head", "") for n in set(a) ^ set(b)}
    assert extra <= {".weight"}, "a tied head may be stored or not"
    blocks = different = 0
    for name in set(a) & set(b):
        if a[name].dtype == np.uint8 and name.endswith(".absmax"):
            difference = np.abs(a[name].astype(int) - b[name].astype(int))
            assert difference.max() <= 1
            blocks, different = blocks + difference.size, different + np.count_nonzero(difference)
        elif "quant_state" in name:
            mine, its = (json.loads(x.tobytes()) for x in (a[name], b[name]))
            assert abs(mine.pop("nested_offset") - its.pop("nested_offset")) < 1e-6
            assert mine == its
        elif name.endswith("nested_absmax"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
        else:
            np.testing.assert_array_equal(a[name], b[name])
    assert different <= max(2, 0.005 * blocks)
    # One code is 1/128 of the spread of the absmax.
    np.testing.assert_allclose(ours, reference, atol=0.05 if different else 1e-4)
    again_model, again = jlora.load(tmp_path / "ours", dtype=jnp.float32)
    np.testing.assert_array_equal(
        our_logits(again_model, again), our_logits(*jlora.load(tmp_path / "ours", dtype=jnp.float32))
    )
    with pytest.raises(FileExistsError):
        jlora.save_quantized(tmp_path / "ours", model, params)


@pytest.mark.slow
def test_loading_quantized_is_quantizing_what_is_loaded(checkpoint):
    directory, _ = checkpoint
    for spec in (jlora.NF4(), jlora.Int8(), jlora.Int4(block_size=32)):
        for stack in (False, True):
            _, packed = jlora.load(directory, dtype=jnp.float32, quantize=spec, stack=stack)
            _, dense = jlora.load(directory, dtype=jnp.float32, stack=stack)
            other = jlora.quantize_params(dense, spec)
            assert jax.tree.structure(packed) == jax.tree.structure(other)
            jax.tree.map(np.testing.assert_array_equal, packed, other)


def test_what_a_4_bit_checkpoint_may_not_be(four_bit, tmp_path):
    dense, directory, _ = four_bit["llama"]
    with pytest.raises(ValueError, match="quantized already"):
        jlora.load(directory, quantize=jlora.Int8())
    jlora.load(directory, quantize=jlora.NF4())  # what it is
    name = "model.layers.0.mlp.up_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"

    def state_with(**changes):
        def change(tensors):
            fields = json.loads(tensors[state].tobytes()) | changes
            tensors[state] = np.frombuffer(json.dumps(fields).encode(), np.uint8).copy()

        return change

    def without(suffix):
        return lambda tensors: tensors.pop(name + suffix)

    def changed(suffix, value):
        return lambda tensors: tensors.__setitem__(name + suffix, value(tensors[name + suffix]))

    cases = [
        (without(".absmax"), "missing: model.layers.0.mlp.up_proj.weight.absmax"),
        (without(".quant_map"), "missing: .*quant_map"),
        (changed(".quant_map", lambda x: x * 2), "another code table"),
        (changed(".nested_quant_map", lambda x: x + 1), "another code table"),
        (changed("", lambda x: x[:-1]), "shape: "),
        (changed(".absmax", lambda x: x.astype(np.float32)), "dtype: .*absmax is F32, should be U8"),
        (state_with(shape=[1, 2]), r"quantized from \(1, 2\)"),
        (state_with(quant_type="fp4"), "fp4"),
        (state_with(blocksize=63), "`blocksize` must be 32 or 64"),
        (state_with(nested_blocksize=128), "`nested_blocksize` must be 256"),
        (changed(".quant_state.bitsandbytes__nf4", lambda x: x[:20].copy()), "is not valid JSON"),
        (lambda t: t.__setitem__(name + ".quant_state.bitsandbytes__fp4", t.pop(state)), "bitsandbytes__fp4"),
    ]
    for change, words in cases:
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        where.mkdir()
        tensors = {n: x.copy() for n, x in load_file(directory / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
        (where / "config.json").write_text((directory / "config.json").read_text())
        with pytest.raises(ValueError, match=words):
            jlora.load(where)
    config = json.loads((directory / "config.json").read_text())
    for quantization in ({"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "awq"):
        (where / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(ValueError, match="quantized"):
            jlora.load(where)


def test_what_save_quantized_refuses(checkpoints, tmp_path):
    model, params = jlora.load(checkpoints["llama"][0], quantize=jlora.NF4())
    adapted = jlora.add_lora(params, jlora.LoraConfig(rank=2), key=jax.random.key(0))
    for bad, words in (
        (adapted, "LoraWeight"),
        (jlora.merge(params), "no NF4 weight"),
        (jlora.load(checkpoints["llama"][0], quantize=jlora.Int8())[1], "QuantizedTensor"),
    ):
        with pytest.raises(ValueError, match=words):
            jlora.save_quantized(tmp_path / "x", model, bad)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["gpt2", "llama"])
def test_twenty_qlora_steps_follow_peft_and_bitsandbytes(four_bit, trained, tmp_path):
    """From the same 4-bit bytes, adapter and batches.

    Tolerance 1e-3 nats, that of the dense test: the decoded weights are equal to the bit, so that only the order of float32
    sums differs, which twenty steps of Adam amplify.
    """
    _, directory, _ = four_bit[trained]
    base = load_4bit(directory)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR.get(trained, LLAMA_LINEAR), lora_dropout=0.0)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), config)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(2)
    batches = [rng.integers(0, VOCAB // 4, (4, 16)) for _ in range(20)]
    theirs.train()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01)
    expected = []
    for ids in batches:
        loss = theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())

    for stack in (True, False):
        model, params = jlora.load(directory, dtype=jnp.float32, stack=stack)
        adapter, frozen = jlora.split(jlora.load_adapter(tmp_path, params))
        before = jax.tree.map(np.array, frozen)
        tx = optax.adamw(5e-3, weight_decay=0.01)
        state = jlora.train.init_state(adapter, tx)
        step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
        losses = []
        for ids in batches:
            state, metrics = step(state, frozen, {"input_ids": ids, "labels": ids}, jax.random.key(0))
            losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(losses, expected, atol=1e-3)
        assert losses[-1] < losses[0] - 0.1
        jax.tree.map(np.testing.assert_array_equal, before, frozen)


# ---- the step: nothing dense outlives its use (the names T1 to T6 are those of the comments below) --------------------

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
FIELDS = {"model_type": "llama", "vocab_size": 61, "max_position_embeddings": 64, **WIDTHS}
KERNELS = {(256, 256), (256, 768), (768, 256)}


def qlora(
    depth=2, *, stack=True, dtype=jnp.float32, remat="none", spec=None, accumulate=1, length=4, kind=None, **widths
):
    from jlora.models import model_from_config

    model = model_from_config(FIELDS | {"num_hidden_layers": depth} | widths, dtype=dtype, remat=remat)
    params = jlora.cast(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"], dtype)
    params = jlora.stack_layers(params) if stack else params
    params = jlora.quantize_params(params, spec or jlora.NF4())
    config = jlora.LoraConfig(rank=3, **kind or {})
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(1)))
    tx = optax.adam(1e-3)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx, accumulate=accumulate)
    ids = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    args = (jlora.train.init_state(adapter, tx), base, {"input_ids": ids, "labels": ids}, jax.random.key(0))
    return step, args


def packed(args):
    leaves = (getattr(w, "base", w) for w in flatten(args[1]).values())
    return [w for w in leaves if isinstance(w, QuantizedTensor)]


def is_float(aval):
    return jnp.issubdtype(aval.dtype, jnp.floating)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_scan_stacks_dense_layers(remat, accumulate):
    """T1: autodiff would keep every unpacked kernel as a residual [layers, …]; T5 and T10: nor is a gradient of one made."""
    step, args = qlora(remat=remat, accumulate=accumulate)
    equations = list(walk(jax.make_jaxpr(step)(*args).jaxpr))
    scans = [e for e in equations if e.primitive.name == "scan"]
    assert len(scans) >= 2
    sizes = {a * b for a, b in KERNELS}
    for eqn in scans:
        big = [v.aval for v in eqn.outvars if is_float(v.aval) and v.aval.size >= min(sizes)]
        assert not big, big
    dots = [e.outvars[0].aval for e in equations if e.primitive.name == "dot_general"]
    assert dots and not [a for a in dots if tuple(a.shape[-2:]) in KERNELS]


@pytest.mark.slow
@pytest.mark.parametrize("stack", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        pytest.param(jnp.float32, {}, id="float32", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, {}, id="bfloat16"),
        pytest.param(jnp.float32, {"use_dora": True}, id="dora", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_by_dense_layers(dtype, kind, stack):
    """T1 on the compiler's plan: twice the layers cost less than a tenth of their dense weights.

    Unrolled (T2), the scheduler would unpack every kernel at the start, were it not for the dependence on x.
    """
    temps = []
    for depth in (2, 4):
        step, args = qlora(
            depth, stack=stack, dtype=dtype, length=2, kind=kind, hidden_size=512, intermediate_size=1536
        )
        plan = step.lower(*args).compile().memory_analysis()
        temps.append(plan.temp_size_in_bytes)
        # T3: packed weights are arguments, not constants.
        assert plan.argument_size_in_bytes >= sum(q.nbytes for q in packed(args))
        # T6: the adapter and the optimizer's state are donated, the base is not.
        assert plan.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(args[0]))
    layer = sum(q.size // 4 for q in packed(args)) * jnp.dtype(dtype).itemsize
    assert (temps[1] - temps[0]) / 2 < layer / 10


@pytest.mark.slow
def test_constants_are_small_and_lookups_unchecked():
    """T3: no packed weight is a constant of the graph. T8: the code table is read without NaN fill."""
    step, args = qlora(dtype=jnp.bfloat16)
    closed = jax.make_jaxpr(step)(*args)
    assert sum(np.asarray(c).nbytes for c in closed.consts) < 1e5
    tables = [
        e
        for e in walk(closed.jaxpr)
        if e.primitive.name == "gather"
        and e.invars[0].aval.shape[:1] in ((16,), (256,))
        and e.invars[0].aval.size <= 512
    ]
    assert tables
    for eqn in tables:
        assert eqn.params["mode"] in (jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS, jax.lax.GatherScatterMode.CLIP)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [True, False])
def test_bfloat16_dots_have_operands_of_one_dtype(stack):
    """T4."""
    step, args = qlora(dtype=jnp.bfloat16, stack=stack)
    dots = [e for e in walk(jax.make_jaxpr(step)(*args).jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) > 10
    for eqn in dots:
        assert eqn.invars[0].aval.dtype == eqn.invars[1].aval.dtype


@pytest.mark.slow
def test_forward_and_backward_unpack_separately():
    """T2: in unrolled layers, common subexpressions would be shared and every dense kernel live from forward to backward."""
    step, args = qlora(stack=False)
    equations = list(walk(jax.make_jaxpr(step)(*args).jaxpr))
    kernels = len(packed(args))
    # The first layer's q, k, v need no gradient of their input; each other kernel is unpacked twice, and each time only
    # when the other operand is there: test_memory_does_not_grow_by_dense_layers shows that it works.
    for primitive in ("optimization_barrier", "gt"):
        assert sum(e.primitive.name == primitive for e in equations) >= 2 * kernels - 3


@pytest.mark.few(1)
@pytest.mark.parametrize("spec", [jlora.NF4(), jlora.Q5_1()], ids=str)
def test_a_scan_that_is_differentiated_has_no_arrays_of_constants(spec):
    """JAX takes out of it what depends on no operand: the table of values became an array of the kernel's size for each."""
    w = jlora.quantize(jax.random.normal(jax.random.key(0), (3, 128, 128)), spec)

    def loss(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jlora.linear(x, w), None), x, w)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 128)), w)
    scans = [e for e in walk(jaxpr.jaxpr) if e.primitive.name == "scan"]
    assert len(scans) == 2
    for eqn in scans:
        assert all(v.aval.size in (1, 256) for v in eqn.invars[: scan_counts(eqn)[0]])  # 256: the dynamic map


@pytest.mark.slow
def test_the_base_is_usable_after_a_step():
    """T6: the base is never donated."""
    step, args = qlora()
    step(*args)
    assert not any(x.is_deleted() for x in jax.tree.leaves(args[1]))


@pytest.mark.slow
def test_both_forms_and_remat_take_the_same_step():
    losses = []
    for stack, remat in ((True, "none"), (False, "none"), (True, "layer"), (False, "layer")):
        step, args = qlora(stack=stack, remat=remat)
        state, metrics = step(*args)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    np.testing.assert_allclose(losses, [losses[0]] * 4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [make() for make in jlora.quant.SPECS.values()], ids=lambda s: s.name)
def test_every_format_trains(spec):
    step, (state, base, batch, key) = qlora(spec=spec)
    losses = []
    for _ in range(8):
        state, metrics = step(state, base, batch, key)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_generation_from_a_quantized_model(four_bit, family):
    _, directory, theirs = four_bit[family]
    model, params = jlora.load(directory, dtype=jnp.float32)
    tokens = jlora.generate(model, params, IDS.tolist(), max_new_tokens=6, temperature=0, eos_token_id=None)
    merged = jlora.generate(
        model, jlora.merge(params), IDS.tolist(), max_new_tokens=6, temperature=0, eos_token_id=None
    )
    assert tokens == merged


@pytest.mark.slow
def test_merging_an_adapter_on_a_quantized_base(four_bit, tmp_path):
    """float32 on the dequantized base; transformers reads the dense result."""
    _, directory, _ = four_bit["llama"]
    model, params = jlora.load(directory, dtype=jnp.float32)
    params = jlora.add_lora(params, jlora.LoraConfig(rank=2), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    params = jlora.combine(jax.tree.map(lambda x: x + 0.01, adapter), base)
    jlora.save_pretrained(tmp_path, model, params)
    back = make_torch_model("llama").from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(torch_logits(back, IDS), our_logits(model, params), atol=1e-4)
