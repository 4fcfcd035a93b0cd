"""The measured processes of `benchmarks/study.py`: one training run each, and what is asked of a trained adapter.

Called by it with two JSON files, the task and the result.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from bench import alternate, quartiles
from safetensors import safe_open

import jlora
import jlora.runs.loop
from jlora import data as data_lib
from jlora.generation import advance, begin, for_decoding
from jlora.runs import TrainingDiverged
from jlora.train import causal_lm_loss, init_state, make_step, planned
from jlora.train.memory import abstract_batch

CHAT_LENGTH, TEXT_LENGTH = 160, 128
NEW_TOKENS, TEMPERATURE = 48, 0.7
ANSWERED = "<|im_end|>"
LEAKS = ("<|im_start|>", ANSWERED, "AI assistant named SmolLM", "trained by Hugging Face", "<|endoftext|>")
"""Pieces of the template, or of the system prompt that it adds, that no answer should hold."""
PROMPTS = (
    "Hi! How was your weekend?",
    "What is the craziest thing you have ever done?",
    "Why is the sky blue?",
    "Give me three study tips.",
    "Translate into Swedish: I would like a cup of coffee.",
    "What is a VPN?",
    "Explain supervised and unsupervised learning.",
    "Write a polite email to ask for a day off.",
    "A pasta dish with five ingredients, please.",
    "Name arguments for and against renewable energy.",
    "How do I reverse a string in Python?",
    "Explain overfitting by an analogy.",
    "Who was Ada Lovelace?",
)
"""Those of the study cards and two to chat about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run."""

    data: str = "chat-1000"
    """Of `FILES`."""
    how: Literal["adapter", "full"] = "adapter"
    """full: every parameter is trained, float32 masters of a bfloat16 model."""
    rank: int = 16
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    use_dora: bool = False
    quantize: Literal["nf4", "keep"] | None = None
    learning_rate: float = 3e-4
    seed: int = 0

    def record(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


FILES = {
    "chat-1000": ("chat-1000.jsonl", "chat-held-out.jsonl"),
    "chat-100": ("chat-100.jsonl", "chat-held-out.jsonl"),
    "text-350": ("text-350.txt", "text-rest.txt"),
    "text-3500": ("text-3500.txt", "text-rest.txt"),
}
"""Name -> (training file, evaluation file), in the data folder."""
TEXT_ROWS = 3
"""Of a step on raw text: 350 tokens are three rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to do."""

    name: str
    trial: dict[str, Any] | None
    """The fields of a `Trial`; None: use the adapters of the trials in `pair`, the first of them foremost."""
    model: str
    place: str
    """Holds data/, and a directory of each run."""
    steps: int
    batch: int
    pair: tuple[str, ...] = ()

    @property
    def data(self) -> Path:
        return Path(self.place) / "data"

    @property
    def output(self) -> Path:
        return Path(self.place) / self.name


def config_of(task: Task, trial: Trial) -> jlora.FinetuneConfig:
    train, held_out = (str(task.data / name) for name in FILES[trial.data])
    is_text = train.endswith(".txt")
    return jlora.FinetuneConfig(
        model=task.model, data=train, eval_data=held_out, output=str(task.output), template="chat",
        max_length=TEXT_LENGTH if is_text else CHAT_LENGTH, batch_size=TEXT_ROWS if is_text else task.batch,
        # Of raw text the way to the end is looked at too: does it overfit?
        steps=task.steps, eval_every=max(1, task.steps // 4) if is_text else task.steps, checkpoint_every=task.steps,
        rank=trial.rank, alpha=trial.alpha or 2.0 * trial.rank, targets=trial.targets, use_dora=trial.use_dora,
        quantize=trial.quantize, learning_rate=trial.learning_rate, seed=trial.seed,
        dtype="bfloat16",
    )  # fmt: skip


# ---- training ---------------------------------------------------------------------------------------------------------


def train_adapter(task: Task, trial: Trial) -> dict[str, Any]:
    """`jlora.finetune`, looked at where it says what a step takes."""
    found: dict[str, Any] = {}
    tokens: list[int] = []
    loop, steps = jlora.runs.loop, jlora.runs.steps
    planned, predicted = steps.planned, loop.predicted

    def noted_plan(compiled):
        size = planned(compiled)
        found["step_bytes"] = max(size, found.get("step_bytes", 0))
        return size

    def noted_job(job, tx):
        order = {"batch_size": job.rows, "seed": job.config.seed, "layout": job.layout}
        tokens.extend(data_lib.batch_tokens(job.train, step, **order) for step in range(job.steps))
        found.update(
            trained=jlora.count(job.adapter), base=jlora.count(job.base), base_bytes=jlora.nbytes(job.base),
            passes=job.steps / data_lib.steps_per_epoch(job.train, batch_size=job.rows),
            **_sizes(job.train, job.evaluation),
        )  # fmt: skip
        return predicted(job, tx)

    steps.planned, loop.predicted = noted_plan, noted_job
    shutil.rmtree(task.output, ignore_errors=True)
    try:
        result = jlora.finetune(config_of(task, trial))
    except TrainingDiverged as error:
        return found | {"diverged": str(error), "loss": None}
    steps = [entry for entry in result.history if entry["step"] > 0]
    file = result.adapter_dir / "adapter_model.safetensors"
    return found | {
        "base_loss": result.base_eval_loss,
        "loss": result.eval_loss,
        "evaluations": [[entry["step"], entry["eval_loss"]] for entry in result.history if "eval_loss" in entry],
        "train_losses": [round(entry["loss"], 5) for entry in steps],
        "step_s": quartiles([n / entry["tokens_per_second"] for n, entry in zip(tokens, steps, strict=True)]),
        "file_bytes": file.stat().st_size,
        "factors": _elements(file),
    }


def train_full(task: Task, trial: Trial) -> dict[str, Any]:
    """Every parameter, by the same step on the same batches: `base` is None."""
    config = config_of(task, trial)
    model, params = jlora.load(task.model, dtype=jnp.bfloat16)
    params = jlora.cast(params, jnp.float32)
    with tempfile.TemporaryDirectory() as place:
        train, held_out = data_lib.load_data(
            config.data, jlora.load_tokenizer(task.model), eval_data=config.eval_data, template="chat",
            max_length=config.max_length or CHAT_LENGTH, seed=trial.seed, directory=place,
            vocab_size=model.config.vocab_size,
        )  # fmt: skip
    assert held_out is not None
    widest = model.config.max_length
    layout = data_lib.lay_out(train, batch_size=config.batch_size, widest=widest)
    eval_layout = data_lib.lay_out(held_out, batch_size=config.batch_size, widest=widest)
    order = {"batch_size": config.batch_size, "seed": trial.seed, "layout": layout}

    def held_out_loss(params):
        batches = data_lib.eval_batches(held_out, batch_size=config.batch_size, layout=eval_layout)
        return jlora.evaluate(model, params, batches).loss

    rates = dataclasses.replace(config, learning_rate=trial.learning_rate).rates(task.steps)
    tx = config.transformation(params, rates)
    found = {
        "trained": jlora.count(params), "base": 0, "base_bytes": 0, "base_loss": held_out_loss(params),
        "passes": task.steps / data_lib.steps_per_epoch(train, batch_size=config.batch_size), **_sizes(train, held_out),
    }  # fmt: skip
    state = init_state(params, tx)
    del params
    step_fn, key = make_step(causal_lm_loss(model), tx), jax.random.key(trial.seed)
    widths = data_lib.widths_of(train, range(task.steps), **order) or layout.widths[-1:]
    segments = "segment_ids" in data_lib.batch(train, 0, **order)
    step_of = {
        width: step_fn.lower(state, None, abstract_batch(layout.rows, width, segments=segments), key).compile()
        for width in widths
    }
    losses, seconds = [], []
    for step in range(task.steps):
        batch = data_lib.batch(train, step, **order)
        started = time.perf_counter()
        state, metrics = step_of[batch["input_ids"].shape[1]](state, None, batch, jax.random.fold_in(key, step + 1))
        losses.append(round(float(metrics["loss"]), 5))
        seconds.append(time.perf_counter() - started)
        print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return found | {
        "loss": held_out_loss(state.adapter),
        "train_losses": losses,
        "step_s": quartiles(seconds),
        "step_bytes": max(map(planned, step_of.values())),
    }


def _sizes(train: Any, held_out: Any) -> dict[str, int]:
    return {
        "train_tokens": train.stats.tokens,
        "supervised_tokens": train.stats.supervised_tokens,
        "held_out_tokens": held_out.stats.supervised_tokens,
        "cut": train.stats.truncated,
    }


def _elements(file: Path) -> int:
    with safe_open(file, framework="numpy") as tensors:
        return sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118


# ---- an adapter in use ------------------------------------------------------------------------------------------------


def use(task: Task) -> dict[str, Any]:
    """Answers, merging, decoding, swapping, and what is outside the data."""
    adapter, tokenizer = Path(task.place) / task.pair[0] / "adapter", jlora.load_tokenizer(task.model)
    asked = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    prompts = [data_lib.prompt_ids(record, tokenizer, template="chat") for record in asked]
    found: dict[str, Any] = {
        "model_bytes": {"file": Path(task.model).stat().st_size},
        **_merging(task, adapter, prompts),
    }
    model, base = jlora.load(task.model, dtype=jnp.bfloat16)
    found["model_bytes"] |= {"float32": 4 * jlora.count(base), "bfloat16": 2 * jlora.count(base)}
    adapted = jlora.load_adapter(adapter, base)
    comparison = jlora.compare(
        model, adapted, list(zip(PROMPTS, prompts, strict=True)), decode=tokenizer.decode, key=jax.random.key(0),
        max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE,
    )  # fmt: skip
    answers = [dataclasses.asdict(p) for p in comparison.prompts]
    for answer in answers:
        for side in ("base", "adapted"):
            answer[side] = answer[side].removesuffix(ANSWERED)
    found["answers"], found["sampling"] = answers, {"new_tokens": NEW_TOKENS, "temperature": TEMPERATURE}
    found["leaks"] = {
        side: sum(any(piece in answer[side] for piece in LEAKS) for answer in answers) for side in ("base", "adapted")
    }
    found["outside"] = {name: _text_loss(task, tokenizer, model, tree) for name, tree in
                        (("base", base), ("adapted", adapted))}  # fmt: skip
    return found | _decoding(model, base, adapted, prompts[0]) | _swapping(task, model, base, prompts[0])


def _merging(task: Task, adapter: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Merged against the adapter beside its base, in float32."""
    model, base = jlora.load(task.model, dtype=jnp.float32)
    beside = jlora.load_adapter(adapter, base)
    merged = jlora.merge(beside)
    logits_of = jax.jit(lambda tree, ids: model.apply({"params": tree}, ids))
    ids = jnp.asarray([prompts[0]])
    one, other = logits_of(beside, ids), logits_of(merged, ids)
    tokens = [
        jlora.generate(model, tree, prompts[:5], max_new_tokens=NEW_TOKENS, temperature=0) for tree in (beside, merged)
    ]
    return {
        "merged": {
            "logits": float(jnp.max(jnp.abs(one))),
            "difference": float(jnp.max(jnp.abs(one - other))),
            "rows": len(tokens[0]),
            "equal_rows": sum(a == b for a, b in zip(*tokens, strict=True)),
        }
    }


