"""The steps of a job: their batches, their keys, and the compiled program of each width."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jlora import data as data_lib
from jlora._typing import Array, Batch
from jlora.runs.job import Job
from jlora.train import TrainState, make_step, planned
from jlora.train.memory import abstract_batch


class Steps:
    """Steps count from 1."""

    def __init__(self, job: Job, tx: optax.GradientTransformation):
        self._job, self._tx = job, tx
        # Its own stream: the initialization drew from the seed's key itself.
        self._key = jax.random.fold_in(jax.random.key(job.config.seed), 0)
        self._compiled: Mapping[int, jax.stages.Compiled] = {}

    def batch(self, step: int) -> tuple[Batch, int]:
        """(the batch of a step, its tokens)."""
        train = self._job.train
        return data_lib.batch(train, step - 1, **self._order), data_lib.batch_tokens(train, step - 1, **self._order)

    def key(self, step: int) -> Array:
        return jax.random.fold_in(self._key, step)

    def compile(self, state: TrainState, done: int, *, segments: bool) -> int:
        """Compiles the step for each width of the batches to come; returns the most bytes that one of them plans.

        Ahead of their first calls, for the compiler's own account of the memory, and so that a signal need not wait for them.
        """
        job = self._job
        step_fn = make_step(job.loss, self._tx, accumulate=job.config.accumulate, grad_norms=True)
        widths = data_lib.widths_of(job.train, range(done, job.steps), **self._order) or job.layout.widths[-1:]
        batches = {width: abstract_batch(job.layout.rows, width, segments=segments) for width in widths}
        self._compiled = {w: step_fn.lower(state, job.frozen, b, self._key).compile() for w, b in batches.items()}
        return max(map(planned, self._compiled.values()))

    def run(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict[str, Array]]:
        """(state, metrics) after a step; the state that is given goes into it."""
        return self._compiled[batch["input_ids"].shape[1]](state, self._job.frozen, batch, self.key(step))

    @property
    def _order(self) -> dict[str, Any]:
        """What decides which records are in which batch, beside the data."""
        return {"batch_size": self._job.rows, "seed": self._job.config.seed, "layout": self._job.layout}
