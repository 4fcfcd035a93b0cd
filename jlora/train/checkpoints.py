"""Training checkpoints: adapter, optimizer state and step, written by Orbax, whole on disk, and checked when they are read."""

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._typing import Json, JsonObject
from jlora.storage.structured import read_json
from jlora.storage.whole import no_space, remove_all_partial, remove_directory, whole_directory
from jlora.train.step import TrainState
from jlora.tree.paths import layer_path, path_string, per_layer_paths, split_layer_path

RECORD, STATE = "checkpoint.json", "state"
_PLAIN = re.compile(r"[\w/. -]*")
_MORE_BYTES, _MORE_BYTES_A_LEAF = 1 << 17, 1 << 11  # the most that a checkpoint has beside its arrays


class Damaged(ValueError):
    """A checkpoint is not what was saved."""


@dataclasses.dataclass(frozen=True)
class Record:
    """`checkpoint.json`: what a checkpoint holds, and how to tell that it still does."""

    step: int
    eval_loss: float | None
    """Of this state, where it was the lowest so far."""
    best: tuple[int, float] | None
    """(step, evaluation loss) of the lowest up to this state, as far as it was saved."""
    unlogged: Mapping[str, Json] | None
    """The log's entry of this step, when the run was stopped before its evaluation."""
    leaves: Mapping[str, Mapping[str, Json]]
    """Name -> shape, dtype and SHA-256 of the bytes."""
    files: Mapping[str, str]
    """Name -> SHA-256, of the files that Orbax wrote."""
    seconds: float = 0.0
    """Of the run up to this state; older versions did not note it."""


class Checkpoints:
    """A directory of checkpoints, named by step. Keeps the last `keep` and the one with the lowest evaluation loss.

    Each is a directory with Orbax's files in `state/` and a `checkpoint.json` (`Record`). It appears whole or not at all.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1; got {keep}.")
        self.directory = Path(directory)
        self._keep = keep
        self._current: Record | None = None
        """Of the state that was saved or resumed last."""
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_all_partial(self.directory)

    def steps(self) -> list[int]:
        """The steps that have a directory, whole or not."""
        return saved_steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The last saved step."""
        newest = self._newest()
        return newest and newest.step

    @property
    def best(self) -> int | None:
        """The saved step with the lowest evaluation loss, up to the latest."""
        newest = self._newest()
        return newest and newest.best and newest.best[0]

    def _newest(self) -> Record | None:
        if self._current is not None:
            return self._current
        for step in reversed(self.steps()):
            with suppress(Damaged):
                return self.record(step)
        return None

    def make_ready(self) -> None:
        """Imports Orbax ahead of the first `save`: it takes nearly a second, and only training needs it."""
        import orbax.checkpoint  # noqa: F401

    def save(
        self,
        state: TrainState,
        *,
        eval_loss: float | None = None,
        unlogged: Mapping[str, Json] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Writes the state as of `state.step`.

        Args:
            eval_loss: of this state, if it is the lowest so far.
            unlogged: the log's entry of this step, if it is not in the log yet.
            seconds: of the run up to this state.

        Raises:
            NoSpace: when the disk is full. The checkpoints before stay.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        eval_loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
        current = self._current
        if current and (current.step, current.eval_loss, current.unlogged) == (step, eval_loss, unlogged):
            return
        best = (step, eval_loss) if eval_loss is not None else current and current.best
        # On the host once, for Orbax and for the digests.
        leaves = {name: np.asarray(leaf) for name, leaf in _named(state).items()}
        path = self.directory / str(step)
        needed = sum(leaf.nbytes + _MORE_BYTES_A_LEAF for leaf in leaves.values()) + _MORE_BYTES
        with whole_directory(path, replace=True, needed=needed) as partial:
            _require_space(partial / STATE, needed)
            with _plain_name(partial) as plain:
                ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(
                    plain / STATE, args=ocp.args.StandardSave(leaves)
                )
            described = {name: _described(leaf) for name, leaf in leaves.items()}
            record = Record(step, eval_loss, best, unlogged, described, _file_digests(partial), seconds)
            (partial / RECORD).write_text(_text(record))
        self._current = record
        self._remove_old(step, best)

    def _remove_old(self, latest: int, best: tuple[int, float] | None) -> None:
        done = [step for step in self.steps() if step <= latest]
        for step in done[: -self._keep]:
            if best is None or step != best[0]:
                remove_directory(self.directory / str(step))

    def record(self, step: int) -> Record:
        """What `checkpoint.json` says of a step, without a look at the arrays.

        Raises:
            Damaged: when it is not what was written.
        """
        return _read_record(self.directory / str(step), step)

    def verify(self, step: int) -> Record:
        """The record of a step whose files are what was written.

        Raises:
            Damaged: when one is not, naming it.
        """
        record, path = self.record(step), self.directory / str(step)
        for name, digest in record.files.items():
            try:
                found = _sha256(path / name)
            except OSError as error:
                raise Damaged(f"{path / name}: {error.strerror}") from error
            if found != digest:
                raise Damaged(f"{path / name}: not the bytes that were written")
        return record

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of a saved step.

        Args:
            like: a state with the structure, shapes and dtypes to restore; or with the layers stacked that were single ones, or
                single that were stacked.

        Raises:
            Damaged: when it is not what was saved, naming the file.
            ValueError: when the saved state is of another adapter or optimizer, with the difference.
        """
        record, wanted = self.verify(step), _named(like)
        saved = {name: (tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in record.leaves.items()}
        if saved == _shapes(wanted):
            restored = self._arrays(record, wanted)
        else:
            on_host = {n: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for n, (shape, dtype) in saved.items()}
            turned = _other_form({n: np.asarray(x) for n, x in self._arrays(record, on_host).items()})
            if _shapes(turned) != _shapes(wanted):
                raise ValueError(_difference(step, saved, _shapes(wanted)))
            restored = {name: jax.device_put(turned[name], leaf.sharding) for name, leaf in wanted.items()}
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])

    def _arrays(self, record: Record, like: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a checkpoint, with the shapes, dtypes and places of `like`.

        Raises:
            Damaged: when one is not what was saved.
        """
        import orbax.checkpoint as ocp

        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(like))
        path = self.directory / str(record.step)
        with _plain_name(path) as plain:
            restored = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
                plain / STATE, args=ocp.args.StandardRestore(abstract)
            )
        for name, leaf in record.leaves.items():
            if _described(np.asarray(restored[name])) != leaf:
                raise Damaged(f"{path}: {name} is not what was saved")
        return restored

    def resume(self, like: TrainState, *, with_best: bool) -> tuple[TrainState | None, Record | None, list[str]]:
        """(state, record, what is damaged): the last state that is whole; None and None without one.

        Args:
            like: as for `restore`.
            with_best: only a state whose best is whole too, as the run will end with that.

        Raises:
            ValueError: as `restore`, for states of another adapter or optimizer.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                record = self.record(step)
                if with_best and record.best is not None and record.best[0] != step:
                    self.verify(record.best[0])
                state = self.restore(like, step)
            except Damaged as error:
                damaged.append(f"checkpoint {step} is damaged ({error})")
            else:
                self._current = record
                return state, record, damaged
        return None, None, damaged


def saved_steps(directory: Path) -> list[int]:
    """The steps that have something in a directory of checkpoints, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.name == str(int(p.name)))


