"""Launcher of the ranks: it starts them, and restarts them where one is lost. Runs on: driver.

At the end the caller's process is as before: signal handlers untouched, session alive, no rank
running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import cloudpickle
from pyspark.sql import SparkSession

from spark_mnist import errors
from spark_mnist.cluster import driver_port, environment, signals, slots
from spark_mnist.core import channel, plan
from spark_mnist.launch import (
    agent,
    failure_policy,
    job,
    progress,
    registration,
    rendezvous,
    watchdog,
)
from spark_mnist.store import checkpoints

logger = logging.getLogger(__name__)

RANK_EXIT_GRACE_S = 15.0
"""Seconds that ranks get to end after their job has ended."""
RANK_POLL_S = 0.05
"""Seconds between two looks at the ranks."""
SLOT_RECOVERY_S = 180.0
"""Seconds in which Spark may replace an executor; Spark gives up a frozen executor after 120."""
FIT_LOCK = threading.RLock()
"""Lock held while a fit runs: ranks need all their slots."""
FIT_LOCK_POLL_S = 0.5
"""Seconds between two looks whether the fit of another thread has ended."""


@contextlib.contextmanager
def exclusive_fit() -> Iterator[None]:
    """Wait for the fits of other threads to end, and make them wait until the block ends."""
    if not FIT_LOCK.acquire(blocking=False):
        logger.info("waiting for the fit of another thread to end")
        while not FIT_LOCK.acquire(timeout=FIT_LOCK_POLL_S):
            signals.check()
    try:
        yield
    finally:
        FIT_LOCK.release()


def train(
    spark: SparkSession,
    training: plan.TrainingPlan,
    *,
    title: str,
    visible: bool,
    max_restarts: int,
    ports: Sequence[int],
) -> Sequence[plan.RankSuccess]:
    """Train on as many Spark tasks as the plan has ranks.

    When a rank is lost all ranks end, and start again from the last checkpoint.

    Args:
        spark: Session whose tasks become ranks.
        training: Plan of the training.
        title: Title of the progress bar.
        visible: Whether to show progress.
        max_restarts: Most restarts of the ranks.
        ports: Ports on which the driver may listen; 0 is any port.

    Returns:
        The reports in rank order; all ranks succeeded and hold the same weights.

    Raises:
        errors.RankError: A rank raised an error.
        errors.ShardsLost, errors.RowsLost: A rank could not read all its rows.
        errors.RanksLost: Ranks were lost, hung or did not start, more often than they may start
            again, or Spark has no slots for all of them any more.
        errors.NotFinite: The loss is no longer a finite number.
        errors.FitCancelled: Somebody cancelled the ranks' job in Spark.
        errors.RanksDiverged: The ranks ended with different weights.
        errors.TrainingError: A rank's Python ended with an error of its own.
    """
    bar = progress.Bar(
        title,
        first=training.first_epoch,
        epochs=training.first_epoch + training.epochs,
        steps=training.sharding.steps,
        visible=visible,
    )
    with bar:
        for restarts in itertools.count():
            try:
                return _attempt(spark, training, bar, ports)
            except errors.TrainingError as error:
                if not failure_policy.may_restart(
                    error, restarts=restarts, max_restarts=max_restarts
                ):
                    raise
                reason = str(error)
            # Outside of the except block, in which an interrupt would wait.
            training = resume_plan(training, training.attempt + 1)
            resume = training.resume or plan.Progress(epoch=training.first_epoch)
            place = f"epoch {resume.epoch}" + (f" and {resume.step} steps" if resume.step else "")
            logger.debug("%s", reason)
            logger.warning(
                "%s; all ranks start again after %s (restart %d of %d)",
                *(reason.partition("\n")[0], place, restarts + 1, max_restarts),
            )
            try:
                slots.wait_for_slots(spark, training.sharding.size, SLOT_RECOVERY_S)
            except errors.TooFewSlots as error:
                message = f"{reason}\nNor could they start again: {error}"
                raise errors.RanksLost(message, slots.free_slots(spark)) from error
    raise AssertionError("unreachable: the count has no end")


def train_in_process(training: plan.TrainingPlan) -> Sequence[plan.RankSuccess]:
    """Train on one rank, in this process.

    Args:
        training: Plan of the training.

    Returns:
        The report of the rank, which succeeded.

    Raises:
        errors.TrainingError: One of its subclasses, as in ``train``.
    """
    # Imported here, since no other function of the driver needs TensorFlow.
    from spark_mnist.ranks import trainer

    training = dataclasses.replace(training, threads=None)
    reports = [trainer.run(training, channel.HeartbeatClient(None))]
    return _successes(reports, failure_policy.error_of_reports(reports))


def resume_plan(training: plan.TrainingPlan, attempt: int) -> plan.TrainingPlan:
    """Return the plan for another start of the ranks, from the last checkpoint of this fit."""
    ranks = training.sharding.size
    checkpoint = checkpoints.locate(training.work, ranks) if training.checkpoints else None
    resume = checkpoint and checkpoint[0]
    return dataclasses.replace(training, resume=resume, attempt=attempt)


def _attempt(
    spark: SparkSession,
    training: plan.TrainingPlan,
    bar: progress.Bar,
    ports: Sequence[int],
) -> Sequence[plan.RankSuccess]:
    """Start all ranks and watch them to their end."""
    ranks = training.sharding.size
    watch = watchdog.Watchdog(ranks, training.heartbeat_timeout)
    rank_log = _RankLog(ranks, logging.INFO if bar.visible else logging.DEBUG)
    address_store = rendezvous.Rendezvous()

    def receive(event: channel.Event) -> None:
        if "agent" in event:
            agent_pool.hear(event)
            return
        watch.hear(event)
        rank_log.hear(event)
        if event["rank"] == 0 and "epoch" in event:
            bar.update(event)

    with driver_port.listen(spark, ports, receive, address_store.answer) as server:
        agent_pool = registration.Agents(ranks, server.tell, _horovod_settings(server.address))
        spark_job = job.Job(spark, ranks, _instructions(spark, training, server.address))
        reason = None
        try:
            spark_job.start()
            while not reason and not agent_pool.exit and not spark_job.wait(RANK_POLL_S):
                signals.check()
                reason = _failure_reason(agent_pool, watch)
                if spark_job.wait(0):
                    reason = None
        finally:
            spark_job.stop(agent_pool.end)
            _wait_for_rank_exits(watch)
    outcome = failure_policy.Outcome(
        ranks=ranks,
        reports=spark_job.reports,
        exit_code=agent_pool.exit.code if agent_pool.exit else None,
        loss=_exit_text(agent_pool, watch) or reason,
        job_error=spark_job.error,
        job_cancelled=spark_job.cancelled,
        has_started=watch.has_started(),
        output=agent_pool.tail,  # complete only now, since ranks print when they end
    )
    error = failure_policy.error_of(outcome)
    return _successes(spark_job.reports, error, spark_job.error)


def _successes(
    reports: Sequence[plan.RankReport],
    error: Exception | None,
    cause: BaseException | None = None,
) -> Sequence[plan.RankSuccess]:
    """Return the reports of ranks that succeeded, or raise the error of those that did not."""
    if error:
        raise error from cause
    assert failure_policy.succeeded(reports)
    return reports


def _horovod_settings(address: channel.Address) -> dict[str, str]:
    """Return the environment variables of Horovod's core that are equal on all ranks."""
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address.host,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(address.port),
    }


