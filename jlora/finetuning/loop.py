"""`finetune`: the loop over data, step, evaluation and checkpoints."""

import dataclasses
import hashlib
import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import data as data_lib
from jlora._tree import count, nbytes
from jlora.data import InstructDataset, TextDataset
from jlora.finetuning.config import FinetuneConfig
from jlora.finetuning.display import Display, device_name
from jlora.finetuning.run import Run
from jlora.formats.run_settings import RunSettings
from jlora.io import find, load, load_tokenizer, save_adapter
from jlora.lora import LoraConfig, add_lora, combine, split
from jlora.quant import SPECS, QuantizedTensor
from jlora.train import (
    Checkpoints,
    adamw,
    causal_lm_loss,
    evaluate,
    init_state,
    make_step,
    perplexity,
    planned,
    predict,
    warmup_cosine,
)

DEFAULT_EPOCHS = 3.0
DEFAULT_MAX_LENGTH = 512
_SAMPLE_BYTES = 1 << 20  # hashing all of a large model would take longer than loading it
_TIMES_A_RUN = 10  # evaluations and checkpoints, where nothing is said


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run after its state was saved."""


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    adapter_dir: Path
    """PEFT files and the tokenizer."""
    eval_loss: float | None
    """Of the saved adapter, nats a supervised token; None without evaluation data."""
    base_eval_loss: float | None
    """Before the first step."""
    history: tuple[dict[str, Any], ...]
    """The entries of metrics.jsonl."""


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Runs a fine-tuning job, or the rest of one; what `jlora finetune` runs.

    Example: `finetune(FinetuneConfig(model="gpt2", data="my.txt", output="runs/mine"))`

    Raises:
        FileExistsError: `output` exists and `resume` is off.
        FileNotFoundError: a model, data file or run that is not there.
        ValueError: options, data or a resumed run that do not fit.
        TrainingDiverged: the loss is not finite; the last good checkpoint stays.
        Stopped: on SIGINT or SIGTERM, after saving.
    """
    run = Run(config)
    display = Display(quiet=config.quiet)
    try:
        job = _Job.prepare(config, run, display)
    except BaseException:
        run.abandon()
        raise
    checkpoints = Checkpoints(run.checkpoints, keep=config.keep)
    try:
        with _stop_flag() as stop:
            return _train(job, checkpoints, stop)
    finally:
        display.stop()
        checkpoints.close()


