"""What the backward pass calculates again: the same gradients from less memory, as predicted."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plans import prepare
from steps import GPT2, LLAMA, build

import jlora
from jlora.models import REMATS, model_from_config, remat_without_effect, replace
from jlora.models.attention import attention
from jlora.runs.flags import Compute
from jlora.train import predict

SEQ = 160
FIELDS = {
    "llama": LLAMA | {"head_dim": 16, "max_position_embeddings": SEQ, "num_hidden_layers": 2},
    "gpt2": GPT2 | {"n_positions": SEQ, "n_layer": 2},
}
"""Models whose rows are long for their width, so that attention weights are most of what is kept."""


def compiled(fields, stack, remat):
    """(bytes of temporaries, the gradient) of a loss."""
    model, adapter, base = build(fields, stack=stack, remat=remat)
    loss_fn = jlora.train.causal_lm_loss(model)
    ids = np.random.default_rng(0).integers(0, 113, (2, SEQ), np.int32)

    def loss(adapter, base):
        return loss_fn(jlora.combine(adapter, base), {"input_ids": ids, "labels": ids}, None)[0]

    program = jax.jit(jax.grad(loss)).lower(adapter, base).compile()
    return program.memory_analysis().temp_size_in_bytes, program(adapter, base)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("fields", "stack"), [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)])
def test_the_same_gradient_of_less_memory(fields, stack):
    sizes, gradients = zip(*(compiled(FIELDS[fields], stack, remat) for remat in REMATS), strict=True)
    for found in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, gradients[0])
    falling = sizes if stack else sizes[:2]  # unrolled layers of a CPU keep everything: see below
    assert all(less < 0.99 * more for more, less in itertools.pairwise(falling)), sizes


@pytest.mark.slow
def test_each_keeps_less_than_the_one_before():
    kept = []
    for remat in REMATS:
        model, params = prepare(FIELDS["llama"], {}, {"remat": remat})
        kept.append(predict(model, params, optax.sgd(1.0), batch_size=2, length=SEQ).activations)
    assert all(less < 0.9 * more for more, less in itertools.pairwise(kept)), kept


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recomputed_attention_weights_are_the_same(dtype):
    """Gradients are equal to the bit, also in one program with the forward pass, where XLA:CPU merges what is the same."""
    q, k, v = (jax.random.normal(key, (1, 96, 2, 8), dtype) for key in jax.random.split(jax.random.key(0), 3))
    found = []
    for recompute in (False, True):

        def loss(q, recompute=recompute):
            for _ in range(6):
                q = attention(q, k, v, None, recompute=recompute)
            return jnp.sum(jnp.square(q), dtype=jnp.float32)

        program = jax.jit(jax.grad(loss)).lower(q).compile()
        found.append((program.memory_analysis().temp_size_in_bytes, np.asarray(program(q), np.float32)))
    (more, expected), (less, gradient) = found
    np.testing.assert_array_equal(gradient, expected)
    weights = 2 * 96 * 96 * dtype.dtype.itemsize
    assert less < more - 2 * weights, "of six layers, some of which are alive at the peak"


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.few(1)
@pytest.mark.parametrize("remat", REMATS[2:])
def test_unrolled_layers_of_a_cpu_keep_everything_and_that_is_said(tmp_path, call, remat):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS["llama"]))
    flags = ["memory", "--model", str(tmp_path), "--max-length", "32", "--form", "per-layer", "--remat", remat]
    assert f"`remat` '{remat}' has no effect" in " ".join(call(*flags).out.split())
    found = []
    for remat_, stack in (("none", False), (remat, False), (remat, True)):
        model, params = prepare(FIELDS["llama"], {"stack": stack}, {"remat": remat_})
        assert (remat_without_effect(model, stacked=stack, length=32) is None) == (remat_ == "none" or stack)
        found.append(predict(model, params, optax.sgd(1.0), batch_size=2, length=32).activations)
    assert found[0] == found[1] > found[2]


def test_cudnn_keeps_no_weights_and_that_is_said(monkeypatch):
    model = model_from_config(FIELDS["llama"], dtype=jnp.bfloat16, remat="attention")
    assert remat_without_effect(model, stacked=True, length=64) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "cuDNN's attention keeps no weights" in remat_without_effect(model, stacked=True, length=64)
    for changes in ({"dtype": jnp.float32}, {"remat": "dots"}):
        assert remat_without_effect(replace(model, **changes), stacked=True, length=64) is None


def test_offloading_on_a_cpu_has_no_effect_and_that_is_said():
    model, tx = model_from_config(FIELDS["llama"], dtype=jnp.float32), optax.adam(1e-3)
    compute = Compute(offload_optimizer=True)
    assert compute.around(tx, model.dtype) is tx
    (said,) = compute.without_effect(model, stacked=True, length=64)
    assert "`offload_optimizer` has no effect on a CPU" in said
