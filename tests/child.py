"""`jlora finetune` as a process to be killed, with batches that take a moment, so that there is a middle to be killed in."""

import collections
import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax

import jlora.cli
from jlora.runs import steps
from jlora.train import checkpoints

WRITES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def die_at(number):
    """Kills this process before the n-th call, from now on, that makes a change of the disk last."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                die()
            return function(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))


def die_in_save(save, *, write=None, share=None):
    """Kills this process in the n-th save of its run: before the n-th write, or after a share of what the save before took."""
    inner, took = checkpoints.Checkpoints.save, []

    def saved(*args, **kwargs):
        if len(took) == save - 1:
            if write is not None:
                die_at(write)
            else:
                threading.Timer(share * took[-1], die).start()
        started = time.monotonic()
        inner(*args, **kwargs)
        took.append(time.monotonic() - started)
        if len(took) == save:
            die()

    checkpoints.Checkpoints.save = saved


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def finetune(flags, stderr, batch_seconds, dies):
    """Ends the process as the command does."""
    for how, arguments in dies.items():
        globals()[how](**arguments)
    batch = steps.data_lib.batch

    def slow(*args, **kwargs):
        time.sleep(batch_seconds)
        return batch(*args, **kwargs)

    steps.data_lib.batch = slow
    with open(stderr, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        jlora.cli.main(["finetune", *flags])
    sys.exit(0)


def command(flags, cache, output):
    """A command that keeps its compiled programs below `cache`; writes what it says, and counts of JAX's events, to `output`."""
    jax.config.update("jax_compilation_cache_dir", None)  # not that of the tests
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    os.environ["JLORA_CACHE"] = str(cache)
    counts = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
    said, noted, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(noted):
            jlora.cli.main(flags)
    except SystemExit as end:
        code = end.code
    kept = jax.config.jax_compilation_cache_dir
    report = {"code": code, "out": said.getvalue(), "err": noted.getvalue(), "kept": kept, **counts}
    pathlib.Path(output).write_text(json.dumps(report))
