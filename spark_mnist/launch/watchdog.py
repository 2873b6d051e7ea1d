"""Watchdog: decides from the ranks' events whether they still work. Runs on: driver.

The module does not depend on Spark. A rank is lost when its connection ends without a last event,
when no event of the rank arrives for the timeout, or when no rank makes progress: all idle for the
timeout, or at work for ten times as long. A rank with a GPU counts as at work, since the GPU's
computing, compiling and tuning take no CPU time of the rank's process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from spark_mnist.core import channel

IDLE_CPU_SHARE = 0.1
"""Share of one core below which a process counts as waiting."""
WORK_TIMEOUTS = 10
"""Number of timeouts that a rank may be at work without a step: it compiles, reads or writes."""
START_SLACK_S = 60.0
"""Seconds that a rank may start later than the first one, and that all may take to end."""
START_TIMEOUT_S = 360.0
"""Seconds in which the first rank must send an event: somewhat more than Horovod's own limit."""
RECONNECT_GRACE_S = 12.0
"""Seconds in which a rank may connect again, and the other ranks report why it was lost."""
DRIVER_PAUSE_S = 5.0
"""Seconds between two checks above which the driver must have been stopped, not the ranks."""


@dataclass
class _Rank:
    """State of one rank, from its events."""

    event_time: float
    """Time of its last event."""
    progress_time: float
    """Time of its last progress."""
    work_time: float
    """Time at which it was last at work."""
    moves: int = 0
    """Count of its progress, from its last event."""
    cpu: float = 0.0
    """CPU seconds of its process, from its last event."""
    name: str = "did not start"
    place: str = "before its first step"
    has_started: bool = False
    """Whether it has sent an event."""
    link: object = None
    """Connection of its last event."""
    hangup_time: float | None = None
    """Time at which its connection ended; None while it is connected."""
    has_ended: bool = False
    on_gpu: bool = False


class Watchdog:
    """Watchdog over the ranks of one attempt.

    Args:
        ranks: Number of ranks.
        timeout: Seconds without a sign of life after which a rank is lost.
        clock: Function that returns seconds since any fixed time.
    """

    def __init__(
        self, ranks: int, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout, self._clock = timeout, clock
        self._lock = threading.Lock()
        self._start_time = self._check_time = clock()
        self._ranks = [_Rank(clock(), clock(), clock()) for _ in range(ranks)]

    def hear(self, event: channel.Event) -> None:
        """Process one event of a rank."""
        now = self._clock()
        with self._lock:
            rank = self._ranks[event["rank"]]
            if event.get("hung_up"):
                if event.get("link") == rank.link:  # else the rank has connected again
                    rank.hangup_time = now
                return
            if not self._any_started():
                for other in self._ranks:  # until now they waited for Horovod
                    other.event_time = other.progress_time = other.work_time = now
            cpu_share = (
                (event["cpu"] - rank.cpu) / max(now - rank.event_time, 0.1)
                if rank.has_started
                else 1.0
            )
            rank.on_gpu = rank.on_gpu or event.get("device", channel.CPU) != channel.CPU
            if event.get("busy") or cpu_share >= IDLE_CPU_SHARE or rank.on_gpu:
                rank.work_time = now
            if event["moves"] != rank.moves:
                rank.moves, rank.progress_time = event["moves"], now
            rank.event_time, rank.hangup_time, rank.has_started = now, None, True
            # A sign of life may arrive after the rank's last event.
            rank.has_ended = rank.has_ended or bool(event.get("ended"))
            rank.cpu, rank.link = event["cpu"], event["link"]
            rank.name = f"process {event['pid']} on {event['host']}"
            if "epoch" in event:
                rank.place = f"in epoch {event['epoch']}, step {event['step']}"

    def describe_loss(self, number: int) -> str:
        """Return a text about a lost rank: its process and the place that it had reached."""
        rank = self._ranks[number]
        return f"rank {number} ({rank.name}) went away {rank.place}"

    def has_started(self) -> bool:
        """Return whether any rank has sent an event."""
        with self._lock:
            return self._any_started()

    def all_gone(self) -> bool:
        """Return whether no process of a rank is connected any more."""
        with self._lock:
            return all(rank.hangup_time is not None for rank in self._ranks if rank.has_started)

    def failure_reason(self) -> str | None:
        """Return the reason why the attempt must end, or None while it can go on.

        The launcher must call this method about every second, see ``DRIVER_PAUSE_S``.
        """
        now = self._clock()
        with self._lock:
            self._discount_driver_pause(now)
            lost_rank = self._first_lost_rank()
            absence_s = (
                0.0 if lost_rank is None else now - (self._ranks[lost_rank].hangup_time or now)
            )
            reason = self._silence_reason(now) or self._standstill_reason(now)
            if lost_rank is not None and (reason or absence_s > RECONNECT_GRACE_S):
                # The silence or standstill of the other ranks follows from this loss.
                return self.describe_loss(lost_rank)
            return reason

    def _any_started(self) -> bool:
        return any(rank.has_started for rank in self._ranks)

    def _discount_driver_pause(self, now: float) -> None:
        """Add a pause, in which the driver itself was stopped, to all recorded times."""
        pause_s, self._check_time = now - self._check_time, now
        if pause_s > DRIVER_PAUSE_S:
            self._start_time += pause_s
            for rank in self._ranks:
                rank.event_time += pause_s
                rank.progress_time += pause_s
                rank.work_time += pause_s
                if rank.hangup_time is not None:
                    rank.hangup_time += pause_s

    def _first_lost_rank(self) -> int | None:
        lost_ranks = [
            (rank.hangup_time, number)
            for number, rank in enumerate(self._ranks)
            if rank.hangup_time is not None and not rank.has_ended
        ]
        return min(lost_ranks)[1] if lost_ranks else None

    def _silence_reason(self, now: float) -> str | None:
        if not self._any_started():
            start_s = now - self._start_time
            return (
                f"no rank was heard of for {start_s:.0f} seconds"
                if start_s > START_TIMEOUT_S
                else None
            )
        for number, rank in enumerate(self._ranks):
            silence_s = now - rank.event_time
            limit_s = self._timeout if rank.has_started else max(self._timeout, START_SLACK_S)
            if silence_s > limit_s and not rank.has_ended:
                return (
                    f"rank {number} ({rank.name}) has not been heard of for {silence_s:.0f} "
                    f"seconds; it was {rank.place}"
                )
        return None

    def _standstill_reason(self, now: float) -> str | None:
        if not self._any_started():
            return None
        standstill_s = now - max(rank.progress_time for rank in self._ranks)
        idle_s = now - max(max(rank.progress_time, rank.work_time) for rank in self._ranks)
        limit_s = self._timeout
        if all(rank.has_ended for rank in self._ranks):
            limit_s = max(limit_s, START_SLACK_S)
        if idle_s <= limit_s and standstill_s <= limit_s * WORK_TIMEOUTS:
            return None
        places = ", ".join(
            f"rank {number} {rank.place if rank.has_started else rank.name}"
            for number, rank in enumerate(self._ranks)
        )
        return f"no rank has taken a step for {standstill_s:.0f} seconds: {places}"
