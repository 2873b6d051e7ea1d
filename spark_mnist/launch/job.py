"""The Spark job of one start of the ranks: a task an agent, in a thread of its own. On: driver."""

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

END_S = 5.0
"""Seconds in which agents end their ranks once they are told to, before Spark ends the agents."""
CANCEL_S = 15.0
"""Seconds in which Spark ends a job that it cancels."""
CANCELLED = re.compile(r"\bcancel+ed\b", re.IGNORECASE)
"""In Spark's words for a job that somebody cancelled."""


class Job:
    """Runs an agent in as many tasks as there are ranks, and takes their reports.

    The job has the scheduler pool, group, description and tags of the thread that makes it, and a
    tag of its own by which it is cancelled.

    Args:
        spark: The session.
        ranks: How many agents.
        instructions: For each of them.
    """

    def __init__(self, spark: SparkSession, ranks: int, instructions: agent.Instructions) -> None:
        self._spark, self._ranks, self._instructions = spark, ranks, instructions
        self._tag = f"spark_mnist-{uuid.uuid4().hex}"
        self._ended = threading.Event()
        self._stopped = False
        # Spark keeps pool, group, description and tags of jobs with the thread that starts them.
        self._properties = spark.sparkContext._jsc.sc().getLocalProperties().clone()
        self._thread = threading.Thread(target=self._run, name="spark_mnist ranks", daemon=True)
        self.reports: list[plan.RankReport] = []
        """In rank order, of the ranks that gave one."""
        self.error: BaseException | None = None
        """What ended the job."""

    @property
    def cancelled(self) -> bool:
        """Whether somebody else cancelled the job in Spark."""
        return bool(self.error and not self._stopped and CANCELLED.search(str(self.error)))

    def start(self) -> None:
        """Start the job; returns at once."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; returns whether the job has ended, or never started.

        An interrupt in ``Thread.join`` would make Python 3.11 take the thread for ended.
        """
        return self._thread.ident is None or self._ended.wait(seconds)

    def stop(self, end_ranks: Callable[[], None]) -> None:
        """End the job if it runs: by its agents, or by Spark. Returns when it is over.

        Args:
            end_ranks: Tells the agents to end their ranks. Those of a job that was cancelled, too:
                Spark lets their tasks run on for a while.
        """
        self._stopped = not self.wait(0)
        end_ranks()
        if not self.wait(END_S):
            self._spark.sparkContext.cancelJobsWithTag(self._tag)
            if not self.wait(CANCEL_S):
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
            self._ended.set()


def _task(instructions: agent.Instructions) -> Callable[[int, Iterable[Any]], Iterator[bytes]]:
    """Return what a task runs; it holds the instructions and nothing else."""

    def run(index: int, _: Iterable[Any]) -> Iterator[bytes]:
        return agent.run(index, instructions)

    return run
