"""Checkpoints on their own: what is written is read back wherever it lies, and what is not what was written is never used."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.storage.whole import NoSpace
from jlora.train import Checkpoints, adamw, checkpoints, init_state, offloaded

TX = adamw(1e-3, weight_decay=0.0, max_grad_norm=1.0, b1=0.9, b2=0.999)


def state_of(step):
    """A state that no other step has, with a scalar, an empty leaf's neighbour and bfloat16."""
    draw = np.random.default_rng(step)
    adapter = {"a": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32), "b": {"c": jnp.full((5,), step, jnp.bfloat16)}}
    return init_state(adapter, TX)._replace(step=jnp.int32(step))


def same(state, other):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in pairs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 2, 4 and 6, of which 2 is the best."""
    directory = tmp_path_factory.mktemp("written") / "checkpoints"
    made = Checkpoints(directory, keep=2)
    for step, loss in ((2, 1.5), (4, None), (6, None)):
        made.save(state_of(step), eval_loss=loss)
    return directory


@pytest.fixture
def directory(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def flip(file: Path, at: int = -1):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(**changes):
    """Other values in the record, which stays a JSON object."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_state_in_the_host_s_memory_goes_back_there(tmp_path):
    tx = offloaded(TX)
    state = init_state({"a": jnp.arange(6.0).reshape(3, 2)}, tx)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 and {x.sharding.memory_kind for x in moments} == {"pinned_host"}
    made = Checkpoints(tmp_path, keep=1)
    made.save(state._replace(step=jnp.int32(3)))
    found = made.restore(state, 3)
    assert same(found, state._replace(step=jnp.int32(3)))
    kinds = [x.sharding.memory_kind for x in jax.tree.leaves(state)]
    assert [x.sharding.memory_kind for x in jax.tree.leaves(found)] == kinds


# Paths


NAMES = """r[1] r[a-z] r* what? [ [!x] 50%20 r#1 q&a ünï東京 {x} ~ $HOME a\\b -x .hidden""".split()
ODD_NAMES = ["a b", "two\nlines", os.fsdecode(b"no-utf8-\xff"), "x" * 100]


@pytest.mark.parametrize("name", NAMES + ODD_NAMES)
def test_any_path_is_read_back(tmp_path, name):
    made = Checkpoints(tmp_path / name / "checkpoints", keep=1)
    made.save(state_of(3), eval_loss=1.0)
    made.save(state_of(5))
    again = Checkpoints(tmp_path / name / "checkpoints", keep=1)
    assert (again.latest, again.best, again.steps()) == (5, 3, [3, 5])
    state, record, damaged = again.resume(state_of(0), with_best=True)
    assert same(state, state_of(5)) and record.step == 5 and not damaged
    assert same(again.restore(state_of(0), 3), state_of(3))
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["checkpoints"]


def test_a_relative_path_is_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpoints("r[2]", keep=1).save(state_of(1))
    assert same(Checkpoints(Path("r[2]"), keep=1).restore(state_of(0), 1), state_of(1))


def test_a_temporary_directory_with_brackets_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr(checkpoints.tempfile, "tempdir", str(tmp_path / "[tmp]"))
    Checkpoints(tmp_path / "r[3]", keep=1).save(state_of(1))
    assert same(Checkpoints(tmp_path / "r[3]", keep=1).restore(state_of(0), 1), state_of(1))
    assert not list((tmp_path / "[tmp]").iterdir())


# Damage: the file, and what happens to it


def of_state(pattern):
    """The first file that Orbax wrote under a name."""
    return lambda step: sorted(p for p in (step / "state").glob(pattern) if p.is_file())[0]


def record(step):
    return step / "checkpoint.json"


