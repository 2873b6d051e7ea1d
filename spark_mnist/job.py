"""One start of all ranks: Horovod's run, in a thread of its own so that it can be ended.

Leaves the process as it was: what Horovod would replace for good stays, or is put back.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Iterator

from pyspark.sql import SparkSession

from spark_mnist import cluster, events, plan

logger = logging.getLogger(__name__)

START_TIMEOUT = 300
"""Seconds that Spark and Horovod get to start all ranks."""
GRACE = 15.0
"""Seconds that ranks get to end once they are told to."""


class Job(threading.Thread):
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


def _rank(training: plan.TrainingPlan, environment: str) -> plan.RankReport:
    """Enter the worker. Its imports happen on the rank, so that the driver needs no TensorFlow."""
    rank = int(os.environ["HOROVOD_RANK"])
    cluster.keep_environment(environment)
    with events.Outbox(training.inbox, rank, training.heartbeat_timeout) as outbox:
        from spark_mnist import worker

        return worker.run(training, outbox)


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
