"""Training checkpoints: adapter, optimizer state and step, through Orbax, atomic on disk."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import jax

from jlora._tree import path_string
from jlora.train.step import TrainState


class Checkpoints:
    """A directory of checkpoints, named by step. Keeps the last `keep` and the one with the lowest evaluation loss.

    A checkpoint that was being written when the process died is not seen again: Orbax writes to a temporary name and renames.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        import orbax.checkpoint as ocp  # nearly a second to import, and only training needs it
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        if keep < 1:
            raise ValueError(f"`keep` must be at least 1; got {keep}.")
        self._ocp = ocp
        # Said whenever a checkpoint falls between two evaluations, which is as it should be.
        logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in record.getMessage())
        best = policy.BestN(
            get_metric_fn=lambda m: m["eval_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(keep), best]),
                best_fn=lambda m: m["eval_loss"],
                best_mode="min",
                cleanup_tmp_directories=True,
                # Adapters are small. A thread that still writes while training goes on is not worth its surprises.
                enable_async_checkpointing=False,
            ),
        )

    def save(self, state: TrainState, *, eval_loss: float | None) -> None:
        """Writes the state as of `state.step`; a step that is saved already is left as it is."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=self._ocp.args.StandardSave(_named(state)),
            metrics=None if eval_loss is None or not math.isfinite(eval_loss) else {"eval_loss": eval_loss},
        )
        self._manager.wait_until_finished()

    @property
    def latest(self) -> int | None:
        """The last saved step."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The saved step with the lowest evaluation loss."""
        return self._manager.best_step()

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of a saved step.

        Args:
            like: a state with the structure, shapes and dtypes to restore.

        Raises:
            ValueError: when the saved state is of another adapter or optimizer, with the difference.
        """
        wanted = _named(like)
        saved = dict(self._manager.item_metadata(step))
        found = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in saved.items()}
        expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
        if found != expected:
            names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            listed = "\n  ".join(f"{n}: saved {found.get(n)}, now {expected.get(n)}" for n in names[:8])
            raise ValueError(
                f"The checkpoint of step {step} is of another adapter or optimizer:\n  {listed}\n"
                "Resume with the configuration that wrote it, or start anew with another `--output`."
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        restored = self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])

    def close(self) -> None:
        self._manager.close()


def _named(state: TrainState) -> dict[str, Any]:
    """Leaves by dotted path: files that any version can read, whatever classes the tree is made of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_string(path).replace("/", "."): leaf for path, leaf in leaves}
