"""Runs the worker on N Spark tasks, again where a rank is lost. On the driver.

Leaves the caller as it found him: signal handlers untouched, session alive, no rank running.
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
from spark_mnist.launch import agent, job, progress, registration, rendezvous, watchdog
from spark_mnist.store import checkpoints

logger = logging.getLogger(__name__)

GRACE_S = 15.0
"""Seconds that ranks get to end once their job has."""
POLL = 0.05
"""Seconds between two looks at the ranks."""
SLOTS_BACK = 180.0
"""Seconds in which Spark may replace an executor: one that froze it gives up after 120."""
OURS = {kind.__name__: kind for kind in (errors.ShardsLost, errors.RowsLost)}
"""What ranks raise that is not the user's to mend."""
ONE_FIT = threading.RLock()
"""Held while a fit runs: ranks need all their slots."""
TURN_S = 0.5
"""Between two looks whether the fit of another thread has ended."""


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Wait for the fits of other threads to end, and hold them back until the block ends."""
    if not ONE_FIT.acquire(blocking=False):
        logger.info("waiting for the fit of another thread to end")
        while not ONE_FIT.acquire(timeout=TURN_S):
            signals.check()
    try:
        yield
    finally:
        ONE_FIT.release()


def train(
    spark: SparkSession,
    training: plan.TrainingPlan,
    *,
    title: str,
    visible: bool,
    max_restarts: int,
    ports: Sequence[int],
) -> list[plan.RankReport]:
    """Train on as many Spark tasks as the plan has ranks.

    When a rank is lost all ranks end, and start again from the last checkpoint.

    Args:
        spark: The session whose tasks become ranks.
        training: What to train.
        title: What the progress bar calls it.
        visible: Whether to show progress.
        max_restarts: How many times ranks start again.
        ports: Where the driver may listen; 0 is anywhere.

    Returns:
        The reports in rank order; all ranks succeeded and hold the same weights.

    Raises:
        errors.RankError: A rank raised.
        errors.ShardsLost, errors.RowsLost: A rank could not read all its rows.
        errors.RanksLost: Ranks went away, hung or did not start, more often than they may start
            again, or where Spark has no slots for them any more.
        errors.NotFinite: The loss is no number any more.
        errors.FitCancelled: Somebody cancelled the ranks' job in Spark.
        errors.RanksDiverged: The ranks ended with different weights.
        errors.TrainingError: A rank's Python ended with an error of its own.
    """
    shown = progress.Bar(
        title,
        first=training.first_epoch,
        epochs=training.first_epoch + training.epochs,
        steps=training.sharding.steps,
        visible=visible,
    )
    with shown:
        for restarts in itertools.count():
            try:
                return _attempt(spark, training, shown, ports)
            except errors.RanksLost as error:
                if restarts >= max_restarts:
                    raise
                lost = str(error)
            # Outside of the block above, in which an interrupt would wait.
            training = resumed(training, training.attempt + 1)
            done = training.resume.epoch if training.resume else training.first_epoch
            logger.debug("%s", lost)
            logger.warning(
                "%s; all ranks start again after epoch %d (restart %d of %d)",
                *(lost.partition("\n")[0], done, restarts + 1, max_restarts),
            )
            try:
                slots.wait_for_slots(spark, training.sharding.size, SLOTS_BACK)
            except errors.TooFewSlots as error:
                raise errors.RanksLost(f"{lost}\nNor could they start again: {error}") from error
    raise AssertionError("unreachable: the count has no end")


def train_in_process(training: plan.TrainingPlan) -> list[plan.RankReport]:
    """Train on one rank, in this process.

    Args:
        training: What to train.

    Returns:
        The rank's report; it succeeded.

    Raises:
        errors.TrainingError: One of its leaves, as ``train`` says.
    """
    # Imported here: elsewhere the driver needs no TensorFlow.
    from spark_mnist.ranks import trainer

    training = dataclasses.replace(training, threads=None)
    reports = [trainer.run(training, channel.HeartbeatClient(None))]
    check(reports)
    return reports


def check(reports: Sequence[plan.RankReport]) -> None:
    """Raise what went wrong on the ranks, if anything did; see ``train``."""
    failed = [(r.failure.time, r.rank, r.failure) for r in reports if r.failure]
    causes = [found for found in failed if not found[2].collective]
    if causes:
        _, rank, failure = min(causes)
        if failure.type in OURS:
            raise OURS[failure.type](failure.message)
        raise errors.RankError(
            f"rank {rank} of {len(reports)} raised {failure.type}: {failure.message}",
            rank=rank,
            rank_traceback=failure.traceback,
        )
    if failed:
        raise errors.RanksLost(f"the connection between ranks broke: {min(failed)[2].message}")
    ended = [report.progress for report in reports if report.progress]
    last, kept = ended[0].history[-1], ended[0].best.epoch
    nothing = (
        f"training came to nothing in epoch {last.epoch}: its losses are {last.losses}, or a "
        "weight is no number"
    )
    if not kept:
        raise errors.NotFinite(
            f"{nothing}; nothing was saved. Lower learning_rate, or look at the features"
        )
    if ended[0].not_finite:
        logger.warning("%s; epoch %d, the best before, is what is saved", nothing, kept)
    digests = {rank: end.best.digest for rank, end in enumerate(ended)}
    if len(set(digests.values())) != 1:
        raise errors.RanksDiverged(
            f"the ranks ended with different weights, nothing was saved; sha256 by rank: {digests}"
        )


def resumed(training: plan.TrainingPlan, attempt: int) -> plan.TrainingPlan:
    """The plan for another start of the ranks, from the last checkpoint of those before."""
    checkpoint = checkpoints.locate(training.work) if training.checkpoints else None
    progress = checkpoint and checkpoint[0]
    return dataclasses.replace(training, resume=progress, attempt=attempt)


def _attempt(
    spark: SparkSession,
    training: plan.TrainingPlan,
    shown: progress.Bar,
    ports: Sequence[int],
) -> list[plan.RankReport]:
    """Start all ranks and watch them to their end."""
    ranks = training.sharding.size
    watch = watchdog.Watchdog(ranks, training.heartbeat_timeout)
    rank_log = _RankLog(ranks, logging.INFO if shown.visible else logging.DEBUG)
    meeting = rendezvous.Rendezvous()

    def receive(event: channel.Event) -> None:
        if "agent" in event:
            agent_pool.hear(event)
            return
        watch.hear(event)
        rank_log.hear(event)
        if event["rank"] == 0 and "epoch" in event:
            shown.update(event)

    with driver_port.inbox(spark, ports, receive, meeting.answer) as inbox:
        agent_pool = registration.Agents(ranks, inbox.tell, _horovod_settings(inbox.address))
        running = job.Job(spark, ranks, _instructions(spark, training, inbox.address))
        lost = None
        try:
            running.start()
            while not lost and not agent_pool.exit and not running.wait(POLL):
                signals.check()
                lost = _lost(agent_pool, watch)
                if running.wait(0):
                    lost = None
        finally:
            running.stop(agent_pool.end)
            _wait_for_the_end(watch)
    if agent_pool.exit:
        raise _exit_failure(agent_pool, watch)
    if lost:  # told only now, since ranks print their last words when they end
        raise errors.RanksLost(f"{lost}{agent_pool.tail}")
    if running.cancelled:
        raise errors.FitCancelled(
            "the job of the ranks was cancelled in Spark; nothing was published"
        ) from running.error
    if running.error or len(running.reports) < ranks:
        what = "Spark ended the ranks' job" if watch.begun() else "the ranks did not start"
        why = running.error or f"{len(running.reports)} of {ranks} ranks gave a report"
        raise errors.RanksLost(f"{what} ({why}){agent_pool.tail}") from running.error
    check(running.reports)
    return running.reports


def _horovod_settings(address: channel.Address) -> dict[str, str]:
    """What Horovod's core reads from the environment, alike on all ranks."""
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address.host,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(address.port),
    }


