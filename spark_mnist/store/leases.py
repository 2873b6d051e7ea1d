"""Lease files: record which process owns a directory, so that a later fit knows what is abandoned.

A lease names a process. On the machine, and in the container, that wrote it, it tells for sure
whether that process still runs. Elsewhere its age tells, since its owner renews it.
Runs on: driver, rank.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

RENEWAL_S = 60.0
"""Between two renewals of a lease."""
LEASE_S = 900.0
"""For which a lease holds that nobody renews."""
UNRENEWED_S = 3 * 24 * 3600.0
"""The same of the leases of earlier releases, which did not renew them."""


def create() -> bytes:
    """Return the content of a lease for this process, unlike that of any other lease."""
    process = {
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "lease": LEASE_S,
        "id": uuid.uuid4().hex,
    }
    return json.dumps(process).encode()


def is_stale(content: bytes, age: float) -> bool:
    """Return whether the owner of a lease is gone.

    Args:
        content: Of the lease file; anything else is taken for a lease of an earlier release.
        age: Seconds since the file was written.
    """
    try:
        process = json.loads(content)
        machine, started = process["machine"], process["started"]
        running = _started(int(process["pid"]))
        lease = float(process.get("lease", UNRENEWED_S))
    except (ValueError, KeyError, TypeError, AttributeError):
        return age > UNRENEWED_S
    return bool(running != started) if machine == _machine() else age > lease


@contextlib.contextmanager
def renewed(write: Callable[[], None]) -> Iterator[None]:
    """Renew a lease from time to time, in a thread, until the block ends.

    Args:
        write: Writes the lease file again.
    """
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL_S):
            try:
                write()
            except OSError as error:
                logger.warning("a lease could not be renewed: %s", error)

    thread = threading.Thread(target=renew, name="spark_mnist lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(RENEWAL_S)


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
