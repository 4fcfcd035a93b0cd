"""The optimizers and schedules of a run by name, against PyTorch's and transformers'; their flags; each resumes to the byte."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny
import torch
import transformers
from optax import contrib
from peft.optimizers import create_loraplus_optimizer
from steps import BATCH, GPT2, SEQ, build, make_batch
from tiny import options

import jlora
from jlora.runs.flags.optimization import resolved
from jlora.train import TrainState, causal_lm_loss, evaluated, make_optimizer, make_schedule
from jlora.train.noise import sequence_lengths, with_noise
from jlora.train.parameters import parameters_of
from jlora.tree.paths import flatten, nest

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE, DECAY, UPDATES = 1e-2, 0.1, 4
LAYERS = ("model/layers/0", "model/layers/1")
SHAPES = {"up/kernel": (6, 4), "up/bias": (4,)}
PARAMETERS = {f"{layer}/{name}": shape for layer in LAYERS for name, shape in SHAPES.items()} | {
    "model/embed_tokens/embedding": (9, 6)
}


def arrays(seed, scale=1.0):
    """An array for each parameter, by path."""
    draw = np.random.default_rng(seed)
    return {path: scale * draw.standard_normal(shape, np.float32) for path, shape in PARAMETERS.items()}


GRADIENTS = [arrays(seed) for seed in range(1, 1 + UPDATES)]


def updated(name, *, stack, gradients=GRADIENTS, rate=RATE, **settings):
    """The parameters by per-layer path after these gradients, layers single or stacked."""

    def tree(flat):
        made = nest(flat)
        return jlora.stack_layers(made) if stack else made

    params = jax.tree.map(jnp.asarray, tree(arrays(0)))
    tx = make_optimizer(name, rate, params, **settings)
    state = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))

    @jax.jit
    def step(state, gradient):
        updates, opt_state = tx.update(gradient, state.opt_state, state.adapter)
        return TrainState(state.step + 1, optax.apply_updates(state.adapter, updates), opt_state)

    for gradient in gradients:
        state = step(state, tree(gradient))
    trained = jax.device_get(evaluated(state))
    return flatten(jlora.unstack_layers(trained) if stack else trained)


def by_torch(make, gradients=GRADIENTS, only=lambda path, shape: True):
    """The same of a PyTorch optimizer, its groups with and without decay as transformers' Trainer makes them."""
    params = {
        path: torch.nn.Parameter(torch.tensor(x)) for path, x in arrays(0).items() if only(path, PARAMETERS[path])
    }
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = make([group for group in groups if group["params"]])
    for gradient in gradients:
        for path, p in params.items():
            p.grad = torch.tensor(gradient[path])
        optimizer.step()
    return {path: p.detach().numpy() for path, p in params.items()}


def hidden_matrix(path, shape):
    return len(shape) == 2 and "embed" not in path


def lion(params, gradient, moment, decayed):
    """Chen et al. 2023, algorithm 2."""
    direction = np.sign(0.9 * moment + 0.1 * gradient)
    moment = 0.99 * moment + 0.01 * gradient
    return params - RATE * (direction + (DECAY if decayed else 0.0) * params), moment


def by_lion():
    params = arrays(0)
    moments = {path: np.zeros_like(x) for path, x in params.items()}
    for gradient in GRADIENTS:
        for path, x in params.items():
            params[path], moments[path] = lion(x, gradient[path], moments[path], x.ndim > 1)
    return params


ORACLES = {
    "adamw": lambda: by_torch(lambda groups: torch.optim.AdamW(groups, lr=RATE)),
    "adafactor": lambda: by_torch(
        lambda groups: transformers.Adafactor(groups, lr=RATE, scale_parameter=False, relative_step=False)
    ),
    "lion": by_lion,
    "sgd": lambda: by_torch(lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9)),
}
SETTINGS = {"sgd": {"momentum": 0.9}}


@pytest.mark.few(len(ORACLES))
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("stack", [True, False], ids=["stacked", "per-layer"])
def test_named_optimizers_are_those_of_torch(name, stack):
    expected = ORACLES[name]()
    got = updated(name, stack=stack, weight_decay=DECAY, **SETTINGS.get(name, {}))
    assert got.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(got[path], x, rtol=2e-5, atol=2e-6, err_msg=path)


