"""Handlers of SIGINT and SIGTERM that end a fit through every ``finally``. Runs on: driver.

Spark's own handler for SIGINT asks the JVM to cancel all jobs. Where the signal arrives while the
main thread is inside a call to the JVM, handler and call use the same connection: the call gets the
handler's answer, and the interrupt is lost or becomes another error. The handler here sends nothing
to the JVM. A signal that arrives during a call waits until the call has ended, which is soon, since
another thread cancels the jobs.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from spark_mnist import errors

_thread_state = threading.local()
"""Has ``interrupt``, the result of ``_last_interrupt`` at the beginning of ``unwound``."""
TUNING_MODULE = "pyspark.ml.tuning"
"""Module of Spark ML whose fits run in threads of a pool."""
SIGTERM_EXIT_CODE = 143
"""Exit code of a process that SIGTERM ended: 128 + 15."""
CANCEL_INTERVAL_S = 0.5
"""Seconds between two cancellations of the jobs."""
CANCEL_TIMEOUT_S = 5.0
"""Seconds to wait for the thread that cancels jobs; the JVM may be gone."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let both signals unwind the stack, so that every ``finally`` runs.

    A handler that the caller has set stays. Python sets handlers only in the main thread; in other
    threads ``check`` raises after an interrupt that came since.

    Raises:
        KeyboardInterrupt: SIGINT came.
        SystemExit: SIGTERM came.
    """
    _thread_state.interrupt = _last_interrupt()
    numbers = _signals_to_handle() if threading.current_thread() is threading.main_thread() else []
    previous_handlers = {number: signal.getsignal(number) for number in numbers}
    first_signal = _FirstSignal()
    error: BaseException | None = None
    try:
        for number in numbers:
            signal.signal(number, first_signal.handle)
        yield
    except BaseException as raised:
        error = raised  # raised again below, or replaced by the interrupt that caused it
    finally:
        first_signal.end()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if first_signal.number == signal.SIGTERM:
        sys.exit(SIGTERM_EXIT_CODE)
    if first_signal.number and not isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error
    if error is not None:
        raise error


def check() -> None:
    """Raise where an interrupt of the main thread must end the work of this thread, too.

    Python does not report an interrupt to other threads. But Python keeps an interrupt that nothing
    has caught; and the stacks show whether anything still waits for a thread that Spark ML's tuning
    has started.

    Raises:
        errors.FitCancelled: The main thread was interrupted, or nothing waits for this thread.
    """
    if threading.current_thread() is threading.main_thread():
        return
    interrupt = _last_interrupt()
    is_new = interrupt is not None and interrupt is not getattr(_thread_state, "interrupt", None)
    if is_new or _is_abandoned():
        raise errors.FitCancelled("interrupted in the main thread; nothing was published")


def _is_abandoned() -> bool:
    """Return whether Spark ML's tuning started this thread and does not wait for it any more."""
    frames = sys._current_frames()
    calls = [*_calls(frames.pop(threading.get_ident(), None))]
    is_tuning = (
        any(module == TUNING_MODULE for module, _ in calls) and (TUNING_MODULE, "_fit") not in calls
    )
    return is_tuning and not any(
        (TUNING_MODULE, "_fit") in _calls(frame) for frame in frames.values()
    )


def _calls(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """Yield module and name of each function on a thread's stack, innermost first."""
    while frame:
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
        frame = frame.f_back


def _last_interrupt() -> BaseException | None:
    """Return the last exception that nothing caught, where it was an interrupt."""
    error: BaseException | None = getattr(sys, "last_value", None)
    return error if isinstance(error, KeyboardInterrupt) else None


def _signals_to_handle() -> list[signal.Signals]:
    """Return the signals that would end the process, or that Spark handles."""
    numbers = []
    handler = signal.getsignal(signal.SIGINT)
    is_from_spark = str(getattr(handler, "__module__", "")).startswith("pyspark")
    if is_from_spark or handler is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        numbers.append(signal.SIGTERM)
    return numbers


class _FirstSignal:
    """The first signal that arrived, if any, and its handler."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._outer_error = sys.exc_info()[1]
        self._is_over = False
        self._stop = threading.Event()
        self._cancel_thread: threading.Thread | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt now, or as soon as the main thread can be interrupted."""
        self.number = self.number or number
        self._raise_if_free(frame)
        if self._is_over:
            return
        sys.setprofile(lambda frame, *_: self._raise_if_free(frame))
        if not self._cancel_thread and _calls_the_jvm(frame):
            self._cancel_thread = threading.Thread(target=self._cancel_jobs, daemon=True)
            self._cancel_thread.start()

    def end(self) -> None:
        """Stop raising, and stop the thread that cancels jobs."""
        self._is_over = True  # before any call, since a call could raise
        self._stop.set()
        if self.number:
            sys.setprofile(None)
        if self._cancel_thread:
            self._cancel_thread.join(CANCEL_TIMEOUT_S)

    def _raise_if_free(self, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt where this is safe.

        Do not raise twice, nor while an error unwinds the stack already or a call to the JVM runs,
        nor in this module or ``contextlib``, while a block begins or ends: its handlers would stay.
        """
        is_unwinding = sys.exc_info()[1] is not self._outer_error
        is_between_blocks = frame is not None and frame.f_globals.get("__name__") in (
            __name__,
            "contextlib",
        )
        if self._is_over or is_unwinding or is_between_blocks or _calls_the_jvm(frame):
            return
        self._is_over = True
        self._stop.set()
        sys.setprofile(None)
        raise KeyboardInterrupt

    def _cancel_jobs(self) -> None:
        """Cancel the jobs that the main thread waits for, repeatedly, as jobs may start later."""
        pyspark = sys.modules.get("pyspark")
        context = pyspark.SparkContext._active_spark_context if pyspark else None
        while context and not self._stop.is_set():
            context.cancelAllJobs()  # as Spark itself does for SIGINT
            self._stop.wait(CANCEL_INTERVAL_S)


def _calls_the_jvm(frame: FrameType | None) -> bool:
    return any(module.startswith("py4j.") for module, _ in _calls(frame))