FILES = {
    "metadata": of_state("_METADATA"),
    "manifest": of_state("manifest.ocdbt"),
    "data": of_state("d/*"),
    "process-manifest": of_state("ocdbt.process_0/manifest.ocdbt"),
    "process-data": of_state("ocdbt.process_0/d/*"),
    "record": record,
}
WAYS = {
    "deleted": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": cut,
    "a bit": lambda file: flip(file, file.stat().st_size // 2),
    "first bit": lambda file: flip(file, 0),
    "last bit": flip,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}
RECORDS = {
    "list": lambda file: file.write_text("[]"),
    "null": lambda file: file.write_text("null"),
    "nothing": lambda file: file.write_text("{}"),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "another step": edit(step=7),
    "another loss": edit(eval_loss=0.5),
    "another best": edit(best=[4, 0.1]),
    "no digests": edit(files={}, leaves={}),
}


def damaged_in(file, way):
    return lambda step: way(file(step))


DAMAGES = {
    **{f"{file} {way}": damaged_in(FILES[file], WAYS[way]) for file in FILES for way in WAYS},
    **{f"record {way}": damaged_in(record, RECORDS[way]) for way in RECORDS},
    "emptied": lambda step: (shutil.rmtree(step), step.mkdir()),
    "a file": lambda step: (shutil.rmtree(step), step.write_text("6")),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "state of another step": lambda step: (
        shutil.rmtree(step / "state"),
        shutil.copytree(step.with_name("4") / "state", step / "state"),
    ),
    "a copy of another step": lambda step: (shutil.rmtree(step), shutil.copytree(step.with_name("4"), step)),
}


@pytest.mark.few(30)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_that_is_whole_is_used(directory, damage):
    DAMAGES[damage](directory / "6")
    made = Checkpoints(directory, keep=2)
    state, found, damaged = made.resume(state_of(0), with_best=False)
    assert found.step == 4 and same(state, state_of(4))
    (said,) = damaged
    assert said.startswith("checkpoint 6 is damaged (") and str(directory / "6") in said
    made.save(state_of(6))  # in its place
    assert made.steps() == [2, 4, 6]
    assert same(Checkpoints(directory, keep=2).restore(state_of(0), 6), state_of(6))


@pytest.mark.parametrize("stray", ["9", "70"])
@pytest.mark.parametrize("what", [Path.mkdir, Path.touch, lambda path: (path / "default").mkdir(parents=True)])
def test_a_stray_entry_with_a_number_for_a_name(directory, stray, what):
    what(directory / stray)
    state, found, (said,) = Checkpoints(directory, keep=2).resume(state_of(0), with_best=True)
    assert found.step == 6 and same(state, state_of(6)) and f"checkpoint {stray} is damaged" in said


@pytest.mark.parametrize("name", ["notes.txt", "06", "6.bak", "-1", "x", "٣"])
def test_other_names_are_nobodys_checkpoints(directory, name):
    (directory / name).mkdir()
    made = Checkpoints(directory, keep=2)
    assert made.steps() == [2, 4, 6] and made.resume(state_of(0), with_best=True)[2] == []
    assert (directory / name).is_dir()


def test_several_are_damaged(directory):
    flip(FILES["data"](directory / "6"))
    record(directory / "4").unlink()
    state, found, damaged = Checkpoints(directory, keep=2).resume(state_of(0), with_best=True)
    assert found.step == 2 and same(state, state_of(2)) and len(damaged) == 2
    cut(FILES["manifest"](directory / "2"))
    state, found, damaged = Checkpoints(directory, keep=2).resume(state_of(0), with_best=True)
    assert state is None and found is None and len(damaged) == 3


def test_a_run_that_ends_with_the_best_needs_it_whole(directory):
    """Its log says that step 2 was the best, and its adapter could not be had: from before it, the run finds it again."""
    flip(FILES["process-data"](directory / "2"))
    assert Checkpoints(directory, keep=2).resume(state_of(0), with_best=False)[1].step == 6
    state, found, damaged = Checkpoints(directory, keep=2).resume(state_of(0), with_best=True)
    assert state is None and found is None and len(damaged) == 3


def test_another_adapter_is_no_damage(directory):
    other = init_state({"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(5)}}, TX)
    with pytest.raises(ValueError, match="of another adapter or optimizer:\n  adapter.a: saved .*, now"):
        Checkpoints(directory, keep=2).resume(other, with_best=False)
    assert Checkpoints(directory, keep=2).steps() == [2, 4, 6]


# Keeping and removing


def test_keeps_the_last_and_the_best(tmp_path):
    made = Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate((3.0, None, 2.0, None, None, None), 1):
        made.save(state_of(step), eval_loss=loss)
    assert (made.steps(), made.latest, made.best) == ([3, 5, 6], 6, 3)
    assert made.record(6).best == (3, 2.0)
    again = Checkpoints(tmp_path, keep=1)
    again.resume(state_of(0), with_best=True)
    again.save(state_of(7))
    assert again.steps() == [3, 7]


def test_what_a_killed_process_left_is_removed(directory):
    """While one was written, while one was removed, and while one was replaced."""
    for name in (".8.partial-abc", ".2.partial-gone", ".6.partial-x-before"):
        shutil.copytree(directory / "4", directory / name)
    record(directory / ".2.partial-gone").unlink()
    made = Checkpoints(directory, keep=2)
    assert sorted(p.name for p in directory.iterdir()) == ["2", "4", "6"]
    assert same(made.restore(state_of(0), 6), state_of(6))


def test_a_half_deleted_one_of_an_older_version_is_removed_in_time(directory):
    (directory / "5").mkdir()
    made = Checkpoints(directory, keep=1)
    assert made.resume(state_of(0), with_best=True)[2] == []
    made.save(state_of(8), eval_loss=1.0)
    assert made.steps() == [8]


def test_the_entry_of_a_step_that_is_not_logged_is_kept_until_it_is(tmp_path):
    entry = {"step": 3, "loss": 0.1 + 0.2, "learning_rate": 1e-4}
    made = Checkpoints(tmp_path, keep=1)
    made.save(state_of(3), unlogged=entry)
    again = Checkpoints(tmp_path, keep=1)
    assert again.resume(state_of(0), with_best=True)[1].unlogged == entry
    again.save(state_of(3), eval_loss=1.0)
    assert Checkpoints(tmp_path, keep=1).resume(state_of(0), with_best=True)[1].unlogged is None
    assert Checkpoints(tmp_path, keep=1).best == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),
    ],
)
def test_a_full_disk_leaves_the_ones_before(directory, monkeypatch, error):
    made = Checkpoints(directory, keep=2)
    made.resume(state_of(0), with_best=True)

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_text", full)
        with pytest.raises(
            NoSpace,
            match=r"^(no space left|the disk quota is used up) on /\S* for '.*/8': needs about \d+ KiB, .* free\.?$",
        ):
            made.save(state_of(8))
    assert sorted(p.name for p in directory.iterdir()) == ["2", "4", "6"] and made.latest == 6
    made.save(state_of(8))
    assert made.steps() == [2, 6, 8]
