"""`jlora finetune` as a process to be killed, with batches that take a moment, so that there is a middle to be killed in."""

import contextlib
import sys
import time

# Heavy, and imported by no more than one process: the children are forked from it.
import orbax.checkpoint  # noqa: F401
from orbax.checkpoint.checkpoint_managers import preservation_policy  # noqa: F401
from transformers import AutoTokenizer  # noqa: F401

import jlora.cli
from jlora.finetuning import loop

BATCH_SECONDS = 0.1


def finetune(flags, stderr):
    """Ends the process as the command does."""
    batch = loop.data_lib.batch

    def slow(*args, **kwargs):
        time.sleep(BATCH_SECONDS)
        return batch(*args, **kwargs)

    loop.data_lib.batch = slow
    with open(stderr, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        jlora.cli.main(["finetune", *flags])
    sys.exit(0)
