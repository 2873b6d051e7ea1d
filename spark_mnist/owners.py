"""Whose a directory is that a fit works in, so that a later fit can tell what was left behind.

A note names a process. On the machine, and in the container, that wrote it, it tells for sure
whether that process still runs; elsewhere only age tells.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import psutil

MOST_AGE = 3 * 24 * 3600.0
"""Seconds without a new file after which what another machine's process made is left behind."""
TOLERANCE = 1.0
"""Seconds by which the start of one process may seem to differ."""


def note() -> bytes:
    """Name this process."""
    process = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
    return json.dumps(process).encode()


def left(content: bytes, age: float) -> bool:
    """Whether the process of a note is gone.

    Args:
        content: The note.
        age: Seconds since something was written beside it.
    """
    try:
        process = json.loads(content)
        machine, pid, started = process["machine"], process["pid"], process["started"]
    except (ValueError, KeyError, TypeError):
        return age > MOST_AGE
    if machine != _machine():
        return age > MOST_AGE
    now = _started(pid)
    return now is None or abs(now - started) > TOLERANCE


def _started(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None if it is not there."""
    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return None


@functools.cache
def _machine() -> str:
    """This machine since it was started, and the container that numbers this process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
