"""`jlora finetune` as a process to be killed, with batches that take a moment, so that there is a middle to be killed in."""

import contextlib
import os
import signal
import sys
import time

import jlora.cli
from jlora.runs import loop

WRITES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def die_at(number):
    """Kills this process before the n-th call, from now on, that makes a change of the disk last."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))


def finetune(flags, stderr, batch_seconds, dies_at=None):
    """Ends the process as the command does."""
    if dies_at is not None:
        die_at(dies_at)
    batch = loop.data_lib.batch

    def slow(*args, **kwargs):
        time.sleep(batch_seconds)
        return batch(*args, **kwargs)

    loop.data_lib.batch = slow
    with open(stderr, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        jlora.cli.main(["finetune", *flags])
    sys.exit(0)
