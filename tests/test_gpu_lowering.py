"""Every path of a GPU lowered for CUDA, where there is none: what `benchmarks/gpu.py` would compile there."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import jlora
from jlora import generation
from jlora.generation import form
from jlora.generation.sampling import Draw
from jlora.models import empty_cache, model_from_config
from jlora.quant.matmul import quantized_matmul
from jlora.runs.flags import Compute
from jlora.train.loss import cross_entropy
from jlora.train.memory import abstract_batch, abstract_state, abstract_tree, predict
from jlora.tree.paths import flatten
from jlora.weight import as_dense

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_models

FUSED = {False: "__cudnn$fmhaSoftmax", True: "__cudnn$fmhaScaleBiasSoftmax"}
"""Whether a mask goes in as a bias -> the name of cuDNN's call."""


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """jlora chooses as on a Hopper GPU with a current cuDNN."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: float(capability) <= 9.0)
    monkeypatch.setattr(
        cudnn, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0", raising=False
    )
    jax.clear_caches()
    yield
    jax.clear_caches()  # what was traced for the GPU must not reach the CPU


def lowered(function, *arguments, **static) -> str:
    function = function if hasattr(function, "trace") else jax.jit(function)
    return function.trace(*arguments, **static).lower(lowering_platforms=("cuda",)).as_text()


def of(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def tree(*, dtype=jnp.bfloat16, nf4=False, stack=True, lora=gpu_models.LORA):
    quantize = jlora.NF4() if nf4 else None
    return abstract_tree(gpu_models.model_of("tiny"), lora, dtype=dtype, quantize=quantize, stack=stack)


def training_step(*, dtype="bfloat16", nf4=False, stack=True, segments=False, remat="none") -> str:
    model = gpu_models.model_of("tiny", dtype=dtype, remat=remat)
    adapter, base = jlora.split(tree(dtype=dtype, nf4=nf4, stack=stack))
    tx = gpu_models.optimizer()
    state = jax.eval_shape(lambda a: jlora.train.init_state(a, tx), adapter)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return lowered(step, state, base, abstract_batch(2, 64, segments=segments), key)


@pytest.mark.few(2)
@pytest.mark.parametrize("segments", [False, True], ids=["one text a row", "packed"])
@pytest.mark.parametrize(("stack", "remat"), [(True, "none"), (True, "layer"), (False, "none")], ids=str)
@pytest.mark.parametrize("nf4", [False, True], ids=["LoRA", "QLoRA"])
def test_a_bfloat16_step_attends_by_cudnn(nf4, stack, remat, segments):
    text = training_step(nf4=nf4, stack=stack, remat=remat, segments=segments)
    layers = 1 if stack else gpu_models.SHAPES["tiny"]["num_hidden_layers"]
    assert text.count(f"{FUSED[segments]}Backward(") == layers, "one backward call a layer"
    assert text.count(f"{FUSED[segments]}(") >= layers
    assert ("tensor<16xf32>" in text) == nf4, "NF4's table"


@pytest.mark.parametrize("segments", [False, True], ids=["one text a row", "packed"])
def test_float32_attends_by_plain_xla(segments):
    text = training_step(dtype="float32", segments=segments)
    assert "fmha" not in text and "stablehlo.exponential" in text


WINDOWED = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
FAMILIES = {
    # fields, (sliding windows of the calls, whether their mask is a bias) per layer, and in a stack
    "mistral": ({"sliding_window": 16}, [(16, False)] * 2, [(16, False)]),
    "qwen3": ({}, [(0, False)] * 2, [(0, False)]),
    "qwen3 with windows": (WINDOWED, [(0, False), (16, False), (16, False)], [(0, True)]),
    "smollm3": ({"num_hidden_layers": 4}, [(0, False)] * 4, [(0, False)]),
    "gemma3_text": ({"sliding_window": 16, "sliding_window_pattern": 2}, [(16, False), (0, False)], [(0, True)]),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("stack", [False, True], ids=["per layer", "stack"])
@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "smollm3", "qwen3 with windows", "qwen3"])
def test_a_step_of_every_family_attends_by_cudnn(family, stack):
    """A window goes to cuDNN as a number; in a stack, whose layers are one program, as a mask where layers differ in it."""
    changes, per_layer, stacked = FAMILIES[family]
    sizes = {name: value for name, value in gpu_models.SHAPES["tiny"].items() if "rope" not in name}
    fields = sizes | {"model_type": family.split(" ")[0], "query_pre_attn_scalar": 64} | changes
    model = model_from_config(fields, dtype=jnp.bfloat16)
    params = abstract_tree(model, gpu_models.LORA, dtype=jnp.bfloat16, quantize=jlora.NF4(), stack=stack)
    adapter, base = jlora.split(params)
    tx = gpu_models.optimizer()
    state = jax.eval_shape(lambda a: jlora.train.init_state(a, tx), adapter)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    text = lowered(step, state, base, abstract_batch(2, 64, segments=False), jax.eval_shape(lambda: jax.random.key(0)))
    backward = r"(__cudnn\$fmhaScaleBias|__cudnn\$fmha)SoftmaxBackward\(.*?sliding_window_length\\22: (\d+)"
    calls = [(int(window), "Bias" in name) for name, window in re.findall(backward, text)]
    assert sorted(calls) == sorted(stacked if stack else per_layer)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("nf4", "stack", "batch"), [(False, True, 1), (True, True, 1), (True, True, 8), (True, False, 1)], ids=str
)
def test_generation(nf4, stack, batch):
    model, params = gpu_models.model_of("tiny"), tree(nf4=nf4, stack=stack, lora=None)
    cache = jax.eval_shape(lambda: empty_cache(model, batch, 64, stacked=stack))
    draw = jax.eval_shape(
        lambda: Draw(jax.random.key(0), jnp.float32(0), jnp.int32(5), jnp.float32(1), jnp.zeros(8, jnp.int32))
    )
    prompts, one, rows = of((batch, 32), jnp.int32), of((), jnp.int32), of((batch,), jnp.int32)
    arguments = model, params, prompts, one, rows, cache, draw
    assert lowered(generation.begin, *arguments)
    state = jax.eval_shape(lambda *a: generation.begin(model, *a), *arguments[1:])
    text = lowered(generation.advance, model, params, state, draw, one)
    assert "stablehlo.while" in text and ("tensor<16xf32>" in text) == nf4


@pytest.mark.few(22)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "spec", [jlora.NF4(double_quant=False), *(make() for make in jlora.quant.SPECS.values())], ids=repr
)
@pytest.mark.parametrize("way", ["reduce", "dequantize"])
def test_quantized_products_and_their_gradient(way, spec, transpose):
    q = jax.eval_shape(lambda w: jlora.quantize(w, spec), of((128, 256)))
    x = of((4, 256 if transpose else 128))

    def both(x, q):
        y, pull = jax.vjp(lambda x: quantized_matmul(way, transpose, x.dtype, x.dtype, x, q), x)
        return y, pull(y)

    assert ("stablehlo.dot_general" in lowered(both, x, q)) == (way == "dequantize")


@pytest.mark.parametrize("transpose", [False, True])
def test_the_chunked_loss_and_its_gradient(transpose):
    vocab, tokens = 512, 1200

    def loss(hidden, head, targets, live):
        return cross_entropy(hidden, head, targets, live, transpose=transpose, chunk=512)

    head = of((vocab, 64) if transpose else (64, vocab))
    arguments = of((tokens, 64)), head, of((tokens,), jnp.int32), of((tokens,), jnp.bool)
    text = lowered(jax.value_and_grad(loss), *arguments)
    assert f"tensor<512x{vocab}xf32>" in text and f"tensor<{tokens}x{vocab}x" not in text


@pytest.mark.few(1)
@pytest.mark.parametrize("nf4", [True, False], ids=["QLoRA", "LoRA"])
@pytest.mark.parametrize("shape", ["1B", "3B", "8B"])
def test_predicted_memory_is_a_little_above_the_measured_peak(shape, nf4):
    """Of a step at the shape of a Llama, as `benchmarks/gpu.py` found it."""
    found = json.loads((Path(__file__).parents[1] / "benchmarks/results/gpu_nvidia_h200.json").read_text())
    named = {row["case"]: row["peak_bytes"] for row in found["sections"]["training"] if "peak_bytes" in row}
    peak = named[f"{shape} {'QLoRA' if nf4 else 'LoRA'} 4x2048 remat none"]
    model, quantize = gpu_models.model_of(shape), jlora.NF4() if nf4 else None
    params = abstract_tree(model, gpu_models.LORA, dtype=jnp.bfloat16, quantize=quantize, stack=True)
    predicted = predict(model, params, gpu_models.optimizer(), batch_size=4, length=2048).peak
    assert 1 < predicted / peak < 1.08, (predicted, peak)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_offloaded_state_comes_for_the_update_and_goes_back(dtype):
    """The moments and nothing else: scalars, the loss scale among them, stay on the device. Donated buffers are used again."""
    model, compute = gpu_models.model_of("tiny", dtype=dtype), Compute(offload_optimizer=True)
    params = tree(dtype=dtype, nf4=True)
    adapter, base = jlora.split(params)
    plain = jlora.train.make_optimizer("adamw8bit", 1e-3, adapter, max_grad_norm=1.0)
    tx = compute.around(plain, model.dtype)
    state = abstract_state(adapter, tx)
    step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    text = lowered(step, state, base, abstract_batch(2, 64), jax.eval_shape(lambda: jax.random.key(0)))
    kinds = {"float32": "f32", "uint8": "ui8", "int32": "i32"}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    types = sorted("x".join([*map(str, x.shape), kinds[x.dtype.name]]) for x in moments)
    assert {x.dtype.name for x in moments} >= {"uint8", "float32"} and len(types) > 4 * 7
    for place in ("device", "pinned_host"):
        call = rf'@annotate_device_placement\(.*_xla_buffer_placement = "{place}".*-> tensor<(.*)>'
        assert sorted(re.findall(call, text)) == types
    signature = next(line for line in text.splitlines() if "@main" in line)
    taken, given = signature.split(") -> (")
    assert taken.count('"pinned_host"') == given.count('"pinned_host"') == len(types)
    host = [argument for argument in taken.split("%arg") if '"pinned_host"' in argument]
    assert all("tf.aliasing_output" in argument for argument in host)
    # As predicted: what is on the host is not on the device.
    sizes = [predict(model, params, each, batch_size=2, length=64) for each in (plain, tx)]
    assert sizes[0].host == 0 and sizes[1].host == sum(x.size * x.dtype.itemsize for x in moments)
    assert sizes[0].peak - sizes[0].optimizer == sizes[1].peak - sizes[1].optimizer
    assert sizes[1].optimizer < 1024 and not list(compute.without_effect(model, stacked=True, length=64))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("batch", "room", "packed", "apart"), [(8, 1e9, False, True), (1, 1e9, True, True), (8, 0.0, True, False)]
)
def test_the_form_for_decoding(monkeypatch, batch, room, packed, apart):
    """Layers apart, and packed kernels decoded once where a few rows would decode them for each token, if it fits."""
    model = gpu_models.model_of("tiny")
    params = gpu_models.random_params(model, nf4=True)
    monkeypatch.setattr(form, "_free_device_bytes", lambda: room)
    same, made = generation.for_decoding(model, params, batch=batch)
    assert same is model and jlora.lora.is_stacked(made) != apart
    kernels = [leaf for path, leaf in flatten(made).items() if path.endswith("up_proj/kernel")]
    assert [isinstance(leaf, jlora.QuantizedTensor) for leaf in kernels] == [packed] * (2 if apart else 1)
    if apart:
        expected = jlora.unstack_layers(params)
        for path, leaf in flatten(made).items():
            np.testing.assert_array_equal(as_dense(leaf, jnp.bfloat16), as_dense(flatten(expected)[path], jnp.bfloat16))
        again = generation.for_decoding(model, made, batch=batch)[1]
        leaves = zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True)
        assert all(a is b for a, b in leaves), "nothing is copied twice"
    else:
        assert made is params
