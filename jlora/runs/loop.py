"""`finetune`: the loop over data, step, evaluation and checkpoints."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jlora._numbers import json_number
from jlora._typing import Json, JsonObject
from jlora.report.run_report import write_report
from jlora.runs.callbacks import Callback, Callbacks, View
from jlora.runs.config import FinetuneConfig
from jlora.runs.display import Display
from jlora.runs.endings import (
    CallbackFailed,
    OutOfMemory,
    Stopped,
    TimeIsUp,
    TrainingDiverged,
    diverged,
    not_finite,
    what_stays,
)
from jlora.runs.experiments import note_experiment
from jlora.runs.flags.saving import seconds_of
from jlora.runs.flags.watching import NONE
from jlora.runs.job import Job
from jlora.runs.log import lowest
from jlora.runs.memory import less_memory, measured_peak, memory_said, predicted
from jlora.runs.outcome import FinetuneResult, finish, skipped_said
from jlora.runs.run import Run
from jlora.runs.signals import StopSignals, TimeLimit
from jlora.runs.steps import Steps
from jlora.runs.watchers import watchers
from jlora.storage.whole import NoSpace, no_space
from jlora.train import Checkpoints, NotFinite, evaluated, init_state, perplexity
from jlora.train.loss_scale import LEAST, loss_scale
from jlora.train.memory import is_out_of_memory


def finetune(config: FinetuneConfig, callbacks: Sequence[Callback] = ()) -> FinetuneResult:
    """Runs a fine-tuning job, or the rest of one; what `jlora finetune` runs.

    Example: `finetune(FinetuneConfig(model="gpt2", data="my.txt", output="runs/mine"))`

    Args:
        callbacks: called as the run goes on, after those that the config's own flags ask for.

    Raises:
        FileExistsError: `output` exists and `resume` is off. (A run that saved nothing is replaced.)
        FileNotFoundError: a model, data file or run that is not there.
        InUse: another process trains in `output`.
        NoSpace: the disk is full; the last checkpoint stays.
        OutOfMemory: with what takes less; the last checkpoint stays.
        ValueError: options, data or a resumed run that do not fit.
        TrainingDiverged: the loss is not finite; the last good checkpoint stays.
        CallbackFailed: a callback raised an error, after saving.
        Stopped: on SIGINT or SIGTERM, or as `TimeIsUp` by the time limit, after saving; or after taking back what a run before
            its first step has written.
    """
    display = Display(quiet=config.quiet)
    limit = None if config.time_limit is None else TimeLimit(seconds_of(config.time_limit))
    every = Callbacks([*watchers(config, display), *callbacks])
    with StopSignals(limit) as stop:
        try:
            with Run(config) as run:
                if run.replaces:
                    display.say("replacing a run that had saved nothing, in ", (str(run.directory), "bold"))
                return _in_directory(config, run, display, stop, every)
        finally:
            display.stop()


def _in_directory(
    config: FinetuneConfig, run: Run, display: Display, stop: StopSignals, callbacks: Callbacks
) -> FinetuneResult:
    """The run, with every way to its end: what is taken back, what is kept, and what is said of it."""
    training = None
    try:
        training = _Training(Job.prepare(config, run, display), stop, callbacks)
        return training.run()
    except BaseException as error:
        began = training is not None and training.began
        # Before the first step libraries make errors of their own of an interrupt; later, an error is one.
        interrupted = stop.signalled and (not began or isinstance(error, KeyboardInterrupt))
        starved = not interrupted and is_out_of_memory(error)
        if training is None or (interrupted and not began):
            run.abandon()
        if isinstance(error, Stopped) and error.args:
            raise
        saved = training.checkpoints.latest if training is not None else run.saved
        if interrupted:
            raise Stopped(f"Stopped; {what_stays(saved, config)}") from error
        if full := no_space(error, run.directory):
            raise NoSpace(full, f"Make room; {what_stays(saved, config)}") from error
        if starved:
            prepared = None if training is None else (training.job, training.tx)
            raise OutOfMemory(less_memory(error, config, saved, run.command(), prepared)) from error
        if isinstance(error, CallbackFailed):
            raise CallbackFailed(f"{error}; {what_stays(saved, config)}") from error.__cause__
        raise


class _Training:
    """The steps of a job, from the last checkpoint to the adapter."""

    def __init__(self, job: Job, stop: StopSignals, callbacks: Callbacks):
        config = job.config
        self.stop, self.callbacks = stop, callbacks
        self.checkpoints = Checkpoints(job.run.checkpoints, keep=config.keep)
        self.began = False
        """Whether a step was made or a checkpoint found: there is something to keep."""
        self.last = job.run.ended or job.steps
        """The last step: that of the job, or the one after which a callback ended it."""
        self.schedule = config.rates(job.steps)
        self.tx = config.around(config.transformation(job.adapter, self.schedule), job.model.dtype)
        self.state = init_state(job.adapter, self.tx)
        # The state has copies of its own: of a whole model, a second one would stay for nothing.
        self.job = dataclasses.replace(job, adapter=jax.eval_shape(lambda: job.adapter))
        self.steps = Steps(self.job, self.tx)
        self.history: list[JsonObject] = []
        self.best = math.inf
        """The lowest evaluation loss after the first step."""
        self.started, self.seconds_before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Of the run up to now, those of the processes before this one among them, as far as their states were saved."""
        return self.seconds_before + time.monotonic() - self.started

    def run(self) -> FinetuneResult:
        try:
            planned = self._run()
        finally:
            self.callbacks.end(self._view())
        self.job.run.check_alone()
        result = finish(self.job, self.checkpoints, self.state, self.history)
        note_experiment(self.job, result, seconds=self.seconds, planned=planned)
        self.job.run.note({"seconds": round(self.seconds, 1), "measured_memory": measured_peak()})
        self._report()
        return result

    def _report(self) -> None:
        """Writes the report, from the run's files; one that cannot be written is said, and ends no run that has trained."""
        job = self.job
        if job.config.report == NONE:
            return
        try:
            write_report([job.run.directory], job.run.directory)
        except Exception as error:  # whatever it is: the adapter is there
            job.display.warn(f"there is no report of this run ({error}); `jlora report {job.run.directory}` writes it")

    def _run(self) -> int:
        """Makes the steps; returns the bytes that the compiler plans for one."""
        job, display = self.job, self.job.display
        done, unlogged = self._resume() if job.config.resume else self._start()
        display.start(job.steps, done)
        batch, tokens = self.steps.batch(done + 1)
        compiled = self.steps.compile(self.state, done, segments="segment_ids" in batch)
        expected = None
        self.stop.defer()
        self.began = True
        if unlogged is not None:
            self._complete(unlogged)
        step = done
        while step < self.last:
            step += 1
            started = time.perf_counter()
            self.state, metrics = self.steps.run(self.state, batch, step)
            # While the device works:
            upcoming = self.steps.batch(step + 1)
            if expected is None:
                expected = predicted(job, self.tx).peak
                job.run.note({"memory": {"predicted": expected, "compiled": compiled}})
                self.checkpoints.make_ready()
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            finite, scaling = math.isfinite(loss) and math.isfinite(norm), loss_scale(self.state.opt_state)
            if not finite and (scaling is None or float(scaling.scale) < LEAST):
                where = not_finite(self.state.adapter, metrics["grad_norms"].tolist())
                raise TrainingDiverged(diverged(step, loss, norm, self.checkpoints.latest, job.config, where))
            skipped = 0 if scaling is None else int(scaling.skipped)
            updates = step - skipped - (1 if finite else 0)  # that were made before this step's
            took = time.perf_counter() - started
            entry = {
                "step": step,
                "loss": json_number(loss),
                "learning_rate": float(jnp.asarray(self.schedule(updates))),
                "grad_norm": json_number(norm),
                "tokens_per_second": round(tokens / took, 1),
            }
            if scaling is not None:
                entry |= {"loss_scale": float(scaling.scale), "skipped": skipped}
            self.stop.note("step", took)
            batch, tokens = upcoming
            self._complete(entry)
        display.stop()
        if expected is not None:
            display.say(memory_said(expected, compiled))
        if (scaling := loss_scale(self.state.opt_state)) is not None and int(scaling.skipped):
            display.say(skipped_said(int(scaling.skipped), float(scaling.scale)))
        return compiled

    def _start(self) -> tuple[int, None]:
        """Before the first step: its evaluation, and the log's entry."""
        self.callbacks.start(self._view())
        if self.job.evaluation is not None:
            entry: JsonObject = {"step": 0}
            self._evaluate(entry)
            self._log(entry)
        return 0, None

    def _resume(self) -> tuple[int, JsonObject | None]:
        """The state of the newest checkpoint that is whole: (steps done, the entry of the last one if it is not in the log)."""
        job = self.job
        with_best = job.config.save == "best"
        state, record, damaged = self.checkpoints.resume(self.state, with_best=with_best)
        for said in damaged:
            job.display.warn(said)
        if said := job.run.note_changes(record.step if record else 0):
            job.display.warn(said)
        if state is None or record is None:
            if damaged:
                job.display.warn("no checkpoint is whole: starting from the beginning, to the same result")
            job.run.log.rewind(-1, first=0)
            return self._start()
        self.state, self.began, self.seconds_before = state, True, record.seconds
        job.display.say(f"resuming after step {record.step} of {job.steps}")
        logged = record.step if record.unlogged is None else record.step - 1
        self.history, wrong = job.run.log.rewind(logged, first=0 if job.evaluation is not None else 1)
        for said in wrong:
            job.display.warn(f"{job.run.log.path}: {said}")
        self.best = min(lowest(self.history), record.best[1] if record.best else math.inf)
        self.callbacks.start(self._view())
        return record.step, None if record.unlogged is None else dict(record.unlogged)

    def _complete(self, made: Mapping[str, Json]) -> None:
        """What comes after a step, whose entry for the log is `made`: evaluation, callbacks, log, checkpoint; and the end, if a
        signal, the time or a callback asks for it. What is ended in between is done again when the run is resumed."""
        job, config, step, entry = self.job, self.job.config, made["step"], dict(made)
        job.run.check_alone()
        try:
            ending = self.callbacks.step(self._view(entry), entry)
            if job.evaluation is not None and (ending or step == self.last or step % job.eval_every == 0):
                ending = self._evaluate(entry) or ending
            self._log(entry)
        except (Stopped, CallbackFailed) as error:
            self._save(unlogged=made)
            raise self._stopped(step) if isinstance(error, Stopped) else error from error.__cause__
        except Exception as error:
            if is_out_of_memory(error):
                self._save(unlogged=made)
            raise
        job.display.step(entry, job.steps)
        if ending and step < self.last:
            job.run.end_after(step, ending)
            job.display.say(f"ending after step {step} of {job.steps}: {ending}")
            self.last = step
        # The best is the best of all evaluations: one that a signal happened to save must not be preferred.
        improved = entry.get("eval_loss", math.inf) < self.best
        self.best = min(self.best, entry.get("eval_loss", math.inf))
        stopping, saving = self.stop.asked and step != self.last, self.stop.take_save()
        due = step == self.last or step % job.checkpoint_every == 0 or (improved and config.save == "best")
        if due or stopping or saving:
            self._save(eval_loss=entry["eval_loss"] if improved else None)
        if saving:
            job.display.say(f"SIGUSR1: the state of step {step} is saved")
        if stopping:
            raise self._stopped(step)

    def _evaluate(self, entry: JsonObject) -> str | None:
        """Puts the evaluation of the state into the entry of its step; returns why the run is to end there, if it is.

        Raises:
            Stopped: when the run is to stop at once.
            TrainingDiverged: when the loss is not finite.
        """
        job, step = self.job, entry["step"]
        try:
            loss = job.evaluate(evaluated(self.state), self.stop)
        except NotFinite as error:
            if step == 0:
                raise
            said = diverged(step, error.value, entry["grad_norm"], self.checkpoints.latest, job.config)
            raise TrainingDiverged(said) from error
        entry |= {"eval_loss": loss, "perplexity": perplexity(loss)}
        job.display.evaluated(step, loss)
        return self.callbacks.evaluation(self._view(entry), entry)

    def _save(self, *, eval_loss: float | None = None, unlogged: Mapping[str, Json] | None = None) -> None:
        started = time.monotonic()
        self.checkpoints.save(self.state, eval_loss=eval_loss, unlogged=unlogged, seconds=self.seconds)
        self.stop.note("save", time.monotonic() - started)

    def _log(self, entry: JsonObject) -> None:
        self.history.append(self.job.run.log.append(entry))
        self.callbacks.log(self._view(), self.history[-1])

    def _view(self, entry: Mapping[str, Json] | None = None) -> View:
        """The run as it stands; with the entry of a step that is not in the log yet."""
        job = self.job
        history = self.history if entry is None else [*self.history, entry]
        return View(
            config=job.config, directory=job.run.directory, id=job.run.id, step=history[-1]["step"] if history else 0,
            steps=job.steps, history=history, model=job.model, tokenizer=job.tokenizer, template=job.settings().template,
            state=self.state, base=job.base,
        )  # fmt: skip

    def _stopped(self, step: int) -> Stopped:
        said = f"topped after step {step} of {self.job.steps}; the state is saved. Continue with"
        if self.stop.signalled:
            return Stopped(f"S{said} --resume.")
        command = self.job.run.command()
        return TimeIsUp(f"The time limit of {self.job.config.time_limit} is near: s{said}\n  {command}")