def _instructions(
    spark: SparkSession, training: plan.TrainingPlan, driver_address: channel.Address
) -> agent.Instructions:
    threads = slots.task_cpus(spark.sparkContext)
    rank_plan = dataclasses.replace(training, driver_address=driver_address, threads=threads)
    return agent.Instructions(
        driver_address=driver_address,
        training=cloudpickle.dumps(rank_plan),
        environment=environment.pattern(spark, training.train.urls[0]),
        settings=environment.settings(),
        disconnect_timeout=training.heartbeat_timeout,
    )


def _failure_reason(agent_pool: registration.Agents, watch: watchdog.Watchdog) -> str | None:
    """Return the reason why the attempt must end, or None while the ranks can go on."""
    rank = agent_pool.lost()
    return watch.describe_loss(rank) if rank is not None else watch.failure_reason()


def _exit_text(agent_pool: registration.Agents, watch: watchdog.Watchdog) -> str | None:
    """Return a text about the rank whose process ended without a report, if there is one."""
    if agent_pool.exit is None:
        return None
    return f"{watch.describe_loss(agent_pool.exit.rank)} ({agent_pool.exit})"


class _RankLog:
    """Log of the ranks' warnings, each of them once, and of the ranks' GPUs.

    Args:
        ranks: Number of ranks.
        level: Log level for GPUs.
    """

    def __init__(self, ranks: int, level: int) -> None:
        self._ranks, self._level = ranks, level
        self._lock = threading.Lock()
        self._warnings: set[str] = set()
        self._devices: dict[int, str] = {}

    def hear(self, event: channel.Event) -> None:
        """Process one event of a rank."""
        with self._lock:
            if (text := event.get("warning")) and text not in self._warnings:
                self._warnings.add(text)
                logger.warning("rank %d: %s", event["rank"], text)
            if event.get("device", channel.CPU) != channel.CPU:
                self._devices[event["rank"]] = f"{event['host']}, {event['device']}"
                if len(self._devices) == self._ranks:
                    lines = (
                        f"\n  rank {rank}: {self._devices[rank]}" for rank in range(self._ranks)
                    )
                    logger.log(self._level, "the ranks compute on%s", "".join(lines))


def _wait_for_rank_exits(watch: watchdog.Watchdog) -> None:
    """Wait until the last rank has ended, before its files are deleted."""
    deadline = time.monotonic() + RANK_EXIT_GRACE_S
    while not watch.all_gone() and time.monotonic() < deadline:
        time.sleep(RANK_POLL_S)