@pytest.mark.few(1)
@pytest.mark.parametrize("stack", [True, False], ids=["stacked", "per-layer"])
def test_muon_is_torch_s_for_matrices_in_layers_and_adamw_for_the_rest(stack):
    # Of one direction: optax corrects the bias of its averages, torch does not, which mixes other gradients otherwise.
    along = [{path: (1 + i) * x for path, x in GRADIENTS[0].items()} for i in range(UPDATES)]

    def muon(groups):
        return torch.optim.Muon(groups, lr=RATE, adjust_lr_fn="match_rms_adamw")

    expected = by_torch(muon, along, only=hidden_matrix)
    rest = by_torch(lambda groups: torch.optim.AdamW(groups, lr=RATE), along)
    got = updated("muon", stack=stack, gradients=along, weight_decay=DECAY)
    for path, x in got.items():
        if path in expected:  # torch orthogonalizes in bfloat16
            np.testing.assert_allclose(x, expected[path], atol=2e-2 * RATE * UPDATES, err_msg=path)
        else:
            np.testing.assert_allclose(x, rest[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_schedule_free_is_optax_s_and_gives_its_average():
    params = jax.tree.map(jnp.asarray, arrays(0))
    tx = contrib.schedule_free_adamw(RATE)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in GRADIENTS:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    alike = contrib.schedule_free_eval_params(state, params)
    got = updated("schedule_free_adamw", stack=True, max_grad_norm=1e9)
    for path, x in got.items():
        np.testing.assert_allclose(x, alike[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert any(np.abs(np.asarray(alike[path]) - params[path]).max() > RATE / 10 for path in PARAMETERS)


def test_nothing_but_matrices_is_decayed(llama_dir):
    """Of an adapter with all that can be trained, in both forms."""
    config = jlora.LoraConfig(rank=2, targets=["q_proj"], use_dora=True, modules_to_save=["norm"])
    decayed = []
    for stack in (False, True):
        _, params = jlora.load(llama_dir, stack=stack)
        adapter, _ = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
        there = parameters_of(adapter)
        decayed.append(sorted(path for path, parameter in there.items() if parameter.is_matrix))
        assert {parameter.name for parameter in there.values()} == {"lora_A", "lora_B", "magnitude", "value"}
        assert {path.rpartition("/")[2] for path in decayed[-1]} == {"lora_A", "lora_B"}
    assert [len(paths) for paths in decayed] == [4, 2]
    tx = make_optimizer("adamw", 1.0, adapter, weight_decay=0.5)
    updates = jax.jit(lambda a: tx.update(jax.tree.map(jnp.zeros_like, a), tx.init(a), a)[0])(adapter)
    leaves = zip(there.items(), jax.tree.leaves(adapter), jax.tree.leaves(updates), strict=True)
    for (path, parameter), x, update in leaves:
        np.testing.assert_array_equal(update, -0.5 * x if parameter.is_matrix else 0.0 * x, err_msg=path)


def test_lora_plus_is_peft_s():
    """B and a bias faster than A, each decayed by its own rate."""
    torch.manual_seed(0)
    ratio, steps = 16.0, 3
    linear = torch.nn.Sequential(torch.nn.Linear(6, 4))
    theirs = peft.get_peft_model(linear, peft.LoraConfig(r=2, target_modules=["0"], bias="all"))
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    names = {"lora_A": "kernel/lora_A", "lora_B": "kernel/lora_B", "bias": "bias"}
    paths = {next(f"proj/{ours}" for part, ours in names.items() if part in name): name for name in trained}
    assert len(paths) == 3
    params = nest({path: jnp.asarray(trained[name].detach().numpy().T.copy()) for path, name in paths.items()})
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY
    )
    tx = make_optimizer("adamw", RATE, params, weight_decay=DECAY, lora_plus_ratio=ratio)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    draw = np.random.default_rng(0)
    for _ in range(steps):
        gradient = {path: draw.standard_normal(x.shape, np.float32) for path, x in flatten(params).items()}
        for path, name in paths.items():
            trained[name].grad = torch.tensor(gradient[path].T.copy())
        optimizer.step()
        updates, state = update(nest(gradient), state, params)
        params = optax.apply_updates(params, updates)
    for path, x in flatten(params).items():
        # optax's correction of the first second moment, 1 - 0.999 in float32, is 3e-5 off; torch's is in float64.
        atol = 3e-5 * RATE * ratio
        np.testing.assert_allclose(x, trained[paths[path]].detach().numpy().T, rtol=1e-5, atol=atol, err_msg=path)


# Schedules

STEPS, WARMUP = 20, 4
# (ours, transformers' name, its other arguments)
CURVES = [
    ("constant", "constant_with_warmup", {}),
    ("linear", "linear", {}),
    ("cosine", "cosine", {}),
    ("wsd", "warmup_stable_decay", {"num_decay_steps": 5}),
    ("inverse_sqrt", "inverse_sqrt", {}),
]


def theirs(name, warmup, steps, count, **specific):
    """The rates of transformers' scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=RATE)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=specific or None)
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("name", "their_name", "specific"), CURVES)
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_schedules_are_those_of_transformers_one_step_ahead(name, their_name, specific, warmup):
    schedule = make_schedule(name, peak=RATE, steps=STEPS, warmup_steps=warmup, decay_fraction=0.25)
    got = [float(schedule(count)) for count in range(STEPS)]
    if name == "inverse_sqrt" and warmup == 0:
        specific = {"timescale": 10_000}
    expected = theirs(their_name, warmup + 1, STEPS + 1, STEPS + 1, **specific)[1:]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got[0] > 0


@pytest.mark.parametrize(
    ("name", "their_name", "specific"),
    [
        ("cosine", "cosine_with_min_lr", {"min_lr": RATE / 5}),
        ("linear", "polynomial", {"lr_end": RATE / 5, "power": 1.0}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 5, "min_lr_ratio": 0.2}),
    ],
)
def test_schedules_end_at_the_least_rate(name, their_name, specific):
    schedule = make_schedule(name, peak=RATE, steps=STEPS, warmup_steps=WARMUP, floor=RATE / 5, decay_fraction=0.25)
    got = [float(schedule(count)) for count in range(STEPS + 1)]
    expected = theirs(their_name, WARMUP + 1, STEPS + 1, STEPS + 2, **specific)[1:]
    np.testing.assert_allclose(got[WARMUP:], expected[WARMUP:], rtol=1e-5)
    assert got[-1] == pytest.approx(RATE / 5)


# NEFTune


def test_noise_is_the_paper_s_on_the_input_embeddings_alone():
    """Uniform, as large as each sequence's own length asks for; the tied head has none of it, nor has evaluation."""
    alpha, (model, adapter, base) = 5.0, build(GPT2)
    params, key = jlora.combine(adapter, base), jax.random.key(7)
    lengths = np.array([[8, 8, 8, 8, 8, 8, 8, 8, 3, 3, 3]] * BATCH)
    segments = jnp.asarray(np.where(lengths == 8, 1, 2))
    assert np.array_equal(sequence_lengths(segments, segments), lengths)
    padded = jnp.ones((BATCH, SEQ), bool).at[0, 4:].set(False)
    assert np.asarray(sequence_lengths(segments, None, padded))[:2, 0].tolist() == [4, SEQ]
    noisy = with_noise(params, model, jnp.asarray(lengths), alpha, key)
    table = noisy["transformer"]["wte"]["embedding"]
    plain = params["transformer"]["wte"]["embedding"]
    ids = jnp.asarray(make_batch()["input_ids"])
    noise = np.asarray(jlora.embed(ids, table) - jlora.embed(ids, plain))
    for length in (8, 3):
        size = alpha / np.sqrt(length * model.config.width)
        here = noise[lengths == length]
        assert 0.95 * size < np.abs(here).max() <= size * 1.0001
        assert here.std() == pytest.approx(size / np.sqrt(3), rel=0.05)
    assert model.output_head(noisy)[0] is plain
    quiet, loud = causal_lm_loss(model), causal_lm_loss(model, neftune_alpha=alpha)
    losses = jax.jit(lambda k: (quiet(params, make_batch(), k)[0], loud(params, make_batch(), k)[0]))
    first, again = losses(key), losses(key)
    assert first == again and first[0] != first[1] and losses(jax.random.key(8))[1] != first[1]
    assert float(loud(params, make_batch(), None)[0]) == pytest.approx(float(first[0]), rel=1e-6)


# Flags


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "`optimizer` must be one of adamw, adafactor.*got 'adam'"),
        ({"optimizer": "sgd", "beta2": 0.999}, "`beta2` has no effect on sgd; got 0.999.*choose one of adamw, lion"),
        ({"momentum": 0.9}, "`momentum` has no effect on adamw.*choose one of adafactor, sgd, muon"),
        ({"optimizer": "sgd", "momentum": 1.0}, "`momentum` must be in"),
        ({"schedule": "step"}, "`schedule` must be one of constant, linear"),
        ({"optimizer": "schedule_free_adamw", "schedule": "cosine"}, "`schedule` must be constant with schedule_free_adamw"),
        ({"warmup_steps": 2, "warmup_fraction": 0.1}, "exclude each other; got 2 and 0.1"),
        ({"warmup_steps": -1}, "`warmup_steps` must be 0 or positive"),
        ({"min_learning_rate": 1.0}, "`min_learning_rate` must be in"),
        ({"schedule": "constant", "min_learning_rate": 1e-5}, "no effect on the schedule constant.*linear, cosine, wsd"),
        ({"decay_fraction": 0.2}, "`decay_fraction` has no effect on the schedule cosine"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, "`decay_fraction` must be in"),
        ({"lora_plus_ratio": 0.0}, "`lora_plus_ratio` must be positive"),
        ({"lora_plus_ratio": 16.0, "kind": "loha"}, "`lora_plus_ratio` is for the factors of kind 'lora'; got kind='loha'"),
        ({"neftune_alpha": -1.0}, "`neftune_alpha` must be 0 or positive"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be in"),
    ],
)  # fmt: skip
def test_flags_without_effect_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


def test_defaults_are_the_optimizer_s_own():
    """And one that is given as it would be anyway is the same run."""
    fields = [dataclasses.asdict(options(**changes)) for changes in ({}, {"beta1": 0.9, "schedule": "cosine"})]
    assert resolved(fields[0]) == resolved(fields[1])
    assert [resolved(fields[0])[name] for name in ("beta2", "momentum", "warmup_fraction")] == [0.999, None, 0.03]
    assert resolved(dataclasses.asdict(options(optimizer="lion")))["beta2"] == 0.99
    assert resolved(dataclasses.asdict(options(warmup_steps=2)))["warmup_fraction"] is None
    assert float(options(optimizer="schedule_free_adamw").rates(100)(99)) == pytest.approx(2e-4)
    assert float(options(warmup_steps=3).rates(100)(3)) == pytest.approx(2e-4)
    with pytest.raises(ValueError, match="less than the 3 steps of the run; got 3"):
        options(warmup_steps=3).rates(3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule_free_adamw", "adamw8bit", "muon", "adafactor", "lion", "sgd"])
def test_every_optimizer_resumes_to_the_byte(name, gpt2_dir, text_file, tmp_path):
    config = options(model=gpt2_dir, data=text_file, output=str(tmp_path / "run"), optimizer=name, learning_rate=1e-2)
    config = dataclasses.replace(config, weight_decay=0.1)
    whole = jlora.finetune(config)
    before = (whole.adapter_dir / "adapter_model.safetensors").read_bytes()
    assert name in (tmp_path / "run" / "config.yaml").read_text()
    assert [entry["step"] for entry in whole.history] == [1, 2, 3, 4]
    shutil.rmtree(whole.adapter_dir)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = jlora.finetune(dataclasses.replace(config, resume=True))
    assert (resumed.adapter_dir / "adapter_model.safetensors").read_bytes() == before
    assert tiny.read_log(tmp_path / "run")[-1]["loss"] == whole.history[-1]["loss"]
