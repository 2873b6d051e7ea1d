"""Whose a directory is that a fit works in, so that a later fit can tell what was left behind.

A note names a process. On the machine, and in the container, that wrote it, it tells for sure
whether that process still runs; elsewhere only age tells.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

MOST_AGE = 3 * 24 * 3600.0
"""Seconds without a new file after which what another machine's process made is left behind."""


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
        machine, started = process["machine"], process["started"]
        begun = _started(int(process["pid"]))
    except (ValueError, KeyError, TypeError):
        return age > MOST_AGE
    return bool(begun != started) if machine == _machine() else age > MOST_AGE


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None if it is not there."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(status.rpartition(b")")[2].split()[19])  # the name before it may hold anything


@functools.cache
def _machine() -> str:
    """This machine since it was started, the container that numbers processes, and the user.

    Other users' processes may be hidden from this one.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
