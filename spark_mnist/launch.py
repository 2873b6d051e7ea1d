"""Runs the worker on N Spark tasks through Horovod, and turns failures into errors. On the driver.

Leaves the caller as it found him: signal handlers untouched, session alive.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence

from pyspark.sql import SparkSession

from spark_mnist import errors, events, plan, progress

logger = logging.getLogger(__name__)

SLOTS_TIMEOUT = 4.0
"""Seconds that executors which are still starting get to offer their slots."""

_ONE_FIT = threading.Lock()
"""Held while ranks run: what Horovod needs replaced is global to the process."""


def slots(spark: SparkSession) -> int:
    """How many tasks the session can run at the same time, on the executors it has now."""
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    found: int = context.maxNumConcurrentTasks(profile)
    return found


def ranks(spark: SparkSession, num_proc: int | None) -> int:
    """The number of ranks to run: the given one, or all that fit.

    Raises:
        errors.TooFewSlots: They could not all run at once, so training could not start.
    """
    wanted = num_proc or 1
    deadline = time.monotonic() + SLOTS_TIMEOUT
    while (found := slots(spark)) < wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    if found < wanted:
        raise errors.TooFewSlots(
            f"num_proc={wanted} ranks must run at the same time, and Spark has {found} slots: "
            "lower num_proc, or give the session more executors or cores"
        )
    return num_proc or found


def train(
    spark: SparkSession, training: plan.TrainingPlan, *, title: str, visible: bool
) -> list[plan.RankReport]:
    """Train on as many Spark tasks as the plan has ranks.

    Returns:
        The reports in rank order; all ranks succeeded and hold the same weights.

    Raises:
        errors.RankError: A rank raised.
        errors.RanksDiverged: The ranks ended with different weights.
        errors.TrainingError: A rank went away without a report.
    """
    import horovod.spark

    shown = progress.Progress(
        title,
        first=training.first_epoch,
        epochs=training.first_epoch + training.epochs,
        steps=training.world.steps,
        visible=visible,
    )
    output = _Output()
    conf = spark.sparkContext.getConf()
    host = str(conf.get("spark.driver.host"))
    bind = str(conf.get("spark.driver.bindAddress", host))
    threads = int(conf.get("spark.task.cpus", "1"))
    with shown, events.Inbox(host, bind, shown.update) as inbox, _signals_left_alone():
        try:
            reports = horovod.spark.run(
                _rank,
                args=(dataclasses.replace(training, inbox=inbox.address, threads=threads),),
                num_proc=training.world.size,
                use_gloo=True,  # else Horovod looks for MPI first, and imports TensorFlow to do so
                env=_environment(),
                stdout=output,
                stderr=output,
                verbose=0,
                executable=spark.sparkContext.pythonExec,
            )
        except Exception as error:  # Horovod raises several types for what goes wrong out there
            raise errors.TrainingError(
                f"{error}\nLast output of the ranks:\n{output.tail}"
            ) from error
    check(reports)
    return list(reports)


def _rank(training: plan.TrainingPlan) -> plan.RankReport:
    """Enter the worker. Its imports happen on the rank, so that the driver needs no TensorFlow."""
    from spark_mnist import worker

    return worker.run(training)


def check(reports: Sequence[plan.RankReport]) -> None:
    """Raise what went wrong on the ranks, if anything did; see ``train``."""
    failed = [
        (r.failure.collective, r.failure.time, r.rank, r.failure) for r in reports if r.failure
    ]
    if failed:
        _, _, rank, failure = min(failed)
        raise errors.RankError(
            f"rank {rank} of {len(reports)} raised {failure.type}: {failure.message}",
            rank=rank,
            rank_traceback=failure.traceback,
        )
    digests = {report.rank: report.weights_digest for report in reports}
    if len(set(digests.values())) != 1:
        raise errors.RanksDiverged(
            f"the ranks ended with different weights, nothing was saved; sha256 by rank: {digests}"
        )


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


def _environment() -> dict[str, str]:
    name = "TF_CPP_MIN_LOG_LEVEL"
    return {name: os.environ.get(name, "3")}


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep Horovod from replacing the handlers of SIGINT and SIGTERM.

    It never puts them back, so a later Ctrl-C would be swallowed, and outside the main thread the
    attempt fails. Without its handlers an interrupt is Python's own: it leaves ``run``, which then
    cancels the Spark job, and the ranks end with their tasks.
    """
    from horovod.runner import gloo_run

    with _ONE_FIT:
        register = gloo_run.register_shutdown_event
        gloo_run.register_shutdown_event = threading.Event
        try:
            yield
        finally:
            gloo_run.register_shutdown_event = register
