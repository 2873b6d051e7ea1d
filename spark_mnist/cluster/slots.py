"""Slots of a session: the tasks that can run at the same time. Runs on: driver."""

from __future__ import annotations

import logging
import time
from typing import TypeVar

from pyspark import RDD, SparkConf, SparkContext
from pyspark.sql import SparkSession

from spark_mnist import errors
from spark_mnist.cluster import signals

SLOTS_TIMEOUT_S = 4.0
"""Seconds to wait for executors that are still starting."""
BUSY_TIMEOUT_S = 600.0
"""Seconds that a fit without ``num_proc`` waits for other jobs, instead of using fewer ranks."""
RANK_WORKERS = "SPARK_MNIST_RANK_WORKERS"
"""Environment variable that tells the Python workers of ranks from others."""
ItemT = TypeVar("ItemT")
logger = logging.getLogger(__name__)

PROBE_HOLD_S = 0.2
"""Seconds for which a probing task keeps its slot, so that every executor gets a task."""
TASK_GPUS = "spark.task.resource.gpu.amount"
"""Setting for the number of GPUs that Spark gives a task."""


def slots(spark: SparkSession) -> int:
    """Return how many tasks the session can run at the same time on its current executors."""
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    num_slots: int = context.maxNumConcurrentTasks(profile)
    return num_slots


def executors(spark: SparkSession) -> list[str]:
    """Return the sorted addresses of the session's current executors."""
    infos = spark.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
    return sorted(f"{info.host()}:{info.port()}" for info in infos)


def free_slots(spark: SparkSession) -> int:
    """Return how many slots no task runs in or waits for."""
    tracker = spark.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
    num_unfinished = sum(stage.numTasks - stage.numCompletedTasks for stage in stages if stage)
    return max(0, slots(spark) - num_unfinished)


def in_rank_workers(rdd: RDD[ItemT]) -> RDD[ItemT]:
    """Let the tasks of an RDD run in Python workers that run only the tasks of ranks.

    Spark reuses workers for tasks with the same environment, the longest unused worker first. Among
    the workers of all jobs, a fit would rarely get a worker with a warm server again, and more and
    more workers would start one.
    """
    environment = rdd.context.environment
    environment[RANK_WORKERS] = "1"
    try:
        rdd.id()  # Spark copies the environment here
    finally:
        environment.pop(RANK_WORKERS, None)
    return rdd


def task_cpus(context: SparkContext) -> int:
    """Return the number of cores that Spark gives a task."""
    return int(context.getConf().get("spark.task.cpus", "1"))


def wait_for_slots(spark: SparkSession, ranks: int, seconds: float = SLOTS_TIMEOUT_S) -> None:
    """Wait until a number of ranks can run.

    Args:
        spark: The session.
        ranks: Number of free slots to wait for.
        seconds: Longest time to wait.

    Raises:
        errors.TooFewSlots: There were too few free slots in that time.
    """
    deadline, is_logged = time.monotonic() + seconds, False
    while (num_free := free_slots(spark)) < ranks:
        if slots(spark) >= ranks and not is_logged and seconds > SLOTS_TIMEOUT_S:
            logger.info(
                "waiting for other jobs: %d of the %d slots that the ranks need are free",
                *(num_free, ranks),
            )
            is_logged = True
        signals.check()
        if time.monotonic() > deadline:
            raise errors.TooFewSlots(_too_few_message(spark, ranks, num_free))
        time.sleep(0.1)


def choose_num_ranks(spark: SparkSession, num_proc: int | None) -> int:
    """Return the number of ranks to run: ``num_proc``, or all slots, busy or not.

    Raises:
        errors.TooFewSlots: The ranks could not all run at the same time.
    """
    if num_proc:
        wait_for_slots(spark, num_proc)
        return num_proc
    deadline = time.monotonic() + SLOTS_TIMEOUT_S
    while not (num_slots := slots(spark)):
        if time.monotonic() > deadline:
            raise errors.TooFewSlots(_too_few_message(spark, 1, 0))
        time.sleep(0.1)
    return num_slots


def _too_few_message(spark: SparkSession, ranks: int, num_free: int) -> str:
    num_slots = slots(spark)
    free_text = f", {num_free} of them free" if num_free < num_slots else ""
    remedies = ["give the session more executors or cores"]
    if ranks > 1:
        remedies.insert(0, "lower num_proc")
    if num_free < num_slots:
        remedies.insert(0, "wait for the jobs that use them")
    message = (
        f"{ranks} {'ranks' if ranks > 1 else 'rank'} must run at the same time, and Spark has "
        f"{num_slots} slots{free_text}: {', or '.join(remedies)}"
    )
    gpus = spark.sparkContext.getConf().get(TASK_GPUS)
    if gpus:
        message = f"{message}; each takes {TASK_GPUS}={gpus} of its GPUs, too"
    setting = "spark.dynamicAllocation.enabled"
    if is_on(spark.sparkContext.getConf(), setting):
        return (
            f"{message}. With {setting}=true it has only the executors that its last jobs needed: "
            "set spark.dynamicAllocation.minExecutors to what the ranks need"
        )
    return message


def is_on(conf: SparkConf, setting: str) -> bool:
    """Return whether a setting of Spark is true."""
    return str(conf.get(setting, "false")).lower() == "true"
