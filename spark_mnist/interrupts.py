"""SIGTERM ends work as Ctrl-C does: through every ``finally``. On the driver."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

TERMINATED = 143
"""Exit code of a process that SIGTERM ended: 128 + 15."""


@contextlib.contextmanager
def unwound() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that what was begun is cleaned up.

    Only where it would end the process anyway: a handler of the caller's stays. Python sets
    handlers in the main thread alone, so elsewhere nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
