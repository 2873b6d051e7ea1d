"""Whether the ranks of a fit still work, judged by what they send. On the driver; knows no Spark.

A rank is lost when its connection ends without a word, when nothing is heard of it for the
timeout, or when no rank moves: all idle for the timeout, or at work for ten times as long. A rank
with a GPU counts as at work, since what the GPU does, compiles or tunes costs its process nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from spark_mnist.core import channel

IDLE_CPU_SHARE = 0.1
"""Share of one core below which a process is taken to wait."""
WORK_TIMEOUTS = 10
"""How many timeouts a rank may be at work without a step: it compiles, reads or writes."""
START_SLACK_S = 60.0
"""Seconds that a rank may start later than the first one, and that all may take to end."""
START_TIMEOUT_S = 360.0
"""Seconds in which the first rank must be heard of: Horovod's own limit, and some."""
RECONNECT_GRACE_S = 12.0
"""Seconds in which a rank may connect again, and the others tell why it went away."""
DRIVER_PAUSE_S = 5.0
"""Seconds between two looks after which it was the driver that stood still, not the ranks."""


@dataclass
class _Rank:
    """What was heard of one rank."""

    heard: float
    moved: float
    worked: float
    """When it was last at work."""
    moves: int = 0
    cpu: float = 0.0
    """CPU seconds of its process, as last told."""
    name: str = "did not start"
    place: str = "before its first step"
    begun: bool = False
    link: object = None
    """The connection over which it was last heard."""
    hung_up: float | None = None
    ended: bool = False
    on_gpu: bool = False


class Watchdog:
    """Judges the ranks of one attempt.

    Args:
        ranks: How many there are.
        timeout: Seconds without a sign of life after which a rank is lost.
        clock: Seconds of any beginning.
    """

    def __init__(
        self, ranks: int, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout, self._clock = timeout, clock
        self._lock = threading.Lock()
        self._started = self._looked = clock()
        self._ranks = [_Rank(clock(), clock(), clock()) for _ in range(ranks)]

    def hear(self, event: channel.Event) -> None:
        """Take one event of a rank."""
        now = self._clock()
        with self._lock:
            rank = self._ranks[event["rank"]]
            if event.get("hung_up"):
                if event.get("link") == rank.link:  # else it has connected again
                    rank.hung_up = now
                return
            if not self._any_begun():
                for other in self._ranks:  # until now they waited for Horovod
                    other.heard = other.moved = other.worked = now
            share = (event["cpu"] - rank.cpu) / max(now - rank.heard, 0.1) if rank.begun else 1.0
            rank.on_gpu = rank.on_gpu or event.get("device", channel.CPU) != channel.CPU
            if event.get("busy") or share >= IDLE_CPU_SHARE or rank.on_gpu:
                rank.worked = now
            if event["moves"] != rank.moves:
                rank.moves, rank.moved = event["moves"], now
            rank.heard, rank.hung_up, rank.begun = now, None, True
            rank.ended = rank.ended or bool(event.get("ended"))  # a sign of life may come later
            rank.cpu, rank.link = event["cpu"], event["link"]
            rank.name = f"process {event['pid']} on {event['host']}"
            if "epoch" in event:
                rank.place = f"in epoch {event['epoch']}, step {event['step']}"

    def describe_loss(self, number: int) -> str:
        """That a rank went away, and where it was."""
        rank = self._ranks[number]
        return f"rank {number} ({rank.name}) went away {rank.place}"

    def begun(self) -> bool:
        """Whether any rank was heard of."""
        with self._lock:
            return self._any_begun()

    def all_gone(self) -> bool:
        """Whether no process of a rank is connected any more."""
        with self._lock:
            return all(rank.hung_up is not None for rank in self._ranks if rank.begun)

    def failure_reason(self) -> str | None:
        """Why the attempt must end, or None while there is hope. To be asked every second or so."""
        now = self._clock()
        with self._lock:
            self._discount_driver_pause(now)
            gone = self._first_lost()
            waited = 0.0 if gone is None else now - (self._ranks[gone].hung_up or now)
            reason = self._silence(now) or self._standstill(now)
            if gone is not None and (reason or waited > RECONNECT_GRACE_S):
                return self.describe_loss(gone)  # what the others do, or do not, follows from that
            return reason

    def _any_begun(self) -> bool:
        return any(rank.begun for rank in self._ranks)

    def _discount_driver_pause(self, now: float) -> None:
        """Leave out of account the time in which the driver itself was stopped."""
        gap, self._looked = now - self._looked, now
        if gap > DRIVER_PAUSE_S:
            self._started += gap
            for rank in self._ranks:
                rank.heard += gap
                rank.moved += gap
                rank.worked += gap
                if rank.hung_up is not None:
                    rank.hung_up += gap

    def _first_lost(self) -> int | None:
        gone = [
            (rank.hung_up, number)
            for number, rank in enumerate(self._ranks)
            if rank.hung_up is not None and not rank.ended
        ]
        return min(gone)[1] if gone else None

    def _silence(self, now: float) -> str | None:
        if not self._any_begun():
            waited = now - self._started
            return (
                f"no rank was heard of for {waited:.0f} seconds"
                if waited > START_TIMEOUT_S
                else None
            )
        for number, rank in enumerate(self._ranks):
            silent = now - rank.heard
            limit = self._timeout if rank.begun else max(self._timeout, START_SLACK_S)
            if silent > limit and not rank.ended:
                return (
                    f"rank {number} ({rank.name}) has not been heard of for {silent:.0f} seconds; "
                    f"it was {rank.place}"
                )
        return None

    def _standstill(self, now: float) -> str | None:
        if not self._any_begun():
            return None
        still = now - max(rank.moved for rank in self._ranks)
        idle = now - max(max(rank.moved, rank.worked) for rank in self._ranks)
        limit = self._timeout
        if all(rank.ended for rank in self._ranks):
            limit = max(limit, START_SLACK_S)
        if idle <= limit and still <= limit * WORK_TIMEOUTS:
            return None
        places = ", ".join(
            f"rank {number} {rank.place if rank.begun else rank.name}"
            for number, rank in enumerate(self._ranks)
        )
        return f"no rank has taken a step for {still:.0f} seconds: {places}"
