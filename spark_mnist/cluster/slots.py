"""Slots of a session: how many tasks run at once, and which of them are free. Runs on: driver."""

from __future__ import annotations

import logging
import time
from typing import TypeVar

from pyspark import RDD, SparkConf, SparkContext
from pyspark.sql import SparkSession

from spark_mnist import errors
from spark_mnist.cluster import signals

SLOTS_TIMEOUT = 4.0
"""Seconds that executors which are still starting get to offer their slots."""
BUSY_TIMEOUT = 600.0
"""Seconds that a fit without ``num_proc`` waits for other jobs, rather than train with fewer."""
RANK_WORKERS = "SPARK_MNIST_RANK_WORKERS"
"""A variable that tells the Python workers of ranks from others."""
T = TypeVar("T")
logger = logging.getLogger(__name__)

TASK_GPUS = "spark.task.resource.gpu.amount"
"""GPUs that Spark gives a task."""


def slots(spark: SparkSession) -> int:
    """How many tasks the session can run at the same time, on the executors it has now."""
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    found: int = context.maxNumConcurrentTasks(profile)
    return found


def executors(spark: SparkSession) -> list[str]:
    """The address of each executor that the session has now, in order."""
    infos = spark.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
    return sorted(f"{info.host()}:{info.port()}" for info in infos)


def free_slots(spark: SparkSession) -> int:
    """How many of the slots no task runs in, or waits for."""
    tracker = spark.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
    left = sum(stage.numTasks - stage.numCompletedTasks for stage in stages if stage)
    return max(0, slots(spark) - left)


def in_rank_workers(rdd: RDD[T]) -> RDD[T]:
    """Let the tasks of an RDD run in Python workers that run nothing else but ranks' tasks.

    Spark uses workers again for tasks of equal environment, the longest unused first. Among those
    of all jobs a worker with a warm server would rarely be met again, and others would start one.
    """
    environment = rdd.context.environment
    environment[RANK_WORKERS] = "1"
    try:
        rdd.id()  # Spark notes the environment here
    finally:
        environment.pop(RANK_WORKERS, None)
    return rdd


def task_cpus(context: SparkContext) -> int:
    """Cores that Spark gives a task."""
    return int(context.getConf().get("spark.task.cpus", "1"))


def wait_for_slots(spark: SparkSession, ranks: int, seconds: float = SLOTS_TIMEOUT) -> None:
    """Wait until so many ranks could run.

    Raises:
        errors.TooFewSlots: They could not within that time.
    """
    deadline, logged = time.monotonic() + seconds, False
    while (free := free_slots(spark)) < ranks:
        if slots(spark) >= ranks and not logged and seconds > SLOTS_TIMEOUT:
            logger.info(
                "waiting for other jobs: %d of the %d slots that the ranks need are free",
                *(free, ranks),
            )
            logged = True
        signals.check()
        if time.monotonic() > deadline:
            raise errors.TooFewSlots(_too_few(spark, ranks, free))
        time.sleep(0.1)


def ranks(spark: SparkSession, num_proc: int | None) -> int:
    """Return the number of ranks to run: the given one, or all slots, busy or not.

    Raises:
        errors.TooFewSlots: They could not all run at once, so training could not start.
    """
    if num_proc:
        wait_for_slots(spark, num_proc)
        return num_proc
    deadline = time.monotonic() + SLOTS_TIMEOUT
    while not (num_slots := slots(spark)):
        if time.monotonic() > deadline:
            raise errors.TooFewSlots(_too_few(spark, 1, 0))
        time.sleep(0.1)
    return num_slots


def _too_few(spark: SparkSession, ranks: int, free: int) -> str:
    have = slots(spark)
    busy = f", {free} of them free" if free < have else ""
    wait = "wait for the jobs that use them, " if free < have else ""
    lower = "lower num_proc, " if ranks > 1 else ""
    message = (
        f"num_proc={ranks} ranks must run at the same time, and Spark has {have} slots{busy}: "
        f"{wait}{lower}or give the session more executors or cores"
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
