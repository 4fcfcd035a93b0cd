"""What a batch may hold: keys, shapes, dtypes and numbers, against transformers' own losses; and what it costs to look."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening

import jlora
from jlora.train import causal_lm_loss, evaluate, init_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODELS = {name: f"examples/assets/{name}" for name in ("tiny-gpt2", "tiny-llama")}
A, B = [50, 60, 70, 80, 90, 100], [200, 210, 220, 230]


@functools.cache
def loaded(name):
    return jlora.load(MODELS[name], dtype="float32")


@functools.cache
def in_torch(name):
    return transformers.AutoModelForCausalLM.from_pretrained(MODELS[name], dtype=torch.float32).eval()


def loss(name="tiny-gpt2", **batch):
    """(summed loss, supervised tokens) of arrays or lists."""
    model, params = loaded(name)
    total, tokens = causal_lm_loss(model)(params, {k: np.asarray(v) for k, v in batch.items()}, None)
    return float(total), int(tokens)


def theirs(name, **batch):
    """transformers' logits, and its summed loss."""
    with torch.no_grad():
        out = in_torch(name)(
            **{k: torch.tensor(v) for k, v in batch.items()}, use_cache=False
        )  # with one it sees no borders
        labels = torch.tensor(batch["labels"])[:, 1:]
        total = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
        assert float(total) == pytest.approx(float(out.loss) * int((labels != -100).sum()), rel=1e-5)
    return out.logits.numpy(), float(total)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_flattened_rows_have_the_sum_of_their_losses(name):
    alone = sum(loss(name, input_ids=[x], labels=[x])[0] for x in (A, B))
    made = DataCollatorWithFlattening(return_tensors="np")([{"input_ids": x, "labels": x} for x in (A, B)])
    assert set(made) == {"input_ids", "labels", "position_ids"}
    assert loss(name, **made) == (pytest.approx(alone, rel=1e-6), 8)
    assert theirs(name, **{k: v.tolist() for k, v in made.items()})[1] == pytest.approx(alone, rel=1e-5)
    # Whoever forgets to mask the first label of a sequence does not train on the border.
    assert loss(name, **{**made, "labels": made["input_ids"]}) == (pytest.approx(alone, rel=1e-6), 8)


