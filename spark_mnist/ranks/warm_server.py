"""Exit hooks of a warm server: it ends with its parent, and leaves no files. Runs on: Spark task.

``rank_process`` makes the server import this module before all others. In other processes, such as
ranks, the import does nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import signal
import sys

SOCKET_DIRECTORY = "SPARK_MNIST_SOCKET_DIRECTORY"
"""Environment variable with the directory of the server's socket; only a server has it."""
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a server: Spark's daemon hangs up on its whole process group."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's ``prctl`` that sets the signal which a process gets when its parent ends."""


def end_with_parent(number: signal.Signals) -> None:
    """Make the kernel send this process a signal when its parent ends.

    Python's forkserver notices the end of its parent when a pipe closes. A rank holds an end of
    that pipe, so a frozen rank would keep the server, and with it itself, alive for ever.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _end(*_: object) -> None:
    sys.exit(0)


def _remove(directory: str, server: int) -> None:
    if os.getpid() == server:  # not in a rank: Python 3.12 runs exit functions there, too
        shutil.rmtree(directory, ignore_errors=True)


if SOCKET_DIRECTORY in os.environ:
    atexit.register(_remove, os.environ.pop(SOCKET_DIRECTORY), os.getpid())
    for _number in END_SIGNALS:
        signal.signal(_number, _end)
    end_with_parent(signal.SIGTERM)
