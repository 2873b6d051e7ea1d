"""SIGTERM ends work as Ctrl-C does: through every ``finally``. On the driver."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

TERMINATED = 143
"""Exit code of a process that SIGTERM ended: 128 + 15."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Libraries know how to leave off in the middle for Ctrl-C alone."""


@contextlib.contextmanager
def unwound() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that what was begun is cleaned up.

    Only where it would end the process anyway: a handler of the caller's stays. Python sets
    handlers in the main thread alone, so elsewhere nothing changes.

    Raises:
        SystemExit: SIGTERM came.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    except Terminated:
        sys.exit(TERMINATED)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwind(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the cleaning up
    pyspark = sys.modules.get("pyspark")
    context = pyspark.SparkContext._active_spark_context if pyspark else None
    if context:
        context.cancelAllJobs()  # as Spark itself does for Ctrl-C
    raise Terminated
