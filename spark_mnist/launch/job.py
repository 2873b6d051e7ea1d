"""Spark job of one start of the ranks: one task for each agent. Runs on: driver.

The job runs in a thread of its own.
"""

from __future__ import annotations

import logging
import pickle
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pyspark.sql import SparkSession

from spark_mnist.cluster import slots
from spark_mnist.core import plan
from spark_mnist.launch import agent

logger = logging.getLogger(__name__)

AGENT_STOP_S = 5.0
"""Seconds in which agents must end their ranks on request, before Spark ends the agents."""
SPARK_CANCEL_S = 15.0
"""Seconds in which Spark ends a job that it cancels."""
CANCELLED = re.compile(r"\bcancel+ed\b", re.IGNORECASE)
"""Pattern in Spark's message for a job that somebody cancelled."""


class Job:
    """Spark job that runs an agent for each rank, one per task, and collects the ranks' reports.

    The job has the scheduler pool, group, description and tags of the thread that creates it, and a
    tag of its own by which it is cancelled.

    Args:
        spark: Session of the job.
        ranks: Number of agents.
        instructions: Instructions for each agent.
    """

    def __init__(self, spark: SparkSession, ranks: int, instructions: agent.Instructions) -> None:
        self._spark, self._ranks, self._instructions = spark, ranks, instructions
        self._tag = f"spark_mnist-{uuid.uuid4().hex}"
        self._end_event = threading.Event()
        self._is_stopped_here = False
        # Spark keeps pool, group, description and tags of jobs with the thread that starts them.
        self._properties = spark.sparkContext._jsc.sc().getLocalProperties().clone()
        self._thread = threading.Thread(target=self._run, name="spark_mnist ranks", daemon=True)
        self.reports: list[plan.RankReport] = []
        """Reports in rank order; a rank without a report is missing."""
        self.error: BaseException | None = None
        """Error that ended the job."""

    @property
    def cancelled(self) -> bool:
        """Return whether somebody else cancelled the job in Spark."""
        return bool(self.error and not self._is_stopped_here and CANCELLED.search(str(self.error)))

    def start(self) -> None:
        """Start the job, and return at once."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for at most ``seconds``, and return whether the job has ended or never started.

        After an interrupt in ``Thread.join`` Python 3.11 would regard the thread as ended.
        """
        return self._thread.ident is None or self._end_event.wait(seconds)

    def stop(self, end_ranks: Callable[[], None]) -> None:
        """End the job if it runs, through its agents or through Spark, and wait for its end.

        Args:
            end_ranks: Function that tells the agents to end their ranks. It is called for a job
                that was cancelled, too: Spark lets the tasks of such a job run on for a while.
        """
        self._is_stopped_here = not self.wait(0)
        end_ranks()
        if not self.wait(AGENT_STOP_S):
            self._spark.sparkContext.cancelJobsWithTag(self._tag)
            if not self.wait(SPARK_CANCEL_S):
                logger.warning("ranks could not be reached to end them; they end by themselves")

    def _run(self) -> None:
        context = self._spark.sparkContext
        try:
            context._jsc.sc().setLocalProperties(self._properties)
            context.addJobTag(self._tag)
            task = _task(self._instructions)
            tasks = context.parallelize(range(self._ranks), self._ranks)
            reports = slots.in_rank_workers(tasks.mapPartitionsWithIndex(task)).collect()
            self.reports = sorted(map(pickle.loads, reports), key=lambda report: report.rank)
        except BaseException as error:  # of any type: a thread would lose it
            self.error = error
        finally:
            self._end_event.set()


def _task(instructions: agent.Instructions) -> Callable[[int, Iterable[Any]], Iterator[bytes]]:
    """Return the function that a task runs; it refers to the instructions and nothing else."""

    def run(index: int, _: Iterable[Any]) -> Iterator[bytes]:
        return agent.run(index, instructions)

    return run
