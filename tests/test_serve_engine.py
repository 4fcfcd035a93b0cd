"""The engine of `jlora serve`: rows that come and go, each of which is what `generate` gives alone."""

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.generation import for_decoding
from jlora.serve import engine as engine_module
from jlora.serve.engine import Engine, Stopped
from jlora.serve.schedule import QueueFull, Row, Schedule, Token

pytestmark = pytest.mark.usefixtures("quick_compilation")

POSITIONS, SLOTS, PIECE = 160, 3, 12
PROMPTS = [[5, 9, 17], list(range(3, 33)), [40, 41, 42, 43], [7], list(range(100, 125)), [8, 8, 8]]
"""Some are longer than the piece of a prompt that is computed at once."""


@pytest.fixture(scope="module")
def model():
    """(model, parameters with two adapters that say something else, in the form for decoding)."""
    from jlora.models import model_from_config

    fields = tiny.LLAMA | {"max_position_embeddings": POSITIONS, "vocab_size": 211, "eos_token_id": 3}
    model = model_from_config(fields, dtype=np.float32)
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    trees = {}
    for name, seed in (("gull", 1), ("tide", 2)):
        config = jlora.LoraConfig(rank=2 * seed, targets=["q_proj", "down_proj"])
        adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(seed)))
        wave = jax.tree.map(lambda x, s=seed: x + 0.5 * np.sin(s * np.arange(x.size).reshape(x.shape)), adapter)
        trees[name] = jlora.combine(wave, base)
    return for_decoding(model, jlora.lora.stack_adapters(trees), batch=SLOTS)


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    monkeypatch.setitem(engine_module._PIECE, "cpu", PIECE)


@pytest.fixture
def engine(model, pieces):
    """One whose thread does not run: `turn` by `turn`."""
    return Engine(*model, slots=SLOTS, max_length=POSITIONS, queue=4)


def row(prompt, **options):
    """(a row, what it is told)."""
    told = []
    return Row(prompt=prompt, tell=told.append, **{"max_new_tokens": 6} | options), told


def ids(told):
    return [event.id for event in told if isinstance(event, Token)]


def run(engine, rows):
    """Until all have ended."""
    while engine.running or engine.waiting:
        engine.turn()
    assert all(told and not isinstance(told[-1], Token) for _, told in rows)


def alone(model, prompt, **options):
    """The same by `generate`."""
    module, params = model
    index, adapter, seed = (
        options.pop(name, default) for name, default in (("index", 0), ("adapter", -1), ("seed", 0))
    )
    routed = jlora.route(params, np.full(index + 1, adapter, np.int32))
    settings = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "top_k": 0} | options
    return jlora.generate(
        module, routed, [prompt] * (index + 1), key=jax.random.key(seed), eos_token_id=[], **settings
    )[index]


def test_rows_are_what_generate_gives_alone(model, engine):
    """Greedy or sampled, through different adapters, of prompts longer than a piece; each joins while others go on."""
    options = [
        {"adapter": 0}, {"adapter": 1}, {}, {"temperature": 0.9, "seed": 7, "top_k": 20, "top_p": 0.9, "adapter": 1},
        {"temperature": 1.3, "seed": 2**32 - 1, "index": 2}, {"temperature": 0.7, "top_p": 0.8, "seed": 5, "adapter": 0},
    ]  # fmt: skip
    rows = []
    for prompt, chosen in zip(PROMPTS, options, strict=True):
        rows.append(row(prompt, **chosen))
        engine.submit([rows[-1][0]])
        engine.turn()
        engine.turn()
    run(engine, rows)
    for prompt, chosen, (_, told) in zip(PROMPTS, options, rows, strict=True):
        assert ids(told) == alone(model, prompt, **chosen), chosen
        assert told[-1] == "length"


def test_a_row_does_not_depend_on_the_others(engine):
    """To the bit, in another slot too."""

    def asked():
        return row(PROMPTS[1], temperature=0.8, seed=3, top_k=9, adapter=1, alternatives=5)

    lone = asked()
    engine.submit([lone[0]])
    run(engine, [lone])
    first, second = row(PROMPTS[0], max_new_tokens=9), row(PROMPTS[4], temperature=2.0, top_p=0.5, adapter=0)
    crowded = asked()
    for one in (first, second, crowded):
        engine.submit([one[0]])
        engine.turn()
    assert crowded[0].slot != lone[0].slot
    run(engine, [crowded])
    assert crowded[1] == lone[1]


def test_logprobs_are_the_models(model, engine):
    module, params = model
    one = row(PROMPTS[0], alternatives=3, adapter=0, temperature=0.7, seed=1)
    engine.submit([one[0]])
    run(engine, [one])
    tokens = [event for event in one[1] if isinstance(event, Token)]
    whole = np.array([[*PROMPTS[0], *ids(one[1])]], np.int32)
    logits = module.apply({"params": jlora.route(params, np.array([0], np.int32))}, whole)[0]
    wanted = np.asarray(jax.nn.log_softmax(logits, axis=-1))[len(PROMPTS[0]) - 1 :]
    for token, row_wanted in zip(tokens, wanted, strict=False):
        best = np.argsort(-row_wanted)[:3]
        assert [i for i, _ in token.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in token.top], row_wanted[best], atol=1e-5)
        np.testing.assert_allclose(token.logprob, row_wanted[token.id], atol=1e-5)


