"""`finetune`: the loop over data, step, evaluation and checkpoints."""

import dataclasses
import filecmp
import math
import re
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp

from jlora import data as data_lib
from jlora.tree.paths import count, nbytes
from jlora.data import InstructDataset, TextDataset
from jlora.runs.config import FinetuneConfig
from jlora.runs.display import Display, device_name
from jlora.runs.log import lowest
from jlora.runs.run import Run
from jlora.runs.signals import StopSignals
from jlora.storage.checkpoint_files import base_fingerprint
from jlora.storage.whole import NoSpace, full_disk_said, no_space, whole_directory
from jlora.files.run_settings import RunSettings
from jlora.files import find, load, load_tokenizer, read_config, save_adapter, untrained_tokens
from jlora.lora import LoraConfig, adapted_leaves, add_lora, combine, split
from jlora.models import model_from_config
from jlora.quant import SPECS, QuantizedTensor
from jlora.train import (
    Checkpoints,
    NotFinite,
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
_TIMES_A_RUN = 10  # evaluations and checkpoints, where nothing is said


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; its state is saved, or it had none."""


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
        FileExistsError: `output` exists and `resume` is off. (A run that saved nothing is replaced.)
        FileNotFoundError: a model, data file or run that is not there.
        InUse: another process trains in `output`.
        NoSpace: the disk is full; the last checkpoint stays.
        ValueError: options, data or a resumed run that do not fit.
        TrainingDiverged: the loss is not finite; the last good checkpoint stays.
        Stopped: on SIGINT or SIGTERM, after saving, or after taking back what a run before its first step has written.
    """
    display = Display(quiet=config.quiet)
    with StopSignals() as stop:
        try:
            with Run(config) as run:
                if run.replaces:
                    display.say("replacing a run that had saved nothing, in ", (str(run.directory), "bold"))
                return _in_directory(config, run, display, stop)
        finally:
            display.stop()


def _in_directory(config: FinetuneConfig, run: Run, display: Display, stop: StopSignals) -> FinetuneResult:
    """The run, with every way to its end: what is taken back, what is kept, and what is said of it."""
    training = None
    try:
        training = _Training(_Job.prepare(config, run, display), stop)
        return training.run()
    except BaseException as error:
        began = training is not None and training.began
        # Before the first step libraries make errors of their own of an interrupt; later, an error is one.
        interrupted = stop.asked and (not began or isinstance(error, KeyboardInterrupt))
        if training is None or (interrupted and not began):
            run.abandon()
        if isinstance(error, Stopped) and error.args:
            raise
        saved = training.checkpoints.latest if training is not None else run.saved
        if interrupted:
            raise Stopped(f"Stopped; {_what_stays(saved, config)}") from error
        if full := no_space(error, run.directory):
            raise NoSpace(full, f"Make room; {_what_stays(saved, config)}") from error
        raise


def _what_stays(saved: int | None, config: FinetuneConfig) -> str:
    """What there is after a run has ended early, and how to go on."""
    if saved is not None:
        return f"the state of step {saved} is saved. Continue with --resume."
    return "no state is saved yet. " + ("Continue with --resume." if config.resume else "Start it again.")


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
    fingerprint: str
    """Of the base's files."""
    train: TextDataset | InstructDataset
    evaluation: TextDataset | InstructDataset | None
    rows: int
    steps: int
    eval_every: int
    checkpoint_every: int

    @classmethod
    def prepare(cls, config: FinetuneConfig, run: Run, display: Display) -> "_Job":
        directory = find(config.model)
        # A family that there is no model for is said before what is wrong with its tokenizer.
        model_from_config(read_config(directory), dtype=jnp.float32)
        tokenizer = load_tokenizer(directory)
        with TemporaryDirectory() as place:  # one that cannot be saved is found before the training
            tokenizer.save_pretrained(place)
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
            vocab_size=model.config.vocab_size,
        )
        fingerprint = base_fingerprint(directory)
        rows = config.batch_size * config.accumulate
        per_epoch = data_lib.steps_per_epoch(train, batch_size=rows)
        steps = config.steps or max(1, math.ceil((config.epochs or DEFAULT_EPOCHS) * per_epoch))
        if said := run.check_origin(
            {
                "steps": steps,
                "data": train.digest(),
                "evaluation": evaluation and evaluation.digest(),
                "base": fingerprint,
            }
        ):
            display.warn(said)
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
        used, learned = train.tokens()
        trained = adapted_leaves(adapter)
        said = untrained_tokens(directory, model, tokenizer, used=used, learned=learned, trained=trained)
        if said is not None:
            display.warn(said)
        display.trained(params, adapter)
        every = max(1, steps // _TIMES_A_RUN)
        return cls(
            config, lora, run, display, model, tokenizer, adapter, base, fingerprint, train, evaluation, rows, steps,
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
            base=self.fingerprint,
        )

    def evaluate(self, adapter: Any, stop: StopSignals) -> float:
        """The loss on the evaluation data.

        Raises:
            Stopped: when a signal came.
        """
        assert self.evaluation is not None
        every = data_lib.eval_batches(self.evaluation, batch_size=self.config.batch_size)

        def batches():
            for batch in every:
                if stop.asked:
                    raise Stopped
                yield batch

        return evaluate(self.model, combine(adapter, self.base), batches()).loss


class _Training:
    """The steps of a job, from the last checkpoint to the adapter."""

    def __init__(self, job: _Job, stop: StopSignals):
        config = job.config
        self.job, self.stop = job, stop
        self.checkpoints = Checkpoints(job.run.checkpoints, keep=config.keep)
        self.began = False
        """Whether a step was made or a checkpoint found: there is something to keep."""
        self.schedule = warmup_cosine(
            peak=config.learning_rate, steps=job.steps, warmup_steps=math.ceil(config.warmup_fraction * job.steps)
        )
        self.tx = adamw(
            self.schedule,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            b1=config.beta1,
            b2=config.beta2,
        )
        self.state = init_state(job.adapter, self.tx)
        # Its own stream: the initialization drew from the seed's key itself.
        self.key = jax.random.fold_in(jax.random.key(config.seed), 0)
        self.history: list[dict[str, Any]] = []
        self.best = math.inf
        """The lowest evaluation loss after the first step."""

    def run(self) -> FinetuneResult:
        job, display = self.job, self.job.display
        done, unlogged = self._resume() if job.config.resume else self._start()
        display.start(job.steps, done)
        batch, tokens = self._batch(done + 1)
        # Compiled ahead of its first call, for the compiler's own account of the memory; another shape would be an error.
        step_fn = make_step(causal_lm_loss(job.model), self.tx, accumulate=job.config.accumulate)
        step_fn = step_fn.lower(self.state, job.base, batch, self.key).compile()
        memory = _memory(job, self.state, self.tx, planned(step_fn))
        self.stop.defer()
        self.began = True
        if unlogged is not None:
            self._complete(unlogged)
        for step in range(done + 1, job.steps + 1):
            started = time.perf_counter()
            self.state, metrics = step_fn(self.state, job.base, batch, jax.random.fold_in(self.key, step))
            upcoming = self._batch(step + 1)  # while the device works
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingDiverged(_diverged(step, loss, norm, self.checkpoints.latest, job.config))
            entry = {
                "step": step,
                "loss": loss,
                "learning_rate": float(jnp.asarray(self.schedule(step - 1))),
                "grad_norm": norm,
                "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
            }
            batch, tokens = upcoming
            self._complete(entry)
        display.stop()
        display.say(memory)
        return _finish(job, self.checkpoints, self.state, self.history)

    def _start(self) -> tuple[int, None]:
        """The log's entry before the first step."""
        if self.job.evaluation is not None:
            loss = self.job.evaluate(self.state.adapter, self.stop)
            self._log({"step": 0, "eval_loss": loss, "perplexity": perplexity(loss)})
            self.job.display.evaluated(0, loss)
        return 0, None

    def _resume(self) -> tuple[int, dict[str, Any] | None]:
        """The state of the newest checkpoint that is whole: (steps done, the entry of the last one if it is not in the log)."""
        job = self.job
        with_best = job.config.save == "best"
        state, record, damaged = self.checkpoints.resume(self.state, with_best=with_best)
        for said in damaged:
            job.display.warn(said)
        if state is None or record is None:
            if damaged:
                job.display.warn("no checkpoint is whole: starting from the beginning, to the same result")
            job.run.log.rewind(-1, first=0)
            return self._start()
        self.state, self.began = state, True
        job.display.say(f"resuming after step {record.step} of {job.steps}")
        logged = record.step if record.unlogged is None else record.step - 1
        self.history, wrong = job.run.log.rewind(logged, first=0 if job.evaluation is not None else 1)
        for said in wrong:
            job.display.warn(f"{job.run.log.path}: {said}")
        self.best = min(lowest(self.history), record.best[1] if record.best else math.inf)
        return record.step, None if record.unlogged is None else dict(record.unlogged)

    def _batch(self, step: int) -> tuple[dict[str, Any], int]:
        """(the batch of a step, its tokens)."""
        where = {"batch_size": self.job.rows, "seed": self.job.config.seed}
        return data_lib.batch(self.job.train, step - 1, **where), data_lib.batch_tokens(
            self.job.train, step - 1, **where
        )

    def _complete(self, entry: dict[str, Any]) -> None:
        """What comes after a step: evaluation, log, checkpoint, and the end if a signal asked for it."""
        job, config, step = self.job, self.job.config, entry["step"]
        last = step == job.steps
        if job.evaluation is not None and (last or step % job.eval_every == 0):
            try:
                loss = job.evaluate(self.state.adapter, self.stop)
            except Stopped:
                self.checkpoints.save(self.state, unlogged=entry)
                raise Stopped(self._stopped(step)) from None
            except NotFinite as error:
                said = _diverged(step, error.value, entry["grad_norm"], self.checkpoints.latest, config)
                raise TrainingDiverged(said) from error
            entry = entry | {"eval_loss": loss, "perplexity": perplexity(loss)}
            job.display.evaluated(step, loss)
        self._log(entry)
        job.display.step(entry, job.steps)
        # The best is the best of all evaluations: one that a signal happened to save must not be preferred.
        improved = entry.get("eval_loss", math.inf) < self.best
        self.best = min(self.best, entry.get("eval_loss", math.inf))
        stopping = self.stop.asked and not last
        if last or stopping or step % job.checkpoint_every == 0 or (improved and config.save == "best"):
            self.checkpoints.save(self.state, eval_loss=entry["eval_loss"] if improved else None)
        if stopping:
            raise Stopped(self._stopped(step))

    def _stopped(self, step: int) -> str:
        return f"Stopped after step {step} of {self.job.steps}; the state is saved. Continue with --resume."

    def _log(self, entry: dict[str, Any]) -> None:
        self.history.append(self.job.run.log.append(entry))


def _finish(job: _Job, checkpoints: Checkpoints, state: Any, history: list[dict[str, Any]]) -> FinetuneResult:
    config, run, display = job.config, job.run, job.display
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    chosen = job.steps
    if config.save == "best" and checkpoints.best is not None:
        chosen = checkpoints.best
        state = checkpoints.restore(state, chosen)
    _write_adapter(job, combine(state.adapter, job.base))
    result = FinetuneResult(run.adapter, losses.get(chosen), losses.get(0), tuple(history))
    if result.eval_loss is not None and result.base_eval_loss is not None:
        before, after = perplexity(result.base_eval_loss), perplexity(result.eval_loss)
        change = f" ({after / before - 1:+.0%})" if math.isfinite(after / before) else ""
        display.say(
            "\nperplexity ", (f"{before:.2f}", "bold"), " before, ", (f"{after:.2f}", "bold"), f" after{change}"
        )
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    display.say(f"adapter of step {chosen}: ", (str(run.adapter), "bold"), f" ({size / 1024:,.0f} KiB, loads in PEFT)")
    return result


def _write_adapter(job: _Job, params: Any) -> None:
    """`OUTPUT/adapter`, whole or not at all. One that is there already, with the same bytes, is left as it is."""
    path = job.run.adapter
    with full_disk_said(path), TemporaryDirectory(prefix=".partial-", dir=path.parent) as place:
        made = Path(place) / path.name
        save_adapter(made, params, config=job.lora, base_model=job.config.model)
        job.tokenizer.save_pretrained(made)
        job.settings().write(made)
        if path.is_dir() and all(_same(file, path / file.name) for file in made.iterdir()):
            return
        with whole_directory(path, replace=True) as partial:
            shutil.copytree(made, partial, dirs_exist_ok=True)


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


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
    return f"{packed[0].spec.name} ({bits:.2f} bits a parameter) and {dtype}"


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _describe(source: str, train: TextDataset | InstructDataset, evaluation: Any) -> str:
    stats = train.stats
    said = [*stats.cut(), *stats.odd()]
    parts = [f"{source}: {stats.tokens:,} tokens, {stats.supervised_tokens:,} supervised", *said]
    if evaluation is not None:
        said = [f"of the evaluation data {part}" for part in (*evaluation.stats.cut(), *evaluation.stats.odd())]
        parts += [f"{evaluation.stats.supervised_tokens:,} to evaluate on", *said]
        if (both := data_lib.trained_too(train, evaluation)) is not None:
            parts.append(both)
    return "; ".join(parts)


def _diverged(step: int, loss: float, norm: float, saved: int | None, config: FinetuneConfig) -> str:
    kept = f"The checkpoint of step {saved} is kept." if saved is not None else "No checkpoint was saved before it."
    return (
        f"Step {step} has loss {loss} and gradient norm {norm}: training has diverged, and the run stops here. {kept} Try "
        f"a lower --learning-rate (it was {config.learning_rate:g}), a longer --warmup-fraction, or --dtype float32."
    )
