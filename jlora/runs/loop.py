"""`finetune`: the loop over data, step, evaluation and checkpoints."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from jlora import data as data_lib
from jlora._typing import Batch, JsonObject
from jlora.runs.config import FinetuneConfig
from jlora.runs.display import Display
from jlora.runs.job import Job, Stopped
from jlora.runs.log import lowest
from jlora.runs.outcome import FinetuneResult, finish, memory_said, predicted_peak
from jlora.runs.run import Run
from jlora.runs.signals import StopSignals
from jlora.storage.whole import NoSpace, no_space
from jlora.train import (
    Checkpoints,
    NotFinite,
    evaluated,
    init_state,
    make_step,
    perplexity,
    planned,
)
from jlora.train.memory import abstract_batch


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


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
        training = _Training(Job.prepare(config, run, display), stop)
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


class _Training:
    """The steps of a job, from the last checkpoint to the adapter."""

    def __init__(self, job: Job, stop: StopSignals):
        config = job.config
        self.stop = stop
        self.checkpoints = Checkpoints(job.run.checkpoints, keep=config.keep)
        self.began = False
        """Whether a step was made or a checkpoint found: there is something to keep."""
        self.schedule = config.rates(job.steps)
        self.tx = config.transformation(job.adapter, self.schedule)
        self.state = init_state(job.adapter, self.tx)
        # The state has copies of its own: of a whole model, a second one would stay for nothing.
        self.job = dataclasses.replace(job, adapter=jax.eval_shape(lambda: job.adapter))
        # Its own stream: the initialization drew from the seed's key itself.
        self.key = jax.random.fold_in(jax.random.key(config.seed), 0)
        self.history: list[JsonObject] = []
        self.best = math.inf
        """The lowest evaluation loss after the first step."""

    def run(self) -> FinetuneResult:
        job, display = self.job, self.job.display
        done, unlogged = self._resume() if job.config.resume else self._start()
        display.start(job.steps, done)
        batch, tokens = self._batch(done + 1)
        step_of = self._compiled(done, segments="segment_ids" in batch)
        compiled, predicted = max(map(planned, step_of.values())), None
        self.stop.defer()
        self.began = True
        if unlogged is not None:
            self._complete(unlogged)
        for step in range(done + 1, job.steps + 1):
            started = time.perf_counter()
            step_fn = step_of[batch["input_ids"].shape[1]]
            self.state, metrics = step_fn(self.state, job.frozen, batch, jax.random.fold_in(self.key, step))
            # While the device works:
            upcoming = self._batch(step + 1)
            if predicted is None:
                predicted = predicted_peak(job, self.state, self.tx)
                self.checkpoints.make_ready()
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
        if predicted is not None:
            display.say(memory_said(predicted, compiled))
        return finish(job, self.checkpoints, self.state, self.history)

    def _compiled(self, done: int, *, segments: bool) -> dict[int, jax.stages.Compiled]:
        """The step for each width of the batches to come.

        Ahead of their first calls, for the compiler's own account of the memory, and so that a signal need not wait for them.
        """
        job = self.job
        step_fn = make_step(job.loss, self.tx, accumulate=job.config.accumulate)
        widths = data_lib.widths_of(job.train, range(done, job.steps), **self._order) or job.layout.widths[-1:]
        batches = {width: abstract_batch(job.layout.rows, width, segments=segments) for width in widths}
        return {w: step_fn.lower(self.state, job.frozen, batch, self.key).compile() for w, batch in batches.items()}

    @property
    def _order(self) -> dict[str, Any]:
        """What decides which records are in which batch, beside the data."""
        return {"batch_size": self.job.rows, "seed": self.job.config.seed, "layout": self.job.layout}

    def _start(self) -> tuple[int, None]:
        """The log's entry before the first step."""
        if self.job.evaluation is not None:
            loss = self.job.evaluate(evaluated(self.state), self.stop)
            self._log({"step": 0, "eval_loss": loss, "perplexity": perplexity(loss)})
            self.job.display.evaluated(0, loss)
        return 0, None

    def _resume(self) -> tuple[int, JsonObject | None]:
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

    def _batch(self, step: int) -> tuple[Batch, int]:
        """(the batch of a step, its tokens)."""
        train = self.job.train
        return data_lib.batch(train, step - 1, **self._order), data_lib.batch_tokens(train, step - 1, **self._order)

    def _complete(self, entry: JsonObject) -> None:
        """What comes after a step: evaluation, log, checkpoint, and the end if a signal asked for it."""
        job, config, step = self.job, self.job.config, entry["step"]
        last = step == job.steps
        if job.evaluation is not None and (last or step % job.eval_every == 0):
            try:
                loss = job.evaluate(evaluated(self.state), self.stop)
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

    def _log(self, entry: JsonObject) -> None:
        self.history.append(self.job.run.log.append(entry))


def _diverged(step: int, loss: float, norm: float, saved: int | None, config: FinetuneConfig) -> str:
    kept = f"The checkpoint of step {saved} is kept." if saved is not None else "No checkpoint was saved before it."
    return (
        f"Step {step} has loss {loss} and gradient norm {norm}: training has diverged, and the run stops here. {kept} Try "
        f"a lower --learning-rate (it was {config.learning_rate:g}), a longer --warmup-fraction, or --dtype float32."
    )
