"""Held-out loss against torch, base against adapted, and how both are shown."""

import io
import json
import math
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import VOCAB
from rich.console import Console

import jlora
from jlora.report import Comparison, PromptComparison, next_token_distance, plot_history, print_comparison
from jlora.train import Evaluation, perplexity

pytestmark = pytest.mark.usefixtures("quick_compilation")

IGNORED = -100


@pytest.fixture(scope="module")
def llama(checkpoints):
    """(module, float32 parameters, transformers model)"""
    directory, oracle = checkpoints["llama"]
    return *jlora.load(directory, dtype=jnp.float32), oracle


@pytest.fixture(scope="module")
def untrained(llama):
    """The parameters under an adapter whose B is zero."""
    return jlora.add_lora(llama[1], jlora.LoraConfig(rank=2, targets=["q_proj", "down_proj"]), key=jax.random.key(0))


@pytest.fixture(scope="module")
def adapted(untrained):
    """The same with B not zero."""
    adapter, base = jlora.split(untrained)
    return jlora.combine(jax.tree.map(lambda x: x + 0.1, adapter), base)


def batches_with(fractions, seed=0, shape=(3, 16)):
    """One batch for each fraction of supervised tokens."""
    rng = np.random.default_rng(seed)
    for fraction in fractions:
        ids = rng.integers(0, VOCAB, shape).astype(np.int32)
        yield {"input_ids": ids, "labels": np.where(rng.random(shape) < fraction, ids, IGNORED).astype(np.int32)}


def torch_sums(oracle, batch):
    """(summed cross-entropy, supervised tokens) of one batch, in float64 from transformers' logits."""
    ids, labels = (torch.tensor(batch[name], dtype=torch.long) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = oracle(ids).logits.double()
    targets = labels[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets, reduction="sum")
    return float(loss), int((targets != IGNORED).sum())


# evaluate


def test_loss_is_weighted_by_tokens_over_ragged_batches(llama):
    model, params, oracle = llama
    batches = list(batches_with([0.9, 0.05, 0.0, 0.4]))
    sums, counts = zip(*(torch_sums(oracle, batch) for batch in batches), strict=True)
    assert len(set(counts)) == 4 and 0 in counts
    result = jlora.evaluate(model, params, iter(batches))
    assert result.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert (result.supervised_tokens, result.batches) == (sum(counts), 4)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    mean_of_means = np.mean([s / c for s, c in zip(sums, counts, strict=True) if c])
    assert abs(result.loss - mean_of_means) > 1e-2, "the batches must tell the two averages apart"


def test_a_row_more_or_less_changes_nothing_else(llama):
    model, params, _ = llama
    (batch,) = batches_with([0.7])
    whole = jlora.evaluate(model, params, [batch])
    rows = [{name: array[i : i + 1] for name, array in batch.items()} for i in range(3)]
    apart = jlora.evaluate(model, params, rows)
    assert apart.loss == pytest.approx(whole.loss, rel=1e-6)
    assert apart.supervised_tokens == whole.supervised_tokens


def test_packed_rows_have_the_loss_of_the_rows_apart(llama):
    model, params, oracle = llama
    ids = np.random.default_rng(1).integers(0, VOCAB, (1, 16)).astype(np.int32)
    packed = {"input_ids": ids, "labels": ids, "segment_ids": np.array([[1] * 6 + [2] * 7 + [0] * 3], np.int32)}
    apart = [torch_sums(oracle, {"input_ids": ids[:, s], "labels": ids[:, s]}) for s in (slice(0, 6), slice(6, 13))]
    result = jlora.evaluate(model, params, [packed])
    assert result.supervised_tokens == sum(n for _, n in apart) == 5 + 6
    assert result.loss == pytest.approx(sum(s for s, _ in apart) / 11, rel=1e-5)


@pytest.mark.parametrize("fractions", [[], [0.0, 0.0]])
def test_nothing_to_evaluate(llama, fractions):
    model, params, _ = llama
    with pytest.raises(ValueError, match=f"nothing to evaluate: {len(fractions)} batches without a supervised token"):
        jlora.evaluate(model, params, batches_with(fractions))


def test_perplexity_overflows_to_infinity():
    assert perplexity(0.0) == 1.0
    assert perplexity(709.0) == math.exp(709.0) < math.inf
    assert perplexity(710.0) == perplexity(1e6) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan)), "a diverged model has no perplexity"
    assert Evaluation(1e4, 1, 1).perplexity == math.inf


