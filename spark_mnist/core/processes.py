"""Processes: how they end with their parents, and the machine that they run on.

Runs on: driver, rank, Spark task.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a warm server: Spark's daemon hangs up on its whole process group."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's ``prctl`` that sets the signal which a process gets when its parent ends."""


def end_with_parent(number: signal.Signals) -> None:
    """Make the kernel send this process a signal when its parent ends.

    Python's forkserver notices the end of its parent when a pipe closes. A rank holds an end of
    that pipe, so a frozen rank would keep the server, and with it itself, alive for ever.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def machine_id(namespace: str) -> str:
    """Return an id of this boot of the machine and of a namespace of this container.

    Args:
        namespace: ``net`` or ``pid``: containers of one machine may share it, or not.

    Raises:
        OSError: The system does not tell.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink(f'/proc/self/ns/{namespace}')}"