def _decoding(model: Any, base: Any, adapted: Any, prompt: list[int]) -> dict[str, Any]:
    """Tokens a second of one row, each in the form for decoding already."""

    def call(tree) -> Callable[[], Any]:
        form, tree = for_decoding(model, tree)
        return lambda: jlora.generate(
            form, tree, [prompt], max_new_tokens=NEW_TOKENS, temperature=0, eos_token_id=[]
        )  # fmt: skip

    trees = {"base": base, "adapter": adapted, "merged": jlora.merge(adapted)}
    times = alternate({name: call(tree) for name, tree in trees.items()}, seconds=0.0, least=3)
    return {"decode_tokens_per_s": {name: quartiles([NEW_TOKENS / t for t in each]) for name, each in times.items()}}


def _swapping(task: Task, model: Any, base: Any, prompt: list[int]) -> dict[str, Any]:
    """Two adapters on one base: does the second compile anything, and is it itself?"""
    with tempfile.TemporaryDirectory() as place:
        for name in task.pair:
            shutil.copytree(Path(task.place) / name / "adapter", Path(place) / name)
        both = jlora.load_adapters(place, base)
    first, second = task.pair

    def answer(tree):
        return jlora.generate(model, tree, [prompt], max_new_tokens=NEW_TOKENS, temperature=0)

    def programs() -> int:
        counts: list[Any] = [begin, advance]
        return sum(program._cache_size() for program in counts)

    answer(jlora.route(both, first))
    before = programs()
    swapped = answer(jlora.route(both, second))
    compiled = programs() - before
    alone = answer(jlora.load_adapter(Path(task.place) / second / "adapter", base))
    return {"swap": {"compiled": compiled, "equal": swapped == alone}}


def _text_loss(task: Task, tokenizer: Any, model: Any, tree: Any) -> float:
    """On the lighthouse text, which the conversations have nothing to do with."""
    with tempfile.TemporaryDirectory() as place:
        text, _ = data_lib.load_data(
            str(task.data / FILES["text-350"][1]), tokenizer, eval_fraction=0.0, max_length=TEXT_LENGTH, seed=0,
            directory=place,
        )  # fmt: skip
        return jlora.evaluate(model, tree, data_lib.eval_batches(text, batch_size=8)).loss


def main(task: Task, result: Path) -> None:
    if task.trial is None:
        found = use(task)
    else:
        fields: dict[str, Any] = task.trial | {"targets": tuple(task.trial["targets"])}
        trial = Trial(**fields)
        found = {"adapter": train_adapter, "full": train_full}[trial.how](task, trial)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Task(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