# compare


def reference_distance(adapted, base):
    """(KL(adapted || base), L2) in float64."""
    a, b = np.asarray(adapted, np.float64), np.asarray(base, np.float64)
    log_p, log_q = (x - x.max() - np.log(np.sum(np.exp(x - x.max()))) for x in (a, b))
    return np.sum(np.exp(log_p) * (log_p - log_q)), np.linalg.norm(a - b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 10.0, 1e2, 1e4]), st.sampled_from([1e-3, 1.0, 1e4]))
def test_distance_equals_float64(seed, scale, change):
    rng = np.random.default_rng(seed)
    base = (rng.uniform(-1, 1, VOCAB) * scale).astype(np.float32)
    other = (base + rng.uniform(-1, 1, VOCAB) * change).astype(np.float32)
    kl, l2 = next_token_distance(jnp.asarray(other), jnp.asarray(base))
    expected_kl, expected_l2 = reference_distance(other, base)
    # float32 logits of this size are themselves rounded to this.
    assert float(kl) == pytest.approx(expected_kl, rel=1e-4, abs=2e-6 * max(1.0, scale, change))
    assert float(l2) == pytest.approx(expected_l2, rel=1e-5)
    assert kl >= 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distances_of_extreme_logits_are_numbers(dtype):
    low, high = jnp.full(VOCAB, -1e4, dtype), jnp.full(VOCAB, 1e4, dtype)
    peak, other_peak = low.at[3].set(1e4), low.at[5].set(1e4)
    for a in (low, high, peak, other_peak):
        for b in (low, high, peak, other_peak):
            assert all(np.isfinite(x) and x >= 0 and x.dtype == jnp.float32 for x in next_token_distance(a, b))
    kl, l2 = next_token_distance(peak, other_peak)
    assert float(kl) == pytest.approx(2e4, rel=1e-2) and float(l2) == pytest.approx(2e4 * math.sqrt(2), rel=1e-2)
    assert next_token_distance(low, high)[0] == 0, "a shift of all logits is the same distribution"


def test_equal_logits_are_at_distance_zero():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(50, 997)).astype(np.float32) * 20)
    kl, l2 = jax.vmap(next_token_distance)(rows, rows)
    assert not np.any(kl) and not np.any(l2)


PROMPTS = [("first", [5, 6, 7]), ("second", [8, 9]), ("long", list(range(2, 42)))]


def words(ids):
    return " ".join(f"t{i}" for i in ids)


def compared(model, params, **kwargs):
    kwargs = {"decode": words, "key": jax.random.key(0), "max_new_tokens": 6} | kwargs
    return jlora.compare(model, params, PROMPTS, **kwargs)


@pytest.mark.slow
def test_an_adapter_of_zero_changes_nothing(llama, untrained):
    result = compared(llama[0], untrained, held_out=lambda: batches_with([0.5]))
    assert [p.prompt for p in result.prompts] == ["first", "second", "long"]
    for p in result.prompts:
        assert p.base == p.adapted != "" and p.kl == p.l2 == 0.0
    assert result.base == result.adapted


@pytest.mark.slow
def test_base_and_adapted_are_what_each_generates(llama, adapted):
    model, params, oracle = llama
    result = compared(model, adapted, temperature=0.9, top_k=20, top_p=0.9, held_out=lambda: batches_with([0.5, 0.2]))
    ids = [row for _, row in PROMPTS]
    sampling = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "key": jax.random.key(0)}
    # What they add to the text of the prompt: `words` puts a space between them.
    assert [p.base for p in result.prompts] == [" " + words(r) for r in jlora.generate(model, params, ids, **sampling)]
    assert [p.adapted for p in result.prompts] == [
        " " + words(r) for r in jlora.generate(model, adapted, ids, **sampling)
    ]
    assert any(p.base != p.adapted for p in result.prompts)
    assert result.adapted == jlora.evaluate(model, adapted, batches_with([0.5, 0.2]))
    sums, counts = np.sum([torch_sums(oracle, batch) for batch in batches_with([0.5, 0.2])], axis=0)
    assert result.base.loss == pytest.approx(sums / counts, rel=1e-5)
    assert abs(result.base.loss - result.adapted.loss) > 1e-3


