"""End a warm server with its parent, and leave no trace of it. Runs on: Spark task.

``rank_process`` has the server import this module before all others. Elsewhere the import does
nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import signal
import sys

SOCKET_DIRECTORY = "SPARK_MNIST_SOCKET_DIRECTORY"
"""The variable that names the directory of the server's socket; a server alone has it."""
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a server: Spark's daemon hangs up on its whole process group."""
PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``."""


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends.

    A server needs it because a rank holds an end of the pipe by whose closing Python's forkserver
    learns that its parent has ended: a frozen rank would keep both for ever.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _end(*_: object) -> None:
    sys.exit(0)


def _remove(directory: str, server: int) -> None:
    if os.getpid() == server:  # not in a rank, which Python 3.12 has run exit functions, too
        shutil.rmtree(directory, ignore_errors=True)


if SOCKET_DIRECTORY in os.environ:
    atexit.register(_remove, os.environ.pop(SOCKET_DIRECTORY), os.getpid())
    for _number in END_SIGNALS:
        signal.signal(_number, _end)
    end_with_parent(signal.SIGTERM)
