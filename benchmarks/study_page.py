"""`docs/results.md` from what `benchmarks/study.py` measured: every figure and every outcome is derived here from its JSON."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

Runs = dict[str, dict[str, Any]]
SEEDS = ("default", "seed 1", "seed 2")
RATES = ("rate 1e-4", "default", "rate 1e-3", "rate 3e-3")
FULL = ("full 3e-5", "full 1e-4")
SHOWN = 5
"""Answers side by side; all are measured."""
LAST = 8
"""Steps whose mean is "training loss, last steps"."""
PER_CENT_SHIFT = 5.0
"""Of perplexity, from which a style counts as shifted."""
SAME_SPEED = 0.05
HOLDS, NOT_HERE, NOISE = "holds", "does not hold here", "within the noise"

NOT_TESTED = (
    "fp16 (whose KL came out NaN: here it is bfloat16), models of 1B and 3B and GPT-2's larger sizes on GPUs, dropout and weight "
    "decay against overfitting, loss on answers against loss on all tokens, instruct against plain bases, double quantization "
    "and paged optimizers, reinforcement learning, judges and people"
)


# ---- words and numbers ------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def number(value: float | None, digits: int = 3) -> str:
    return "diverged" if value is None else f"{value:.{digits}f}"


def rate_of(run: dict[str, Any]) -> str:
    """3e-4, not 0.0003."""
    return re.sub(r"e-0?", "e-", f"{run['trial']['learning_rate']:.0e}")


def perplexity(loss: float | None) -> str:
    return "" if loss is None else f"{math.exp(min(loss, 99.0)):.1f}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def share_of(run: dict[str, Any]) -> str:
    return f"{100 * run['trained'] / (run['trained'] + run['base']):.2f} %"


def noise_of(runs: Runs) -> float:
    """The range of the held-out losses of runs that differ in their seed alone."""
    losses = [loss_of(runs, name) for name in SEEDS]
    return max(losses) - min(losses)


def loss_of(runs: Runs, name: str) -> float:
    """Held-out; infinite where the run diverged."""
    loss = runs[name]["loss"]
    return math.inf if loss is None else loss


def lower(runs: Runs, name: str, other: str) -> bool:
    """Whether a run is better than another by more than the noise."""
    return loss_of(runs, other) - loss_of(runs, name) > noise_of(runs)


def against(runs: Runs, name: str, other: str, said: str, other_said: str) -> str:
    """ "rank 64 is 0.020 below rank 8", or that they are the same."""
    difference = loss_of(runs, name) - loss_of(runs, other)
    if not math.isfinite(difference):
        return f"{said if loss_of(runs, name) == math.inf else other_said} diverged"
    if abs(difference) <= noise_of(runs):
        return f"{said} and {other_said} are the same within the noise ({abs(difference):.3f} apart)"
    return f"{said} is {abs(difference):.3f} {'below' if difference < 0 else 'above'} {other_said}"


def diverged(run: dict[str, Any]) -> bool:
    """Not finite, or worse than no training."""
    return run["loss"] is None or run["loss"] >= run["base_loss"]


def gained(runs: Runs, name: str) -> float:
    """How far the held-out loss fell below that of the same base untrained."""
    return runs[name]["base_loss"] - loss_of(runs, name)


def median(run: dict[str, Any], key: str) -> float:
    return run[key]["median"]


def best(runs: Runs, names: Iterable[str]) -> str:
    return min(names, key=lambda name: loss_of(runs, name))


def sentence(text: str) -> list[str]:
    return [text[0].upper() + text[1:] + ".", ""]


# ---- the sections -----------------------------------------------------------------------------------------------------


def introduction(report: dict[str, Any]) -> list[str]:
    runs, settings, machine = report["runs"], report["settings"], report["machine"]
    run = runs["default"]
    trial = run["trial"]
    minutes = sum(found["seconds"] for found in runs.values()) / 60
    packages = ", ".join(f"{name} {machine['versions'][name]}" for name in ("jax", "flax"))
    isa = ", ".join(name for name in machine["isa"] if name in ("avx512f", "amx_bf16")) or "neither AVX-512 nor AMX"
    return [
        "# Results on a real model",
        "",
        f"SmolLM2-135M-Instruct (a Q4_1 file of llama.cpp, decoded to bfloat16), fine-tuned to chat like people: "
        f"{settings['records']:,} openings of human conversations ({run['train_tokens']:,} tokens, "
        f"{run['supervised_tokens']:,} of them answers; the package chitchat-dataset, MIT), {settings['held_out']} others held "
        f"out ({run['held_out_tokens']:,} tokens of answers). {settings['steps']} steps of {settings['batch']} records, that is "
        f"{run['passes']:.2f} passes, on {machine['cpu']} with {machine['threads']} cores ({isa}; {packages}).",
        "",
        f"Unless said otherwise: LoRA, rank {trial['rank']}, alpha twice the rank, all linear layers, rate {rate_of(run)}; "
        "one setting is changed at a time. A small model, few steps and one machine: read differences, not absolute numbers. "
        f"Three seeds of the default ended at {', '.join(number(runs[name]['loss']) for name in SEEDS)} nats a token; their "
        f"range, **{noise_of(runs):.3f}, is called the noise**, and smaller differences mean nothing.",
        "",
        f"Everything here is written by `benchmarks/study.py` from `benchmarks/results/study_cpu.json`; no figure or outcome is "
        f"written by hand. Again, in about {round(minutes)} minutes:",
        "",
        "<!-- not run: half an hour -->",
        "```sh",
        "make study",
        "```",
        "",
        "Loss is that of the held-out answers after training, in nats a token; a step's memory is the compiled plan's, the "
        "process's its largest resident size.",
        "",
    ]


_TRAINED = ("", "trained", "share", "adapter file", "loss", "perplexity", "s a step", "memory of a step")


def _trained_row(label: str, run: dict[str, Any]) -> list[str]:
    file = megabytes(run["file_bytes"]) if "file_bytes" in run else ""
    return [
        label, f"{run['trained']:,}", share_of(run), file, number(run["loss"]), perplexity(run["loss"]),
        f"{median(run, 'step_s'):.2f}", gigabytes(run["step_bytes"]),
    ]  # fmt: skip


def ranks(runs: Runs) -> list[str]:
    names = {"rank 8": "rank 8", "default": "rank 16", "rank 64": "rank 64", "q and v": "rank 16, q and v alone",
             "alpha = r": "rank 16, alpha 16"}  # fmt: skip
    said = (
        f"{against(runs, 'rank 64', 'rank 8', 'rank 64', 'rank 8')}; "
        f"{against(runs, 'default', 'q and v', 'all linear layers', 'q and v alone')}; "
        f"{against(runs, 'default', 'alpha = r', 'alpha = 2 r', 'alpha = r')}. Untrained it is "
        f"{number(runs['default']['base_loss'])}"
    )
    rows = [_trained_row(label, runs[name]) for name, label in names.items()]
    return ["## Rank, layers, alpha", "", *table(_TRAINED, rows), *sentence(said)]


def methods(runs: Runs) -> list[str]:
    names = {"default": "LoRA", "DoRA": "DoRA", **{name: f"full, rate {rate_of(runs[name])}" for name in FULL}}
    full = best(runs, FULL)
    memory = runs[full]["step_bytes"] / runs["default"]["step_bytes"]
    slower = median(runs["DoRA"], "step_s") / median(runs["default"], "step_s")
    said = (
        f"{against(runs, 'default', full, 'LoRA', 'the better full fine-tuning')}, which takes {memory:.1f} x the memory of a "
        f"step; {against(runs, 'DoRA', 'default', 'DoRA', 'LoRA')}, at {slower:.2f} x the time of a step"
    )
    rows = [_trained_row(label, runs[name]) for name, label in names.items()]
    return ["## LoRA, DoRA, full fine-tuning", "", *table(_TRAINED, rows), *sentence(said)]


def bases(runs: Runs) -> list[str]:
    names = {
        "default": "bfloat16",
        "NF4": "NF4 (`--quantize nf4`)",
        "kept": "the file's Q4_1 blocks (`--quantize keep`)",
    }
    header = ("base", "base weights", "base loss", "loss", "s a step", "memory of a step", "of the process")
    rows = [
        [label, megabytes(run["base_bytes"]), number(run["base_loss"]), number(run["loss"]), f"{median(run, 'step_s'):.2f}",
         gigabytes(run["step_bytes"]), gigabytes(run["peak_rss_bytes"])]
        for name, label in names.items() for run in [runs[name]]
    ]  # fmt: skip
    worse = runs["NF4"]["base_loss"] - runs["default"]["base_loss"]
    after = loss_of(runs, "NF4") - loss_of(runs, "default")
    kept = abs(runs["kept"]["base_loss"] - runs["default"]["base_loss"])
    said = (
        f"quantizing the file again, to NF4, costs {worse:.3f} nats before training and {after:.3f} after it; keeping its own "
        f"blocks changes the base's loss by {kept:.3f}, and "
        f"{against(runs, 'kept', 'default', 'the adapter on them', 'that on bfloat16')}"
    )
    return ["## The base: dense or packed", "", *table(header, rows), *sentence(said)]


def amounts(runs: Runs) -> list[str]:
    def last(run):
        losses = run["train_losses"][-LAST:]
        return sum(losses) / len(losses)

    header = ("records", "passes", "training loss, last steps", "loss", "perplexity")
    rows = [
        [label, f"{run['passes']:.2f}", number(last(run)), number(run["loss"]), perplexity(run["loss"])]
        for label, run in (("100", runs["100 records"]), ("1,000", runs["default"]))
    ]
    part = gained(runs, "100 records") / gained(runs, "default")
    said = f"with equal steps, {against(runs, 'default', '100 records', '1,000 records', '100')}; 100 bring {part:.0%} of the gain"
    return ["## How many records", "", *table(header, rows), *sentence(said)]


def rates(runs: Runs) -> list[str]:
    header = ("learning rate", *(rate_of(runs[name]) for name in RATES))
    rows = [
        ["loss", *(number(runs[name]["loss"]) for name in RATES)],
        ["perplexity", *(perplexity(runs[name]["loss"]) for name in RATES)],
    ]
    best_rate = best(runs, RATES)
    worst = [rate_of(runs[name]) for name in RATES if diverged(runs[name])]
    said = (
        f"the best of these is {rate_of(runs[best_rate])}; "
        f"{'diverged or worse than no training: ' + ', '.join(worst) if worst else 'none diverged'}"
    )
    return ["## Learning rate", "", *table(header, rows), *sentence(said)]


def text(runs: Runs) -> list[str]:
    names = ("350 tokens", "3,500 tokens")
    steps = [step for step, _ in runs[names[0]]["evaluations"]]
    header = ("perplexity after step", *(str(step) for step in steps))
    rows = [[f"{name} of it", *(perplexity(loss) for _, loss in runs[name]["evaluations"])] for name in names]
    falls = {name: 100 * (1 - math.exp(_best_text(runs[name]) - runs[name]["base_loss"])) for name in names}
    said = (
        f"350 tokens lower the perplexity of the rest of the text by {falls[names[0]]:.0f} %, 3,500 by {falls[names[1]]:.0f} % "
        f"(at the best of these steps)"
    )
    opening = [
        "## A style from raw text",
        "",
        f"The lighthouse keeper's text, `examples/assets/style.txt`: trained on its beginning (rank 8, learning rate "
        f"{rate_of(runs[names[0]])}), measured on its end ({runs[names[0]]['held_out_tokens']:,} tokens).",
        "",
    ]
    return [*opening, *table(header, rows), *sentence(said)]


def _best_text(run: dict[str, Any]) -> float:
    return min(loss for step, loss in run["evaluations"] if step > 0)


def in_use(runs: Runs) -> list[str]:
    found = runs["in use"]
    speed = {name: each["median"] for name, each in found["decode_tokens_per_s"].items()}
    header = ("one row, decoding", "base", "base + adapter", "merged")
    rows = [["tokens/s", *(f"{speed[name]:.1f}" for name in ("base", "adapter", "merged"))]]
    merged, outside, swap = found["merged"], found["outside"], found["swap"]
    swapped = "and answers as it does alone" if swap["equal"] else "but does not answer as it does alone"
    said = (
        f"merged, the logits differ by at most {merged['difference']:.1g} (of {merged['logits']:.0f}; float32), and "
        f"{merged['equal_rows']} of {merged['rows']} greedy answers are the same tokens. Another adapter on the same base "
        f"compiles {swap['compiled']} programs {swapped}. "
        f"On the lighthouse text, of which the conversations know nothing, perplexity goes from {perplexity(outside['base'])} to "
        f"{perplexity(outside['adapted'])}"
    )
    return ["## The adapter in use", "", *table(header, rows), *sentence(said)]


def answers(runs: Runs) -> list[str]:
    sampling = runs["in use"]["sampling"]
    rows = [
        [cell(answer["prompt"]), cell(answer["base"]), cell(answer["adapted"])]
        for answer in runs["in use"]["answers"][:SHOWN]
    ]
    return [
        "## Base and adapter, side by side",
        "",
        f"Temperature {sampling['temperature']}, the same key, at most {sampling['new_tokens']} tokens, none of them picked.",
        "",
        *table(("prompt", "base", "adapter"), rows),
    ]


def cell(text: str) -> str:
    """What a model wrote, as it is, in a cell: no markup, no link, no line of its own."""
    plain = re.sub(r"[^\S\n]+", " ", text.strip()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]|#~":
        plain = plain.replace(mark, f"&#{ord(mark)};" if mark != "#" else mark)
    return re.sub(r"\s*\n\s*", "<br>", plain)


# ---- the claims -------------------------------------------------------------------------------------------------------


def claims(runs: Runs) -> list[tuple[str, str, str]]:
    """(claim, measured, outcome), each from numbers alone."""
    noise, default, use = noise_of(runs), runs["default"], runs["in use"]

    def step_s(name):
        return median(runs[name], "step_s")

    def verdict(holds: bool) -> str:
        return HOLDS if holds else NOT_HERE

    def beyond(gain: float) -> str:
        """Outcome of a claim that one loss is above another."""
        return NOISE if abs(gain) <= noise else verdict(gain > 0)

    def compared(name: str, other: str) -> str:
        """Outcome of a claim that a run is better."""
        return beyond(loss_of(runs, other) - loss_of(runs, name))

    def pair(name: str, other: str) -> str:
        return f"{number(runs[name]['loss'])} against {number(runs[other]['loss'])}"

    gains = {
        "rank (64 for 8)": loss_of(runs, "rank 8") - loss_of(runs, "rank 64"),
        "layers (all for q and v)": loss_of(runs, "q and v") - loss_of(runs, "default"),
        "records (1,000 for 100)": loss_of(runs, "100 records") - loss_of(runs, "default"),
        "rate (3e-4 for 1e-4)": loss_of(runs, "rate 1e-4") - loss_of(runs, "default"),
    }
    most = max(gains, key=lambda name: gains[name])
    full = best(runs, FULL)
    recovered = gained(runs, "default") / gained(runs, full)
    divided = {name: use["model_bytes"]["float32"] / runs[name]["file_bytes"] for name in ("q and v", "rank 64")}
    speed = {name: each["median"] for name, each in use["decode_tokens_per_s"].items()}
    short, long = runs["350 tokens"], runs["3,500 tokens"]
    shift = 100 * (1 - math.exp(_best_text(short) - short["base_loss"]))
    last = short["evaluations"][-1][1]
    packed = runs["NF4"]
    memory = {key: packed[key] / default[key] for key in ("base_bytes", "step_bytes", "peak_rss_bytes")}
    kl = [answer["kl"] for answer in use["answers"]]
    l2 = [answer["l2"] for answer in use["answers"]]
    outside = use["outside"]
    near = not lower(runs, best(runs, RATES), "default")
    return [
        ("A higher rank helps most for its cost", "; ".join(f"{name} {gain:+.3f}" for name, gain in gains.items()),
         NOISE if gains["rank (64 for 8)"] <= noise else verdict(most.startswith("rank ("))),
        ("Rank trades capacity for speed", f"a step: {step_s('rank 8'):.2f} s with 8, {step_s('rank 64'):.2f} s with 64",
         verdict(step_s("rank 64") > (1 + SAME_SPEED) * step_s("rank 8"))),
        ("Rank 16 to start with", f"8: {number(runs['rank 8']['loss'])}, 16: {number(default['loss'])}, 64: "
         f"{number(runs['rank 64']['loss'])}", verdict(not any(lower(runs, name, "default") for name in ("rank 8", "rank 64")))),
        ("Adapt all linear layers", f"{pair('default', 'q and v')} (q and v)", compared("default", "q and v")),
        ("alpha = 2 r (others: alpha = r)", pair("default", "alpha = r"), compared("default", "alpha = r")),
        ("1e-4 is careful", f"1e-4: {number(runs['rate 1e-4']['loss'])}, 3e-4: {number(default['loss'])}",
         compared("default", "rate 1e-4")),
        ("3e-4 is good", f"best: {rate_of(runs[best(runs, RATES)])} ({number(runs[best(runs, RATES)]['loss'])})",
         HOLDS if near else "holds, but a higher rate is better here" if not diverged(default) else NOT_HERE),
        ("5e-4 may diverge", f"twice that, 1e-3: {number(runs['rate 1e-3']['loss'])}; 3e-3: {number(runs['rate 3e-3']['loss'])}; "
         f"untrained {number(default['base_loss'])}", "at twice that it does" if diverged(runs["rate 1e-3"]) else NOT_HERE),
        ("LoRA is very close to full fine-tuning", f"{pair('default', full)}: {recovered:.0%} of its gain with {share_of(default)} "
         "of the parameters", verdict(recovered >= 0.95 or not lower(runs, full, "default"))),
        ("A LoRA file is 1/454 of the model (GPT-2, c_attn)", f"of the model in float32: q and v 1/{divided['q and v']:.0f}, all "
         f"layers at rank 64 1/{divided['rank 64']:.0f}", "depends on rank and layers"),
        ("Merged, it runs without overhead", f"{speed['merged']:.1f} tokens/s, base {speed['base']:.1f}, unmerged "
         f"{speed['adapter']:.1f}", verdict(speed["merged"] >= (1 - SAME_SPEED) * speed["base"])),
        ("Adapters swap at run time", f"{use['swap']['compiled']} programs compiled for the second",
         verdict(use["swap"]["equal"] and use["swap"]["compiled"] == 0)),
        ("350 tokens already shift the style", f"perplexity {perplexity(short['base_loss'])} to {perplexity(_best_text(short))}",
         verdict(shift >= PER_CENT_SHIFT)),
        ("500 to 50,000 tokens are good", f"3,500: {perplexity(_best_text(long))}, 350: {perplexity(_best_text(short))}",
         verdict(_best_text(long) < _best_text(short))),
        ("Take an earlier checkpoint when the last is overfitted", f"350 tokens: best {perplexity(_best_text(short))}, last "
         f"{perplexity(last)}", HOLDS if _best_text(short) < last else "the last was the best here"),
        ("At least 100 good records, better 1,000", f"{pair('100 records', 'default')}; untrained {number(default['base_loss'])}",
         compared("default", "100 records") if gained(runs, "100 records") > noise else NOT_HERE),
        ("Three times the data of the same kind changes little (here ten times)", pair("100 records", "default"),
         verdict(abs(gains["records (1,000 for 100)"]) <= max(noise, 0.1 * gained(runs, "default")))),
        ("LoRA is faster and slightly better than QLoRA", f"a step {step_s('default'):.2f} s against {step_s('NF4'):.2f} s; "
         f"{pair('default', 'NF4')}", verdict(step_s("default") < step_s("NF4") and lower(runs, "default", "NF4"))),
        ("QLoRA takes a quarter of the memory", f"of the base {memory['base_bytes']:.2f}, of a step {memory['step_bytes']:.2f}, of "
         f"the process {memory['peak_rss_bytes']:.2f}", verdict(memory["step_bytes"] <= 0.3)),
        ("The template's system header leaks into answers", f"{use['leaks']['adapted']} of {len(kl)} answers (base: "
         f"{use['leaks']['base']})", verdict(use["leaks"]["adapted"] > 0)),
        ("What is outside the data gets worse", f"lighthouse text: perplexity {perplexity(outside['base'])} to "
         f"{perplexity(outside['adapted'])}", beyond(outside["adapted"] - outside["base"])),
        ("KL to the base 0.12 to 0.41 nats, L2 of 3,700 to 11,000", f"KL {min(kl):.2f} to {max(kl):.2f}, L2 {min(l2):.0f} to "
         f"{max(l2):.0f} (first token of {len(kl)} answers)",
         verdict(max(kl) >= 0.12 and min(kl) <= 0.41 and max(l2) >= 3700)),
    ]  # fmt: skip


def tested(runs: Runs) -> list[str]:
    rows = [[claim, measured, f"**{outcome}**"] for claim, measured, outcome in claims(runs)]
    return [
        "## Claims of practitioners, tested",
        "",
        "From notes of people who fine-tuned GPT-2, Qwen2.5 and Llama 3.2 in PyTorch. What holds there need not hold here, and the "
        "other way round.",
        "",
        *table(("claim", "measured", "outcome"), rows),
        f"Not tested, for want of size or time: {NOT_TESTED}.",
    ]


def page_of(report: dict[str, Any]) -> str:
    runs = report["runs"]
    sections = (ranks, methods, bases, amounts, rates, text, in_use, answers, tested)
    lines = introduction(report) + [line for section in sections for line in section(runs)]
    return "\n".join(lines) + "\n"
