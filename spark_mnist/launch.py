"""Runs the worker on N Spark tasks through Horovod, again where a rank is lost. On the driver.

Leaves the caller as it found him: signal handlers untouched, session alive, no rank running.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence

from pyspark.sql import SparkSession

from spark_mnist import cluster, errors, events, plan, progress, recovery, watchdog

logger = logging.getLogger(__name__)

START_TIMEOUT = 300
"""Seconds that Spark and Horovod get to start all ranks."""
POLL = 0.2
"""Seconds between two looks at the ranks."""
GRACE = 15.0
"""Seconds that ranks get to end once they are told to."""
SLOTS_BACK = 60.0
"""Seconds in which Spark may replace an executor that was lost."""
EXIT_CODE = re.compile(r"Exit code: (\w+)")
"""In the words in which Horovod tells that a rank failed."""

ONE_FIT = threading.Lock()
"""Held while a fit runs: ranks need all their slots, and what Horovod needs replaced is global."""


def train(
    spark: SparkSession,
    training: plan.TrainingPlan,
    *,
    title: str,
    visible: bool,
    max_restarts: int,
) -> list[plan.RankReport]:
    """Train on as many Spark tasks as the plan has ranks.

    When a rank is lost all ranks end, and start again from the last checkpoint.

    Args:
        spark: The session whose tasks become ranks.
        training: What to train.
        title: What the progress bar calls it.
        visible: Whether to show progress.
        max_restarts: How many times ranks start again.

    Returns:
        The reports in rank order; all ranks succeeded and hold the same weights.

    Raises:
        errors.RankError: A rank raised.
        errors.RanksLost: Ranks went away, or hung, more often than they may start again.
        errors.NotFinite: The loss is no number any more.
        errors.RanksDiverged: The ranks ended with different weights.
        errors.TrainingError: The ranks could not start.
    """
    shown = progress.Progress(
        title,
        first=training.first_epoch,
        epochs=training.first_epoch + training.epochs,
        steps=training.world.steps,
        visible=visible,
    )
    with shown:
        for attempt in itertools.count():
            try:
                return _attempt(spark, dataclasses.replace(training, attempt=attempt), shown)
            except errors.RanksLost as error:
                if attempt >= max_restarts:
                    raise
                training = dataclasses.replace(training, resume=_resume(training))
                done = training.resume.epoch if training.resume else training.first_epoch
                logger.debug("%s", error)
                logger.warning(
                    "%s; all ranks start again after epoch %d (restart %d of %d)",
                    *(str(error).partition("\n")[0], done, attempt + 1, max_restarts),
                )
                cluster.wait_for_slots(spark, training.world.size, SLOTS_BACK)
    raise AssertionError("unreachable: the count has no end")


def check(reports: Sequence[plan.RankReport]) -> None:
    """Raise what went wrong on the ranks, if anything did; see ``train``."""
    failed = [(r.failure.time, r.rank, r.failure) for r in reports if r.failure]
    causes = [found for found in failed if not found[2].collective]
    if causes:
        _, rank, failure = min(causes)
        raise errors.RankError(
            f"rank {rank} of {len(reports)} raised {failure.type}: {failure.message}",
            rank=rank,
            rank_traceback=failure.traceback,
        )
    if failed:
        raise errors.RanksLost(f"the connection between ranks broke: {min(failed)[2].message}")
    ended = [report.progress for report in reports if report.progress]
    if not ended[0].kept.epoch:
        last = ended[0].history[-1]
        raise errors.NotFinite(
            f"training came to nothing in epoch {last.epoch}: its losses are {last.losses}, or a "
            "weight is no number; nothing was saved. Lower learning_rate, or look at the features"
        )
    digests = {rank: progress.kept.digest for rank, progress in enumerate(ended)}
    if len(set(digests.values())) != 1:
        raise errors.RanksDiverged(
            f"the ranks ended with different weights, nothing was saved; sha256 by rank: {digests}"
        )


def _resume(training: plan.TrainingPlan) -> plan.Progress | None:
    """How far the attempts so far have come."""
    return recovery.newest(training.work) if training.work else None


def _attempt(
    spark: SparkSession, training: plan.TrainingPlan, shown: progress.Progress
) -> list[plan.RankReport]:
    """Start all ranks and watch them to their end."""
    watch = watchdog.Watchdog(training.world.size, training.heartbeat_timeout)

    def receive(event: events.Event) -> None:
        watch.hear(event)
        if event["rank"] == 0 and "epoch" in event:
            shown.update(event)

    host, bind = cluster.driver_address(spark)
    with events.Inbox(host, bind, receive) as inbox:
        job = _Job(spark, dataclasses.replace(training, inbox=inbox.address))
        job.start()
        try:
            while job.is_alive():
                job.join(POLL)
                if verdict := watch.verdict():
                    raise errors.RanksLost(f"{verdict}{job.tail}")
        finally:
            job.stop()
    if job.error:
        raise _failure(job, watch.lost()) from job.error
    check(job.reports)
    return job.reports


def _failure(job: _Job, lost: str | None) -> errors.TrainingError:
    """What to raise where Horovod came back without reports."""
    code = EXIT_CODE.search(str(job.error))
    if not code:
        return errors.RanksLost(f"{lost or 'the ranks did not start'} ({job.error}){job.tail}")
    killed = ", as of a process that was killed, often for lack of memory"
    words = f"exit code {code[1]}{killed if code[1] == '137' else ''}"
    # Python itself ends a process with 1, for what starting it again would not mend.
    kind = errors.TrainingError if code[1] == "1" else errors.RanksLost
    return kind(f"{lost or 'a rank failed'} ({words}){job.tail}")


def _rank(training: plan.TrainingPlan, environment: str) -> plan.RankReport:
    """Enter the worker. Its imports happen on the rank, so that the driver needs no TensorFlow."""
    rank = int(os.environ["HOROVOD_RANK"])
    cluster.keep_environment(environment)
    with events.Outbox(training.inbox, rank, training.heartbeat_timeout) as outbox:
        from spark_mnist import worker

        return worker.run(training, outbox)


class _Job(threading.Thread):
    """Horovod's run of all ranks, in a thread of its own, so that it can be ended."""

    def __init__(self, spark: SparkSession, training: plan.TrainingPlan) -> None:
        super().__init__(name="spark_mnist ranks", daemon=True)
        self._spark = spark
        self._training = training
        self._output = _Output()
        self._abort: threading.Event | None = None
        """What makes Horovod end its ranks, once they are started."""
        self.reports: list[plan.RankReport] = []
        self.error: BaseException | None = None

    @property
    def tail(self) -> str:
        """The last output of the ranks, for an error's end."""
        return f"\nLast output of the ranks:\n{self._output.tail}" if self._output.tail else ""

    def run(self) -> None:
        """Run the ranks; ends when they have."""
        import horovod.spark

        training, context = self._training, self._spark.sparkContext
        threads = int(context.getConf().get("spark.task.cpus", "1"))
        nics = cluster.interfaces(self._spark)
        kept = cluster.kept_names(self._spark, training.train.urls[0])
        with self._signals_left_alone(), _quiet_threads():
            try:
                self.reports = horovod.spark.run(
                    _rank,
                    args=(dataclasses.replace(training, threads=threads), kept),
                    num_proc=training.world.size,
                    start_timeout=START_TIMEOUT,
                    use_gloo=True,  # else Horovod looks for MPI, and imports TensorFlow to do so
                    env=cluster.rank_environment(),
                    stdout=self._output,
                    stderr=self._output,
                    verbose=0,
                    nics=nics,
                    executable=context.pythonExec,
                )
            except BaseException as error:  # Horovod raises several types for what goes wrong
                self.error = error

    def stop(self) -> None:
        """End the ranks, if they run. Returns when they are gone, or cannot be reached."""
        if self.is_alive() and self._abort:
            self._abort.set()
            self.join(GRACE)
        if self.is_alive():
            from horovod.spark.driver import job_id

            group = f"horovod.spark.run.{job_id.JOB_ID}"
            self._spark.sparkContext.cancelJobGroup(group)
            self.join(GRACE)
        if self.is_alive():
            logger.warning("ranks could not be reached to end them; they end by themselves")

    @contextlib.contextmanager
    def _signals_left_alone(self) -> Iterator[None]:
        """Keep Horovod from replacing the handlers of SIGINT and SIGTERM, and take its event.

        It never puts the handlers back, so a later Ctrl-C would be swallowed, and outside the main
        thread the attempt fails. The event is what they would have set.
        """
        from horovod.runner import gloo_run

        def register() -> threading.Event:
            self._abort = threading.Event()
            return self._abort

        before = gloo_run.register_shutdown_event
        gloo_run.register_shutdown_event = register
        try:
            yield
        finally:
            gloo_run.register_shutdown_event = before


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Log what Horovod's threads raise, in place of printing it: ``run`` raises it again."""
    before = threading.excepthook

    def log(raised: threading.ExceptHookArgs) -> None:
        logger.debug("%s: %s", raised.thread, raised.exc_value)

    threading.excepthook = log
    try:
        yield
    finally:
        threading.excepthook = before


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
