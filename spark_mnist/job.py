"""One start of all ranks: Horovod's run, in a thread of its own so that it can be ended.

Leaves the process as it was: what Horovod would replace for good stays, or is put back.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import socketserver
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pyspark.sql import SparkSession

from spark_mnist import cluster, events, plan

logger = logging.getLogger(__name__)

START_TIMEOUT = 300
"""Seconds that Spark and Horovod get to start all ranks."""
LINGER = 0.5
"""Seconds for which a task stays after its rank has ended."""
GRACE = 15.0
"""Seconds that ranks get to end once they are told to."""


class Job(threading.Thread):
    """The thread of one start of all ranks, and what came of it."""

    def __init__(self, spark: SparkSession, training: plan.TrainingPlan) -> None:
        super().__init__(name="spark_mnist ranks", daemon=True)
        self._spark = spark
        self._training = training
        self._output = _Output()
        self.abort = threading.Event()
        """What makes Horovod end its ranks."""
        self.launched = False
        """Whether Horovod listens to that yet."""
        self.reports: list[plan.RankReport] = []
        self.error: BaseException | None = None
        self.cause: BaseException | None = None
        """What ended Spark's job of the ranks, of which Horovod's error says nothing."""
        self.servers: list[socketserver.BaseServer] = []
        """Those that Horovod would leave behind."""
        self._ended = threading.Event()

    @property
    def tail(self) -> str:
        """The last output of the ranks, for an error's end."""
        return f"\nLast output of the ranks:\n{self._output.tail}" if self._output.tail else ""

    def run(self) -> None:
        """Run the ranks; ends when they have."""
        try:
            self.reports = self._run()
        except BaseException as error:  # of any type: a thread would lose it
            self.error = error
        finally:
            self._ended.set()
            for server in self.servers:
                server.shutdown()
                server.server_close()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; returns whether no ranks run.

        An interrupt in ``Thread.join`` would make Python 3.11 take the thread for ended.
        """
        return self.ident is None or self._ended.wait(seconds)

    def stop(self) -> None:
        """End the ranks, if they run. Returns when they are gone, or cannot be reached."""
        self._end_within(GRACE, kindly=True)
        self._end_within(GRACE, kindly=False)
        if not self.wait(0):
            logger.warning("ranks could not be reached to end them; they end by themselves")

    def _run(self) -> list[plan.RankReport]:
        import horovod.spark

        training, context = self._training, self._spark.sparkContext
        threads = cluster.task_cpus(context)
        kept = cluster.kept_names(self._spark, training.train.urls[0])
        _leave_signals_alone()
        _keep_track_of_threads()
        with self._quiet_threads(), _tasks_that_end():
            reports: list[plan.RankReport] = horovod.spark.run(
                _rank,
                args=(dataclasses.replace(training, threads=threads), kept),
                num_proc=training.world.size,
                start_timeout=START_TIMEOUT,
                use_gloo=True,  # else Horovod looks for MPI first, and imports TensorFlow to do so
                env=cluster.rank_environment(),
                stdout=self._output,
                stderr=self._output,
                verbose=0,
                nics=cluster.interfaces(self._spark),
                executable=context.pythonExec,
            )
        return reports

    @contextlib.contextmanager
    def _quiet_threads(self) -> Iterator[None]:
        """Keep what Horovod's threads raise, in place of printing it."""
        before = threading.excepthook
        if isinstance(before, _Hook):  # of a job that could not be ended
            before = before.before
        hook = threading.excepthook = _Hook(self, before)
        try:
            yield
        finally:
            if threading.excepthook is hook:
                threading.excepthook = before

    def _end_within(self, seconds: float, *, kindly: bool) -> None:
        """Tell Horovod to end its ranks, or Spark to end its tasks, until they do."""
        from horovod.spark.driver import job_id

        deadline = time.monotonic() + seconds
        while not self.wait(0) and time.monotonic() < deadline:
            if kindly and self.launched:
                self.abort.set()
            else:  # before Horovod has started ranks, only Spark knows of its tasks
                self._spark.sparkContext.cancelJobGroup(f"horovod.spark.run.{job_id.JOB_ID}")
            self.wait(1.0)


@dataclasses.dataclass(frozen=True)
class _Hook:
    """Takes what Horovod's threads raise for a job, and leaves the rest to the hook before."""

    job: Job
    before: Callable[[threading.ExceptHookArgs], Any]

    def __call__(self, raised: threading.ExceptHookArgs) -> None:
        frames = traceback.walk_tb(raised.exc_traceback)
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
        if any(module.startswith("horovod.") for module in modules):
            logger.debug("%s: %s", raised.thread, raised.exc_value)
            self.job.cause = raised.exc_value
        else:
            self.before(raised)