@pytest.mark.slow
def test_distances_are_taken_after_the_prompt(llama, adapted):
    model, params, _ = llama
    result = compared(model, adapted)
    assert result.base is result.adapted is None
    apply = jax.jit(lambda p, ids: model.apply({"params": p}, ids))
    for p, (_, row) in zip(result.prompts, PROMPTS, strict=True):
        kl, l2 = reference_distance(*(apply(tree, jnp.asarray([row]))[0, -1] for tree in (adapted, params)))
        assert p.kl == pytest.approx(kl, rel=1e-3) and p.l2 == pytest.approx(l2, rel=1e-3)
        assert kl > 1e-3


@pytest.mark.slow
def test_divergence_is_measured_along_prompt_and_answer(llama, untrained, adapted):
    model, params, _ = llama
    result = compared(model, adapted, temperature=0, name="first", others={"second": untrained})
    apply = jax.jit(lambda p, ids: model.apply({"params": p}, ids))
    for compared_prompt, (_, row) in zip(result.prompts, PROMPTS, strict=True):
        base, first, second = compared_prompt.models
        assert [m.name for m in compared_prompt.models] == ["base", "first", "second"]
        assert second.text == base.text and not any(second.changed) and not any((*second.kl, *second.prompt_kl))
        (new,) = jlora.generate(model, adapted, [row], max_new_tokens=6, temperature=0)
        assert list(first.tokens) == [f" t{i}" for i in new]
        both = [apply(tree, jnp.asarray([[*row, *new]]))[0] for tree in (adapted, params)]
        kls, l2s = zip(*(reference_distance(*pair) for pair in zip(*both, strict=True)), strict=True)
        assert first.prompt_kl == pytest.approx(kls[: len(row) - 1], rel=1e-3)
        assert first.kl == pytest.approx(kls[len(row) - 1 : -1], rel=1e-3) and first.l2 == pytest.approx(
            l2s[len(row) - 1], rel=1e-3
        )
        assert (compared_prompt.kl, compared_prompt.l2, compared_prompt.adapted) == (first.kl[0], first.l2, first.text)
        for found, logits in ((first, both[0]), (base, both[1])):
            chances = np.exp(np.asarray(logits[len(row) - 1], np.float64))
            likeliest = np.argsort(-chances)[:10]
            assert [token for token, _ in found.next_tokens] == [f"t{i}" for i in likeliest]
            assert [p for _, p in found.next_tokens] == pytest.approx(chances[likeliest] / chances.sum(), rel=1e-3)


@pytest.mark.slow
def test_names_are_ones_own(llama, adapted):
    for name, others in (("base", {}), ("a", {"a": adapted}), ("a", {"base": adapted})):
        with pytest.raises(ValueError, match="must be names of their own, none of them 'base'"):
            compared(llama[0], adapted, name=name, others=others)


# As JSON, Markdown and in the terminal

NASTY = "a|b \\| [bold]c[/bold]\nnew [/red] line\r\nthird\rfourth \\[x]"
SHOWN = Comparison(
    (
        PromptComparison("say [i]it[/i]\nnow [/nothing]", NASTY, "plain", 0.5, 2.0),
        PromptComparison("", "  \n", "", 0.0, 0.0),
    ),
    Evaluation(1.5, 10, 2),
    Evaluation(1.25, 10, 2),
)


def test_json_holds_everything():
    fields = json.loads(json.dumps(SHOWN.to_json(), allow_nan=False))
    assert fields["prompts"][0] == {
        "prompt": SHOWN.prompts[0].prompt, "base": NASTY, "adapted": "plain", "kl": 0.5, "l2": 2.0,
    }  # fmt: skip
    assert fields["held_out"] == {
        "base": {"loss": 1.5, "perplexity": math.exp(1.5), "supervised_tokens": 10},
        "adapted": {"loss": 1.25, "perplexity": math.exp(1.25), "supervised_tokens": 10},
    }
    assert Comparison(SHOWN.prompts).to_json()["held_out"] is None


@pytest.mark.slow
def test_a_measured_comparison_is_json_too(llama, adapted):
    result = compared(*llama[:1], adapted, held_out=lambda: batches_with([0.5]))
    fields = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert len(fields["prompts"]) == 3 and fields["held_out"]["adapted"]["loss"] == result.adapted.loss


