"""`jlora finetune` as a process to be killed, with batches that take a moment, so that there is a middle to be killed in."""

import contextlib
import sys
import time

import jlora.cli
from jlora.finetuning import loop


def finetune(flags, stderr, batch_seconds):
    """Ends the process as the command does."""
    batch = loop.data_lib.batch

    def slow(*args, **kwargs):
        time.sleep(batch_seconds)
        return batch(*args, **kwargs)

    loop.data_lib.batch = slow
    with open(stderr, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        jlora.cli.main(["finetune", *flags])
    sys.exit(0)
