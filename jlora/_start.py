"""Ctrl-C while the `jlora` command imports what it needs: a second in which some libraries turn it into errors of their own.

Imported first of all, and takes effect by that, in the command alone: programs that import jlora keep their handlers.
"""

import os
import signal
import sys
import threading
from pathlib import Path

INTERRUPTED = 130


def leave_on_interrupt() -> None:
    """Until `raise_on_interrupt`, Ctrl-C ends the process at once: nothing has been begun that would have to be ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _leave)


def raise_on_interrupt() -> None:
    """As Python does by itself."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number, frame) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


if sys.argv and Path(sys.argv[0]).stem == "jlora" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    leave_on_interrupt()