def cells(line):
    """The cells of a row of a Markdown table, by CommonMark's rule for backslashes."""
    parts = re.findall(r"(?:\\.|[^|\\])+", line)
    return [re.sub(r"\\([\\|])", r"\1", part).strip() for part in parts]


def test_markdown_keeps_cells_and_lines_apart():
    lines = re.split(r"\r\n|\r|\n", SHOWN.to_markdown())
    assert "## say [i]it[/i] now [/nothing]" in lines and "## (empty prompt)" in lines
    heads = [i for i, line in enumerate(lines) if line == "| base | adapted |"]
    assert len(heads) == 2 and all(lines[i + 1] == "| --- | --- |" for i in heads)
    expected = NASTY.replace("\r\n", "<br>").replace("\r", "<br>").replace("\n", "<br>")
    assert cells(lines[heads[0] + 2].strip("|")) == [expected, "plain"]
    assert lines[heads[1] + 2].count("|") == 3
    assert "| base | 1.5000 | 4.48 |" in lines and "| adapted | 1.2500 | 3.49 |" in lines
    assert "held-out" not in Comparison(SHOWN.prompts).to_markdown()


def printed(comparison, width=160):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(comparison, console)
    return console.file.getvalue()


def test_brackets_are_printed_as_they_are():
    out = printed(SHOWN)
    for text in ("say [i]it[/i]", "now [/nothing]", "a|b \\| [bold]c[/bold]", "new [/red] line", "\\[x]", "plain"):
        assert text in out
    assert "KL 0.500 nats, L2 2.0" in out
    assert re.search(r"base\s+1\.5000\s+4\.48", out) and re.search(r"adapted\s+1\.2500\s+3\.49", out)
    assert "held-out" not in printed(Comparison(SHOWN.prompts))


# plot_history

ENTRIES = [
    {"step": 0, "eval_loss": 4.0, "perplexity": 54.6},
    {"step": 1, "loss": 4.1, "learning_rate": 1e-4},
    {"step": 2, "loss": 3.2, "learning_rate": 2e-4, "eval_loss": 3.0, "perplexity": 20.1},
]


def write_log(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_history_is_drawn_as_png(tmp_path):
    plot_history(write_log(tmp_path / "metrics.jsonl", ENTRIES), tmp_path / "history.png")
    data = (tmp_path / "history.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (840, 540) and len(data) > 5000


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_picture_has_a_curve_of_evaluations_where_there_are_some(tmp_path, evaluated):
    entries = [{k: v for k, v in e.items() if evaluated or k != "eval_loss"} for e in ENTRIES]
    plot_history(write_log(tmp_path / "metrics.jsonl", entries), tmp_path / "history.svg")
    picture = (tmp_path / "history.svg").read_text()
    assert "<!-- training -->" in picture and "<!-- loss (nats a token) -->" in picture
    assert ("<!-- evaluation -->" in picture) == evaluated


@pytest.mark.parametrize("entries", [[], ENTRIES[:1]])
def test_a_log_without_a_step_is_refused(tmp_path, entries):
    log = write_log(tmp_path / "metrics.jsonl", entries)
    with pytest.raises(ValueError, match="metrics.jsonl' holds no training step"):
        plot_history(log, tmp_path / "history.png")
    assert not (tmp_path / "history.png").exists()


def test_an_infinite_perplexity_is_null(tmp_path):
    entries = [{"step": 0, "eval_loss": 800.0, "perplexity": None}, *ENTRIES[1:]]
    plot_history(write_log(tmp_path / "metrics.jsonl", entries), tmp_path / "history.svg")
    assert "<!-- evaluation -->" in (tmp_path / "history.svg").read_text()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("garbage", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("7", "must hold an object"),
        ("[1]", "must hold an object"),
        ('{"loss": 1}', "`step` is missing"),
        ('{"step": "3", "loss": 1}', "`step` must be an integer"),
        ('{"step": 3, "loss": NaN}', "`loss` must be a finite number"),
        ('{"step": 3, "loss": 1.0, "learning_rate": null}', "`learning_rate` must be a finite number"),
        ('{"step": 3, "eval_loss": "x"}', "`eval_loss` must be a finite number"),
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path, line, says):
    log = write_log(tmp_path / "metrics.jsonl", ENTRIES)
    log.write_text(log.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"metrics.jsonl line 4.*{says}"):
        plot_history(log, tmp_path / "history.png")
    assert not (tmp_path / "history.png").exists()