def _instructions(
    spark: SparkSession, training: plan.TrainingPlan, inbox: channel.Address
) -> agent.Instructions:
    threads = slots.task_cpus(spark.sparkContext)
    complete = dataclasses.replace(training, inbox=inbox, threads=threads)
    return agent.Instructions(
        inbox=inbox,
        training=cloudpickle.dumps(complete),
        environment=environment.pattern(spark, training.train.urls[0]),
        settings=environment.settings(),
        patience=training.heartbeat_timeout,
    )


def _lost(agent_pool: registration.Agents, watch: watchdog.Watchdog) -> str | None:
    """Why the attempt must end, or None while there is hope."""
    rank = agent_pool.lost()
    return watch.describe_loss(rank) if rank is not None else watch.failure_reason()


def _exit_failure(
    agent_pool: registration.Agents, watch: watchdog.Watchdog
) -> errors.TrainingError:
    """What to raise where the process of a rank ended without a report."""
    assert agent_pool.exit is not None
    # Python itself ends a process with 1, for what starting it again would not mend.
    kind = errors.TrainingError if agent_pool.exit.code == 1 else errors.RanksLost
    return kind(f"{watch.describe_loss(agent_pool.exit.rank)} ({agent_pool.exit}){agent_pool.tail}")


class _RankLog:
    """Logs what ranks tell of themselves: their warnings, each once, and their GPUs.

    Args:
        ranks: How many there are.
        level: At which GPUs are told.
    """

    def __init__(self, ranks: int, level: int) -> None:
        self._ranks, self._level = ranks, level
        self._lock = threading.Lock()
        self._warnings: set[str] = set()
        self._places: dict[int, str] = {}

    def hear(self, event: channel.Event) -> None:
        """Take one event of a rank."""
        with self._lock:
            if (text := event.get("warning")) and text not in self._warnings:
                self._warnings.add(text)
                logger.warning("rank %d: %s", event["rank"], text)
            if event.get("device", channel.CPU) != channel.CPU:
                self._places[event["rank"]] = f"{event['host']}, {event['device']}"
                if len(self._places) == self._ranks:
                    lines = (
                        f"\n  rank {rank}: {self._places[rank]}" for rank in range(self._ranks)
                    )
                    logger.log(self._level, "the ranks compute on%s", "".join(lines))


def _wait_for_the_end(watch: watchdog.Watchdog) -> None:
    """Let the last rank go before its files do."""
    deadline = time.monotonic() + GRACE_S
    while not watch.all_gone() and time.monotonic() < deadline:
        time.sleep(POLL)