@dataclasses.dataclass
class _Job:
    """Everything of a run that is fixed before its first step."""

    config: FinetuneConfig
    lora: LoraConfig
    run: Run
    display: Display
    model: Any
    tokenizer: Any
    adapter: Any
    base: Any
    train: TextDataset | InstructDataset
    evaluation: TextDataset | InstructDataset | None
    rows: int
    steps: int
    eval_every: int
    checkpoint_every: int

    @classmethod
    def prepare(cls, config: FinetuneConfig, run: Run, display: Display) -> "_Job":
        directory = find(config.model)
        tokenizer = load_tokenizer(directory)
        lora = config.lora()
        on_cpu = jax.default_backend() == "cpu"
        dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
        spec = SPECS[config.quantize]() if config.quantize else None
        stack, why = _form(config, on_cpu)
        model, params = load(directory, dtype=jnp.dtype(dtype), quantize=spec, stack=stack, remat=config.remat)
        max_length = config.max_length or min(DEFAULT_MAX_LENGTH, model.config.max_length)
        if max_length > model.config.max_length:
            raise ValueError(
                f"`max_length` must be at most the model's {model.config.max_length} positions; got {max_length}."
            )
        _check_vocabulary(tokenizer, model)
        params = add_lora(params, lora, key=jax.random.key(config.seed))
        adapter, base = split(params)
        train, evaluation = data_lib.load_data(
            config.data,
            tokenizer,
            eval_data=config.eval_data,
            eval_fraction=config.eval_fraction,
            template=config.template,
            max_length=max_length,
            seed=config.seed,
            directory=run.data,
            pack=config.pack,
        )
        rows = config.batch_size * config.accumulate
        per_epoch = data_lib.steps_per_epoch(train, batch_size=rows)
        steps = config.steps or max(1, math.ceil((config.epochs or DEFAULT_EPOCHS) * per_epoch))
        run.check_origin(
            {
                "steps": steps,
                "data": train.digest(),
                "evaluation": evaluation and evaluation.digest(),
                "base": _fingerprint(directory),
            }
        )
        display.facts(
            {
                "model": f"{config.model} ({model.config.model_type}, {model.config.depth} layers, {count(base):,} parameters, "
                f"{nbytes(base) / 2**20:,.0f} MiB as {_stored(base, dtype)})",
                "data": _describe(config.data, train, evaluation),
                "device": f"{device_name()}; layers {'stacked' if stack else 'unrolled'}: {why}",
                "batch": f"{config.batch_size} rows x {config.accumulate} = {rows} rows of {train.length} tokens",
                "steps": f"{steps} ({steps / per_epoch:.3g} epochs of {per_epoch})",
            }
        )
        display.trained(params, adapter)
        every = max(1, steps // _TIMES_A_RUN)
        return cls(
            config, lora, run, display, model, tokenizer, adapter, base, train, evaluation, rows, steps,
            config.eval_every or every, config.checkpoint_every or every,
        )  # fmt: skip

    def settings(self) -> RunSettings:
        config = self.config
        share = config.eval_fraction
        if share is None:
            share = data_lib.EVAL_FRACTION if config.eval_data is None else 0.0
        return RunSettings(
            template=config.template if isinstance(self.train, InstructDataset) else None,
            data=config.data,
            eval_data=config.eval_data,
            eval_fraction=share,
            seed=config.seed,
            max_length=config.max_length or min(DEFAULT_MAX_LENGTH, self.model.config.max_length),
            pack=config.pack,
            quantize=config.quantize,
        )

    def evaluate(self, adapter: Any) -> float:
        assert self.evaluation is not None
        batches = data_lib.eval_batches(self.evaluation, batch_size=self.config.batch_size)
        return evaluate(self.model, combine(adapter, self.base), batches).loss


def _train(job: _Job, checkpoints: Checkpoints, stop: threading.Event) -> FinetuneResult:
    config, run, display = job.config, job.run, job.display
    schedule = warmup_cosine(
        peak=config.learning_rate, steps=job.steps, warmup_steps=math.ceil(config.warmup_fraction * job.steps)
    )
    tx = adamw(
        schedule, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, b1=config.beta1, b2=config.beta2
    )
    state = init_state(job.adapter, tx)
    # Its own stream: the initialization drew from the seed's key itself.
    key = jax.random.fold_in(jax.random.key(config.seed), 0)

    restored = checkpoints.latest if config.resume else None
    if restored is not None:
        state = checkpoints.restore(state, restored)
        display.say(f"resuming after step {restored} of {job.steps}")
    history = run.rewind_log(-1 if restored is None else restored)
    done = restored or 0
    best = min((entry["eval_loss"] for entry in history if entry["step"] and "eval_loss" in entry), default=math.inf)

    def log(entry):
        run.log(entry)
        history.append(entry)

    if restored is None and job.evaluation is not None:
        loss = job.evaluate(state.adapter)
        log({"step": 0, "eval_loss": loss, "perplexity": perplexity(loss)})
        display.evaluated(0, loss)

    def batch_of(step):
        where = {"batch_size": job.rows, "seed": config.seed}
        return data_lib.batch(job.train, step - 1, **where), data_lib.batch_tokens(job.train, step - 1, **where)

    display.start(job.steps, done)
    batch, tokens = batch_of(done + 1)
    # Compiled ahead of its first call, for the compiler's own account of the memory; another shape would be an error.
    step_fn = make_step(causal_lm_loss(job.model), tx, accumulate=config.accumulate)
    step_fn = step_fn.lower(state, job.base, batch, key).compile()
    memory = _memory(job, state, tx, planned(step_fn))
    for step in range(done + 1, job.steps + 1):
        started = time.perf_counter()
        state, metrics = step_fn(state, job.base, batch, jax.random.fold_in(key, step))
        upcoming = batch_of(step + 1)  # while the device works
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(_diverged(step, loss, norm, checkpoints.latest, config))
        entry = {
            "step": step,
            "loss": loss,
            "learning_rate": float(jnp.asarray(schedule(step - 1))),
            "grad_norm": norm,
            "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
        }
        batch, tokens = upcoming
        last = step == job.steps
        if job.evaluation is not None and (last or step % job.eval_every == 0):
            entry["eval_loss"] = job.evaluate(state.adapter)
            if not math.isfinite(entry["eval_loss"]):
                raise TrainingDiverged(_diverged(step, entry["eval_loss"], norm, checkpoints.latest, config))
            entry["perplexity"] = perplexity(entry["eval_loss"])
            display.evaluated(step, entry["eval_loss"])
        log(entry)
        display.step(entry, job.steps)
        # The best is the best of all evaluations: one that a signal happened to save must not be preferred.
        improved = entry.get("eval_loss", math.inf) < best
        best = min(best, entry.get("eval_loss", math.inf))
        if last or stop.is_set() or step % job.checkpoint_every == 0 or (improved and config.save == "best"):
            checkpoints.save(state, eval_loss=entry["eval_loss"] if improved else None)
        if stop.is_set() and not last:
            raise Stopped(f"Stopped after step {step} of {job.steps}; the state is saved. Continue with --resume.")
    display.stop()
    display.say(memory)
    return _finish(job, checkpoints, state, history)


def _finish(job: _Job, checkpoints: Checkpoints, state: Any, history: list[dict[str, Any]]) -> FinetuneResult:
    config, run, display = job.config, job.run, job.display
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    chosen = job.steps
    if config.save == "best" and checkpoints.best is not None:
        chosen = checkpoints.best
        state = checkpoints.restore(state, chosen)
    save_adapter(run.adapter, combine(state.adapter, job.base), config=job.lora, base_model=config.model)
    job.tokenizer.save_pretrained(run.adapter)
    job.settings().write(run.adapter)
    result = FinetuneResult(run.adapter, losses.get(chosen), losses.get(0), tuple(history))
    if result.eval_loss is not None and result.base_eval_loss is not None:
        before, after = perplexity(result.base_eval_loss), perplexity(result.eval_loss)
        display.say(
            f"\nperplexity [bold]{before:.2f}[/] before, [bold]{after:.2f}[/] after ({after / before - 1:+.0%})"
        )
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    display.say(f"adapter of step {chosen}: [bold]{run.adapter}[/] ({size / 1024:,.0f} KiB, loads in PEFT)")
    return result


def _memory(job: _Job, state: Any, tx: Any, compiled: int) -> str:
    """The predicted and the compiled peak of a step, in words; on a GPU the measured one too."""
    rows = {"batch_size": job.config.batch_size, "length": job.train.length, "accumulate": job.config.accumulate}
    predicted = predict(job.model, combine(state.adapter, job.base), tx, **rows).peak
    text = f"memory of a step: {predicted / 2**20:,.0f} MiB predicted, {compiled / 2**20:,.0f} MiB in the compiled step"
    measured = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return text + (f", {measured / 2**20:,.0f} MiB measured" if measured else "")


def _form(config: FinetuneConfig, on_cpu: bool) -> tuple[bool, str]:
    """(stacked?, the reason in words)."""
    if config.form != "auto":
        return config.form == "stacked", "as asked"
    if on_cpu and config.remat == "none":
        return False, "faster on CPU"
    names = (*config.targets, *config.modules_to_save)
    if config.layers_to_transform is not None or any(re.search(r"\.\d+\.|\\d|\[\d", name) for name in names):
        return False, "single layers are named"
    return True, "rematerialized in a scan" if on_cpu else "one compilation for all"


def _stored(base: Any, dtype: str) -> str:
    """How the weights are stored, such as "bfloat16" or "nf4 (4.13 bits a parameter) and bfloat16"."""
    packed = [leaf for leaf in jax.tree.leaves(base, is_leaf=_is_quantized) if _is_quantized(leaf)]
    if not packed:
        return dtype
    bits = 8 * sum(q.nbytes for q in packed) / sum(q.size for q in packed)
    return f"{packed[0].format.name} ({bits:.2f} bits a parameter) and {dtype}"


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _describe(source: str, train: TextDataset | InstructDataset, evaluation: Any) -> str:
    stats = train.stats
    parts = [f"{source}: {stats.tokens:,} tokens, {stats.supervised_tokens:,} supervised", *stats.cut()]
    if evaluation is not None:
        cut = [f"of the evaluation data {part}" for part in evaluation.stats.cut()]
        parts += [f"{evaluation.stats.supervised_tokens:,} to evaluate on", *cut]
    return "; ".join(parts)


def _check_vocabulary(tokenizer: Any, model: Any) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embedding {model.config.vocab_size} rows: they are not of the "
            "same checkpoint. Use the tokenizer files that came with the model."
        )


def _fingerprint(directory: Path) -> str:
    """Of the base checkpoint: its config, and of each file of weights the name, the size, the start and the end."""
    sha = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            sha.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            sha.update(file.read())
    return sha.hexdigest()


def _diverged(step: int, loss: float, norm: float, saved: int | None, config: FinetuneConfig) -> str:
    kept = f"The checkpoint of step {saved} is kept." if saved is not None else "No checkpoint was saved before it."
    return (
        f"Step {step} has loss {loss} and gradient norm {norm}: training has diverged, and the run stops here. {kept} Try "
        f"a lower --learning-rate (it was {config.learning_rate:g}), a longer --warmup-fraction, or --dtype float32."
    )


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one interrupts at once. Handlers only live in the main thread."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_signal(number, frame):
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
