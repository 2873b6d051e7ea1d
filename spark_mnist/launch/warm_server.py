"""Exit hooks of a warm server: it ends with its parent, and leaves no files. Runs on: Spark task.

``rank_process`` makes the server import this module before all others. In other processes, such as
ranks, the import does nothing.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys

from spark_mnist.core import processes

SOCKET_DIRECTORY = "SPARK_MNIST_SOCKET_DIRECTORY"
"""Environment variable with the directory of the server's socket; only a server has it."""


def _end(*_: object) -> None:
    sys.exit(0)


def _remove(directory: str, server: int) -> None:
    if os.getpid() == server:  # not in a rank: Python 3.12 runs exit functions there, too
        shutil.rmtree(directory, ignore_errors=True)


if SOCKET_DIRECTORY in os.environ:
    atexit.register(_remove, os.environ.pop(SOCKET_DIRECTORY), os.getpid())
    for _number in processes.END_SIGNALS:
        signal.signal(_number, _end)
    processes.end_with_parent(signal.SIGTERM)