def _named(state: TrainState) -> JsonObject:
    """Leaves by dotted path: files that any version can read, whatever classes the tree is made of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_string(path).replace("/", "."): leaf for path, leaf in leaves}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}


def _difference(step: int, saved: Mapping[str, object], now: Mapping[str, object]) -> str:
    names = sorted(n for n in saved.keys() | now.keys() if saved.get(n) != now.get(n))
    listed = "\n  ".join(f"{n}: saved {saved.get(n)}, now {now.get(n)}" for n in names[:8])
    return (
        f"The checkpoint of step {step} is of another adapter or optimizer:\n  {listed}\n"
        "Resume with the configuration that wrote it, or start anew with another `--output`."
    )


def _other_form(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacks of layers as single layers, and single layers as stacks, where they are alike."""
    turned: dict[str, np.ndarray] = {}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, leaf in leaves.items():
        path = name.replace(".", "/")
        if (place := split_layer_path(path)) is not None:
            layers.setdefault(place[0], {})[place[1]] = leaf
        elif layer_path(path, 0) is not None and leaf.ndim:
            turned |= zip(per_layer_paths(path, len(leaf)), leaf, strict=True)
        else:
            turned[path] = leaf
    for path, rows in layers.items():
        if len({row.shape for row in rows.values()}) == 1:
            turned[path] = np.stack([rows[index] for index in sorted(rows)])
    return {path.replace("/", "."): leaf for path, leaf in turned.items()}


def _described(leaf: np.ndarray) -> JsonObject:
    digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_digests(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): _sha256(p) for p in sorted(directory.rglob("*")) if p.is_file()}


def _text(record: Record) -> str:
    """The record as JSON, with a digest of itself."""
    fields = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    return json.dumps(fields | {"sha256": _own_digest(fields)}, indent=1) + "\n"


def _own_digest(fields: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_record(path: Path, step: int) -> Record:
    try:
        fields = read_json(path / RECORD)
    except (FileNotFoundError, ValueError) as error:
        raise Damaged(str(error)) from error
    digest = fields.pop("sha256", None)
    if digest != _own_digest(fields) or fields.get("step") != step:
        raise Damaged(f"{path / RECORD}: not what was written for step {step}")
    try:
        best = fields.pop("best")
        return Record(best=best and (best[0], best[1]), **fields)
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path / RECORD}: of another version of jlora") from error


@contextmanager
def _plain_name(path: Path) -> Iterator[Path]:
    """The path, absolute; by way of a link where it has characters that Orbax, which looks for its files with `glob`, takes for a
    pattern, or that tensorstore changes (it makes "/" of a backslash)."""
    path = path.absolute()
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    places = [place for place in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _PLAIN.fullmatch(place)]
    with tempfile.TemporaryDirectory(prefix="jlora-", dir=places[0] if places else None) as place:
        link = Path(place) / "checkpoint"
        link.symlink_to(path, target_is_directory=True)
        yield link


def _require_space(path: Path, needed: int) -> None:
    """Raises the OSError of a full disk or quota. Orbax's threads and tensorstore's would print tracebacks of theirs."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, needed)
        except (AttributeError, OSError) as error:  # not on every system, and not in every file system
            if no_space(error):
                raise
            file.write(bytes(needed))
    path.unlink()