def test_a_stop_ends_a_row_and_frees_its_slot(model, engine):
    expected = alone(model, PROMPTS[0])
    ending = row(PROMPTS[0], stops=frozenset({expected[2]}))
    others = [row([9, i]) for i in range(SLOTS)]
    engine.submit([ending[0], *(one for one, _ in others)])
    assert engine.waiting == 1
    while ending[0] in engine._schedule.running:
        engine.turn()
    assert ids(ending[1]) == expected[: expected.index(expected[2]) + 1] and ending[1][-1] == "stop"
    assert engine.waiting == 0
    run(engine, others)


def test_cancelled_and_late_rows_leave(model):
    """While they wait, during their prompt, and while they speak."""
    now = [0.0]
    engine = Engine(*model, slots=SLOTS, max_length=POSITIONS, queue=4, clock=lambda: now[0])
    speaking, filling = row([5, 6], max_new_tokens=50), row(PROMPTS[1], deadline=1.0)
    also, waiting, late = row([9], deadline=1.0), row([7]), row([8], deadline=1.0)
    rows = [speaking, filling, also, waiting, late]
    engine.submit([one for one, _ in rows])
    engine.turn()
    engine.turn()
    assert filling[0].filled and filling[0].is_filling
    engine.cancel([speaking[0], waiting[0]])
    now[0] = 2.0
    engine.turn()
    assert [told[-1] for _, told in rows] == ["cancelled", "timeout", "timeout", "cancelled", "timeout"]
    assert engine.running == engine.waiting == 0 and not waiting[1][:-1]


def test_a_row_that_is_not_finite_ends_alone(model):
    module, params = model
    path, leaf = next((p, w) for p, w in jlora.tree.paths.flatten(params).items() if hasattr(w, "lora_B"))
    broken = leaf.with_children(lora_B=leaf.lora_B.at[1].set(np.nan))
    damaged = jlora.tree.paths.nest(jlora.tree.paths.flatten(params) | {path: broken})
    engine = Engine(module, damaged, slots=SLOTS, max_length=POSITIONS, queue=4)
    sound, unsound = row(PROMPTS[0], adapter=0), row(PROMPTS[0], adapter=1)
    engine.submit([sound[0], unsound[0]])
    run(engine, [sound, unsound])
    assert unsound[1] == ["unsound"]
    assert ids(sound[1]) == alone(model, PROMPTS[0], adapter=0)


def test_draining_ends_what_waits_and_stopping_everything(engine):
    rows = [row([i + 5], max_new_tokens=40) for i in range(SLOTS + 2)]
    engine.submit([one for one, _ in rows])
    engine.turn()
    engine.drain()
    engine.turn()
    assert [told[-1:] == ["stopping"] for _, told in rows] == [False] * SLOTS + [True] * 2
    with pytest.raises(Stopped):
        engine.submit([row([1])[0]])
    run(engine, rows)
    assert all(told[-1] == "length" for _, told in rows[:SLOTS])


def test_a_failure_ends_every_row(engine, monkeypatch):
    rows = [row([i + 5]) for i in range(SLOTS + 1)]
    engine.submit([one for one, _ in rows])
    monkeypatch.setattr(engine, "_fill", lambda *_, **__: 1 / 0)
    engine._run()
    assert all(told == ["stopping"] for _, told in rows)
    assert isinstance(engine.failure, ZeroDivisionError) and not engine.accepts


def test_nothing_is_compiled_twice(model, engine):
    from jlora.generation import fill, step

    run(engine, [])
    engine.warm()
    before = fill._cache_size(), step._cache_size()
    rows = [row(PROMPTS[i], adapter=i % 3 - 1, temperature=i / 2, alternatives=i or None) for i in range(4)]
    engine.submit([one for one, _ in rows])
    run(engine, rows)
    assert (fill._cache_size(), step._cache_size()) == before


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_schedule_serves_in_order_and_never_twice(data):
    slots, queue = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    schedule, placed, arrived = Schedule(slots=slots, queue=queue), [], []
    for _ in range(data.draw(st.integers(1, 25))):
        if data.draw(st.booleans()):
            rows = [Row(prompt=[1], max_new_tokens=1) for _ in range(data.draw(st.integers(1, 3)))]
            room = queue + slots - len(schedule.rows)
            try:
                schedule.add(rows)
                arrived += rows
                assert len(rows) <= room
            except QueueFull:
                assert len(rows) > room and not set(rows) & set(schedule.rows)
        elif schedule.rows:
            leaving = data.draw(st.sampled_from(schedule.rows))
            schedule.leave([leaving])
            if leaving.slot is None:
                arrived.remove(leaving)
        placed += sorted((r for r in schedule.running if r not in placed), key=lambda r: r.number)
        assert placed == arrived[: len(placed)]  # first come, first served
        assert len({r.slot for r in schedule.running}) == len(schedule.running)
        assert not schedule.waiting or len(schedule.running) == slots  # no slot is idle while a row waits
        assert len(schedule.waiting) <= queue
