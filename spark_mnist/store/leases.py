"""Lease files: record which process owns a directory, so that a later fit knows what is abandoned.

A lease names a process. In the container that wrote it the process id shows whether the owner still
runs. Elsewhere the age of the lease shows it, since its owner renews it.
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

from spark_mnist.core import processes

logger = logging.getLogger(__name__)

RENEWAL_S = 60.0
"""Seconds between two renewals of a lease."""
LEASE_S = 900.0
"""Seconds for which a lease holds without renewal."""
UNRENEWED_S = 3 * 24 * 3600.0
"""Seconds for which a lease of an earlier release holds; those releases did not renew leases."""


def create() -> bytes:
    """Return the content of a lease for this process, unlike that of any other lease."""
    owner = {
        "machine": _machine_id(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "lease": LEASE_S,
        "id": uuid.uuid4().hex,
    }
    return json.dumps(owner).encode()


def is_stale(content: bytes, age: float) -> bool:
    """Return whether the owner of a lease is gone.

    Args:
        content: Content of the lease file; any other is taken for a lease of an earlier release.
        age: Seconds since the file was written.
    """
    try:
        owner = json.loads(content)
        machine, owner_start = owner["machine"], owner["started"]
        current_start = _start_time(int(owner["pid"]))
        lease_s = float(owner.get("lease", UNRENEWED_S))
    except (ValueError, KeyError, TypeError, AttributeError):
        return age > UNRENEWED_S
    return bool(current_start != owner_start) if machine == _machine_id() else age > lease_s


@contextlib.contextmanager
def renewal(write: Callable[[], None]) -> Iterator[None]:
    """Renew a lease from time to time, in a thread, until the block ends.

    Args:
        write: Function that writes the lease file again.
    """
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEWAL_S):
            try:
                write()
            except OSError as error:
                logger.warning("a lease could not be renewed: %s", error)

    thread = threading.Thread(target=renew, name="spark_mnist lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(RENEWAL_S)


def _start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it does not exist."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(status.rpartition(b")")[2].split()[19])  # the process's name may hold anything


@functools.cache
def _machine_id() -> str:
    """Return what identifies this boot of the machine, the container's PID namespace, and the user.

    Other users' processes may be hidden from this one.
    """
    return f"{processes.machine_id('pid')} {os.getuid()}"