LEFT, RIGHT = [[0, 0] + B, A], [B + [0, 0], A]
MASKED = {
    "right": (RIGHT, [[1] * 4 + [0] * 2, [1] * 6], -100),
    "right, padding supervised": (RIGHT, [[1] * 4 + [0] * 2, [1] * 6], 0),
    "left": (LEFT, [[0] * 2 + [1] * 4, [1] * 6], -100),
    "left, padding supervised": (LEFT, [[0] * 2 + [1] * 4, [1] * 6], 0),
    "both sides": ([[0] + B + [0], A], [[0] + [1] * 4 + [0], [1] * 6], -100),
    "a hole": (RIGHT, [[1, 1, 0, 1, 1, 1], [1] * 6], -100),
    "all ones": (RIGHT, [[1] * 6] * 2, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_attention_masks_give_the_logits_and_the_loss_of_transformers(name, case, dtype):
    ids, mask, ignored = MASKED[case]
    labels = np.where(np.array(mask) == 1, ids, ignored).tolist()
    logits, total = theirs(name, input_ids=ids, labels=labels, attention_mask=mask)
    assert loss(name, input_ids=ids, labels=labels, attention_mask=np.array(mask, dtype))[0] == pytest.approx(
        total, 1e-4
    )
    model, params = loaded(name)
    mine = model.apply({"params": params}, jnp.array(ids), attention_mask=jnp.array(mask, dtype))
    np.testing.assert_allclose(mine, logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_position_ids_beside_a_mask_are_positions_alone(name):
    """As generation makes them of a mask: they restart at the text, and nothing is cut there."""
    ids, mask, _ = MASKED["left"]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    labels = np.where(np.array(mask) == 1, ids, -100)
    labels[0, 2] = -100
    batch = {"input_ids": ids, "labels": labels.tolist(), "attention_mask": mask, "position_ids": positions.tolist()}
    assert loss(name, **batch)[0] == pytest.approx(theirs(name, **batch)[1], rel=1e-4)
    alone = sum(loss(name, input_ids=[x], labels=[x])[0] for x in (A, B))
    assert loss(name, **batch)[0] == pytest.approx(alone, rel=1e-4)


ROW = np.array([A], np.int32)
GOOD = {"input_ids": ROW, "labels": ROW}
UNKNOWN = {
    "segments_ids": "Did you mean 'segment_ids'",
    "attn_mask": "Did you mean 'attention_mask'",
    "position": "Did you mean 'positions'",
    "label": "Did you mean 'labels'",
    "pixel_values": "Leave it out, or write a loss of your own",
    "num_items_in_batch": "counts itself",
    "length": "groups rows by",
    "cu_seq_lens_q": "`position_ids` that restart",
    "max_length_q": "`position_ids` that restart",
    "seq_idx": "`position_ids` that restart",
    "special_tokens_mask": "not to be learned to -100",
    "completion_mask": "not to be learned to -100",
    "token_type_ids": "transformers' GPT-2 adds embeddings",
    "loss_weights": "Every supervised token counts 1",
}
MISTAKES = {
    "no labels": ({"labels": None}, "needs `input_ids` and `labels`; got 'input_ids'. Add 'labels'"),
    "one row": ({"input_ids": ROW[0], "labels": ROW[0]}, r"must be \[batch, seq\], neither of them 0; got \[6\]"),
    "nothing": ({"input_ids": ROW[:, :0], "labels": ROW[:, :0]}, r"neither of them 0; got \[1, 0\]"),
    "labels cut": ({"labels": ROW[:, 1:]}, r"`labels` must have the shape \[1, 6\] of `input_ids`; got \[1, 5\]"),
    "positions of one row": (
        {"input_ids": ROW.repeat(2, 0), "labels": ROW.repeat(2, 0), "position_ids": ROW},
        "broadcast_to",
    ),
    "float ids": ({"input_ids": ROW.astype(np.float32)}, "`input_ids` must be int32; got float32"),
    "float labels": ({"labels": ROW.astype(np.float32)}, "`labels` must be int32; got float32"),
    "bool ids": ({"input_ids": ROW > 0}, "`input_ids` must be int32; got bool"),
    "unsigned labels": ({"labels": ROW.astype(np.uint32)}, "Labels are signed"),
    "a list": ({"labels": [A]}, "`labels` must be a NumPy or JAX array; got list"),
    "a tensor": ({"labels": torch.tensor([A])}, "must be a NumPy or JAX array; got Tensor"),
    "a float mask": ({"attention_mask": np.ones((1, 6), np.float32)}, "additive masks are not taken"),
    "a mask of four axes": ({"attention_mask": np.ones((1, 1, 6, 6), bool)}, r"Masks are \[batch, seq\]"),
    "positions twice": ({"positions": ROW, "position_ids": ROW}, "both say where tokens stand"),
    "padding twice": ({"attention_mask": ROW, "segment_ids": ROW}, "both say which tokens are padding"),
    "adapters of other rows": ({"adapter_ids": np.zeros(3, np.int32)}, r"must be \[1\], one for each row"),
    "too long": ({k: np.ones((1, 4096), np.int32) for k in GOOD}, "learned positions; got rows of 4096 tokens"),
}
NUMBERS = {
    "an id beyond": ({"input_ids": ROW + 1500}, r"`input_ids` must be in 0..1535; got 1550 in row 0, column 0"),
    "a negative id": ({"input_ids": -ROW}, "`input_ids` must be in 0..1535; got -50"),
    "an id of 64 bits": ({"input_ids": ROW.astype(np.int64) + 2**32}, "`input_ids` must be in 0..1535; got 4294967346"),
    "torch's other -1": (
        {"labels": np.where(ROW == 70, -1, ROW)},
        r"0..1535 or -100 \(not supervised\); got -1 in row 0, column 2",
    ),
    "a label beyond": ({"labels": np.where(ROW == 70, 99999, ROW)}, "got 99999 in row 0, column 2"),
    "a mask that counts": (
        {"attention_mask": np.array([[1, 1, 1, 2, 2, 2]])},
        "`attention_mask` must be in 0..1; got 2",
    ),
    "a negative segment": (
        {"segment_ids": np.array([[1, 1, 1, 1, -1, -1]])},
        "`segment_ids` must be at least 0; got -1",
    ),
    "a position beyond": ({"positions": ROW + 9999}, "`positions` must be in 0..255; got 10049"),
    "a negative position": ({"position_ids": -ROW}, "`position_ids` must be in 0..255; got -50"),
}


def batch_of(changes):
    return {k: v for k, v in {**GOOD, **changes}.items() if v is not None}


@functools.cache
def trained():
    """(loss, step, state maker, base) of a small adapter; the state is made anew, as steps donate it."""
    model, params = loaded("tiny-gpt2")
    params = jlora.add_lora(params, jlora.LoraConfig(rank=2, targets=["c_fc"]), key=jax.random.key(0))
    adapter, base = jlora.split(params)
    tx = optax.adam(1e-3)
    return causal_lm_loss(model), make_step(causal_lm_loss(model), tx), lambda: init_state(adapter, tx), base


@pytest.mark.parametrize("key", UNKNOWN)
def test_keys_that_would_be_ignored_are_refused(key):
    with pytest.raises(ValueError, match=f"must not hold '{key}'.*{UNKNOWN[key]}.*The loss takes input_ids, labels"):
        loss(**GOOD, **{key: ROW})


@pytest.mark.parametrize("case", [*MISTAKES, *NUMBERS])
def test_mistakes_are_refused_by_loss_step_and_evaluation(case):
    changes, message = (MISTAKES | NUMBERS)[case]
    model, params = loaded("tiny-gpt2")
    loss_fn, step, state, base = trained()
    for run in (
        lambda: loss_fn(params, batch_of(changes), None),
        lambda: step(state(), base, batch_of(changes), jax.random.key(0)),
        lambda: evaluate(model, params, [GOOD, batch_of(changes)]),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    if case in MISTAKES:  # these are seen without values, when a step is traced
        with pytest.raises((ValueError, TypeError)):
            step.lower(state(), base, batch_of(changes), jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in NUMBERS if "64" not in c])
def test_numbers_that_the_host_cannot_see_make_loss_and_gradient_nan(case):
    loss_fn, step, state, base = trained()
    compiled = step.lower(state(), base, batch_of(NUMBERS[case][0]), jax.random.key(0)).compile()
    batch = {k: np.asarray(v, np.int32) for k, v in batch_of(NUMBERS[case][0]).items()}
    _, metrics = compiled(state(), base, batch, jax.random.key(0))
    if case == "a mask that counts":  # a bool inside, as in transformers; the mask is still no 0 or 1
        assert np.isnan(metrics["loss"])
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"])


def test_torch_refuses_the_same_labels():
    for label in (-1, 99999):
        with pytest.raises(IndexError, match="out of bounds"):
            torch.nn.functional.cross_entropy(torch.zeros(1, 1536), torch.tensor([label]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_whole_numbers_of_any_width_are_one_program(dtype):
    loss_fn, step, state, base = trained()
    want = float(step(state(), base, GOOD, jax.random.key(0))[1]["loss"])
    batch = {k: v.astype(dtype) for k, v in GOOD.items()}
    assert float(step(state(), base, batch, jax.random.key(0))[1]["loss"]) == want
    assert float(step(state(), base, jax.tree.map(jnp.asarray, batch), jax.random.key(0))[1]["loss"]) == want


@pytest.mark.slow
def test_looking_compiles_nothing_and_waits_for_nothing(monkeypatch):
    loss_fn, step, state, base = trained()
    current, before = state(), step._cache_size()
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 1536, (2, 7)).astype(np.int32)
        current, _ = step(current, base, {"input_ids": ids, "labels": ids}, jax.random.key(seed))
    assert step._cache_size() == before + 1

    class OnAnAccelerator:  # of an array that lies there, nothing but its place may be asked
        platform = "gpu"

    far = jnp.asarray(ROW + 1500)
    monkeypatch.setattr(type(far), "devices", lambda self: {OnAnAccelerator()})
    loss_fn.check({"input_ids": far, "labels": far})
    with pytest.raises(ValueError, match="must be in 0..1535"):
        loss_fn.check({"input_ids": far, "labels": far}, wait=True)


def test_a_loss_of_ones_own_takes_any_batch():
    def own(params, batch, key):
        return jnp.sum(jnp.square(batch["x"] @ params["w"] - batch["y"])), jnp.int32(len(batch["x"]))

    adapter = {"w": jnp.ones((3, 2))}
    batch = {"x": np.ones((4, 3), np.float32), "y": np.zeros((4, 2), np.float32)}
    tx = optax.sgd(1e-2)
    losses = []
    for k in (1, 2):
        step = make_step(own, tx, accumulate=k)
        losses.append(float(step(init_state(adapter, tx), None, batch, jax.random.key(0))[1]["loss"]))
    assert losses[0] == losses[1] == pytest.approx(18.0)
    with pytest.raises(ValueError, match="cuts the rows of every array"):
        step(init_state(adapter, tx), None, {**batch, "scale": np.float32(1)}, jax.random.key(0))


def test_a_mask_does_not_go_with_a_cache_or_segments():
    from jlora.models import empty_cache

    model, params = loaded("tiny-gpt2")
    for extra in ({"attention_mask": ROW > 0}, {"segment_ids": ROW}):
        with pytest.raises(ValueError, match="does not go together with a cache"):
            model.apply({"params": params}, ROW, cache=empty_cache(model, 1, 8, stacked=False), **extra)
    with pytest.raises(ValueError, match="does not go together with `attention_mask`"):
        model.apply({"params": params}, ROW, attention_mask=ROW > 0, segment_ids=ROW)


@pytest.mark.slow
def test_batches_of_several_shapes_and_kinds_are_evaluated_together():
    model, params = loaded("tiny-gpt2")
    two = {
        "input_ids": np.array([B], np.int32),
        "labels": np.array([B], np.int32),
        "attention_mask": np.ones((1, 4), bool),
    }
    empty = {**GOOD, "labels": np.full_like(ROW, -100)}
    result = evaluate(model, params, [GOOD, two, empty])
    assert result.supervised_tokens == 8 and result.batches == 3
    assert result.loss == pytest.approx((loss(**GOOD)[0] + loss(**two)[0]) / 8, rel=1e-6)
    with pytest.raises(ValueError, match="1 batches without a supervised token"):
        evaluate(model, params, [empty])