def _rank(training: plan.TrainingPlan, kept: str) -> plan.RankReport:
    """Enter the worker. Its imports happen on the rank, so that the driver needs no TensorFlow."""
    rank = int(os.environ["HOROVOD_RANK"])
    cluster.keep_environment(kept)
    with events.Outbox(training.inbox, rank, training.heartbeat_timeout) as outbox:
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries' releases, not the user's
        logging.captureWarnings(True)
        logging.getLogger().addHandler(events.Warnings(outbox))
        with _without("sklearn"):  # Keras imports it where it is installed: a fifth of a start
            from spark_mnist import worker

        return worker.run(training, outbox)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Let imports find no package of that name, unless it is imported already."""
    there = name in sys.modules
    if not there:
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system takes as absent
    try:
        yield
    finally:
        if not there:
            del sys.modules[name]


@functools.cache
def _leave_signals_alone() -> None:
    """Keep Horovod from replacing the handlers of SIGINT and SIGTERM for our jobs.

    It never puts them back, so a later Ctrl-C would be swallowed, and outside the main thread the
    attempt fails. What its handlers would set is the job's event. Others' jobs are as they were.
    """
    from horovod.runner import gloo_run

    register = gloo_run.register_shutdown_event

    def registered() -> threading.Event:
        job = threading.current_thread()
        if not isinstance(job, Job):
            event: threading.Event = register()
            return event
        job.launched = True
        return job.abort

    gloo_run.register_shutdown_event = registered


@functools.cache
def _keep_track_of_threads() -> None:
    """Know what Horovod starts for our jobs, in threads that keep no driver from ending.

    Those that wait for a host that was cut off wait forever. Its rendezvous server would listen for
    as long as the driver lives, and its thread hold all that the job has.
    """
    from horovod.runner.http import http_server
    from horovod.runner.util import threads
    from horovod.spark import runner

    in_thread = threads.in_thread

    @functools.wraps(in_thread)
    def started(target: Callable[..., Any], *given: Any, **options: Any) -> threading.Thread:
        job = threading.current_thread()
        if isinstance(job, Job):
            options["daemon"] = True
            server = getattr(target, "__self__", None)
            if isinstance(server, socketserver.BaseServer):
                job.servers.append(server)
        thread: threading.Thread = in_thread(target, *given, **options)
        return thread

    threads.in_thread = runner.in_thread = http_server.in_thread = started


@contextlib.contextmanager
def _tasks_that_end() -> Iterator[None]:
    """Let Horovod's tasks in Spark end soon after their ranks have."""
    from horovod.spark import runner

    horovods = _horovods_task()
    runner._task_fn = _task
    try:
        yield
    finally:
        runner._task_fn = horovods


@functools.cache
def _horovods_task() -> Callable[..., Any]:
    """Horovod's own task, also while a job that could not be ended still has ours in its place."""
    from horovod.spark import runner

    task: Callable[..., Any] = runner._task_fn
    return task


def _task(*given: Any) -> Any:
    """Horovod's own task, without its sleep of three seconds after the rank has ended.

    The driver needs a moment in which to ask for the exit code. Horovod means to give it from the
    start of the rank's process, and counts from the end. That process gets this one's environment,
    and would not find what ``--py-files`` sent, which Spark puts on this one's path alone.
    """
    from horovod.spark import runner
    from pyspark import SparkFiles

    sent = [path for path in sys.path if path.startswith(SparkFiles.getRootDirectory())]
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sent, *filter(None, [known])])
    before = runner.MINIMUM_COMMAND_LIFETIME_S
    runner.MINIMUM_COMMAND_LIFETIME_S = LINGER
    try:
        return runner._task_fn(*given)
    finally:
        runner.MINIMUM_COMMAND_LIFETIME_S = before
        os.environ["PYTHONPATH"] = known
        gc.collect()  # its semaphores, of which Python would warn when Spark ends this process


class _Output:
    """A stream for what the ranks print: logged at debug level, its end kept for an error."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=30)

    def write(self, text: str) -> int:
        """Take a block of output, as Horovod forwards it."""
        for line in text.splitlines():
            self._lines.append(line)
            logger.debug("%s", line)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    @property
    def tail(self) -> str:
        return "\n".join(self._lines)
