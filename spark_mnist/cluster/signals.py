"""SIGINT and SIGTERM end a fit through every ``finally``, wherever they find it. On the driver.

Spark's own handler for SIGINT asks the JVM to cancel all jobs. Where the signal finds the main
thread inside a call to the JVM, both then use one connection: the call gets the other's answer, and
the interrupt is lost or becomes another error. Here a handler asks nothing: a signal that finds
such a call waits until it is over, which it soon is, since another thread cancels the jobs.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from spark_mnist import errors

_thread = threading.local()
"""Has ``last``, what ``_last`` gave when ``unwound`` began."""
TUNING = "pyspark.ml.tuning"
"""Whose fits run in threads of a pool."""
TERMINATED = 143
"""Exit code of a process that SIGTERM ended: 128 + 15."""
AGAIN = 0.5
"""Seconds after which jobs are cancelled again."""
GRACE = 5.0
"""Seconds to wait for a JVM that may be gone."""


@contextlib.contextmanager
def unwound() -> Iterator[None]:
    """Let both signals unwind the stack, so that what was begun is cleaned up.

    A handler of the caller's stays. Python sets handlers in the main thread alone; in others
    ``check`` tells of what came since.

    Raises:
        KeyboardInterrupt: SIGINT came.
        SystemExit: SIGTERM came.
    """
    _thread.last = _last()
    numbers = _ours() if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.getsignal(number) for number in numbers}
    taken = _Taken()
    error: BaseException | None = None
    try:
        for number in numbers:
            signal.signal(number, taken.take)
        yield
    except BaseException as raised:  # raised again below, be it as the interrupt that caused it
        error = raised
    finally:
        taken.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    if taken.number == signal.SIGTERM:
        sys.exit(TERMINATED)
    if taken.number and not isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error
    if error is not None:
        raise error


def check() -> None:
    """Raise where an interrupt of the main thread should end this one's work, too.

    Python tells other threads nothing of it. But an interrupt that nothing has caught is known, and
    so is that nobody waits for this thread any more where Spark ML's tuning has started it.

    Raises:
        errors.FitCancelled: It should.
    """
    if threading.current_thread() is threading.main_thread():
        return
    last = _last()
    interrupted = last is not None and last is not getattr(_thread, "last", None)
    if interrupted or _abandoned():
        raise errors.FitCancelled("interrupted in the main thread; nothing was published")


def _abandoned() -> bool:
    """Whether a ``CrossValidator``, or its like, started this thread and waits for it no more."""
    frames = sys._current_frames()
    mine = [*_calls(frames.pop(threading.get_ident(), None))]
    started = any(module == TUNING for module, _ in mine) and (TUNING, "_fit") not in mine
    return started and not any((TUNING, "_fit") in _calls(frame) for frame in frames.values())


def _calls(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """Yield module and name of a thread's functions, the innermost first."""
    while frame:
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
        frame = frame.f_back


def _last() -> BaseException | None:
    """Return the interrupt by which the main thread's last work ended, if it ended so."""
    last: BaseException | None = getattr(sys, "last_value", None)
    return last if isinstance(last, KeyboardInterrupt) else None


def _ours() -> list[signal.Signals]:
    """Signals that would end the process anyway, or that Spark handles."""
    found = []
    handler = signal.getsignal(signal.SIGINT)
    of_spark = str(getattr(handler, "__module__", "")).startswith("pyspark")
    if of_spark or handler is signal.default_int_handler:
        found.append(signal.SIGINT)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        found.append(signal.SIGTERM)
    return found


class _Taken:
    """The first signal that came, if any."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._around = sys.exc_info()[1]
        self._over = False
        self._enough = threading.Event()
        self._cancelling: threading.Thread | None = None

    def take(self, number: int, frame: FrameType | None) -> None:
        """Raise, or see to it that the main thread does so soon."""
        self.number = self.number or number
        self._raise_if_free(frame)
        if self._over:
            return
        sys.setprofile(lambda frame, *_: self._raise_if_free(frame))
        if not self._cancelling and _calls_the_jvm(frame):
            self._cancelling = threading.Thread(target=self._cancel_jobs, daemon=True)
            self._cancelling.start()

    def end(self) -> None:
        """Raise no more."""
        self._over = True  # before anything is called, which could raise
        self._enough.set()
        if self.number:
            sys.setprofile(None)
        if self._cancelling:
            self._cancelling.join(GRACE)

    def _raise_if_free(self, frame: FrameType | None) -> None:
        """Raise where nothing would be lost by it.

        Not twice, not while an error unwinds the stack already or the JVM is being called, and not
        between blocks, where the handlers would stay as they are.
        """
        unwinding = sys.exc_info()[1] is not self._around
        between = frame is not None and frame.f_globals.get("__name__") in (__name__, "contextlib")
        if self._over or unwinding or between or _calls_the_jvm(frame):
            return
        self._over = True
        self._enough.set()
        sys.setprofile(None)
        raise KeyboardInterrupt

    def _cancel_jobs(self) -> None:
        """End the jobs that the main thread waits for, also those that only begin now."""
        pyspark = sys.modules.get("pyspark")
        context = pyspark.SparkContext._active_spark_context if pyspark else None
        while context and not self._enough.is_set():
            context.cancelAllJobs()  # as Spark itself does for SIGINT
            self._enough.wait(AGAIN)


def _calls_the_jvm(frame: FrameType | None) -> bool:
    return any(module.startswith("py4j.") for module, _ in _calls(frame))
