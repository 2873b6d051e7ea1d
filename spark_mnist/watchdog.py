"""Whether the ranks of a fit still work, judged by what they send. On the driver; knows no Spark.

A rank is lost when its connection ends without a word, when nothing is heard of it for the
timeout, or when no rank moves: all idle for the timeout, or computing for ten times as long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from spark_mnist import events

IDLE = 0.1
"""Share of one core below which a process is taken to wait."""
COMPUTING = 10
"""How many timeouts a rank may compute without a step, for a long step or a compilation."""
SLACK = 60.0
"""Seconds that a rank may start later than the first one, and that all may take to end."""
REPORTING = 5.0
"""Seconds in which the other ranks may still tell why one went away."""


@dataclass
class _Rank:
    """What was heard of one rank."""

    heard: float
    moved: float
    moves: int = 0
    cpu: float = 0.0
    """CPU seconds of its process, as last told."""
    cpu_moved: float = 0.0
    """The same when it last moved."""
    name: str = "did not start"
    place: str = "before its first step"
    begun: bool = False
    hung_up: float | None = None
    ended: bool = False


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
        self._ranks = [_Rank(clock(), clock()) for _ in range(ranks)]

    def hear(self, event: events.Event) -> None:
        """Take one event of a rank."""
        now = self._clock()
        with self._lock:
            rank = self._ranks[event["rank"]]
            if event.get("hung_up"):
                rank.hung_up = now
                return
            if not any(other.begun for other in self._ranks):
                for other in self._ranks:  # until now they waited for Horovod
                    other.heard = other.moved = now
            rank.heard, rank.hung_up, rank.begun = now, None, True
            rank.ended, rank.cpu = bool(event.get("ended")), event["cpu"]
            if event["moves"] != rank.moves:
                rank.moves, rank.moved, rank.cpu_moved = event["moves"], now, rank.cpu
            if "pid" in event:
                rank.name = f"process {event['pid']} on {event['host']}"
            if "epoch" in event:
                rank.place = f"in epoch {event['epoch']}, step {event['step']}"

    def lost(self) -> str | None:
        """Which rank went away without a word, if one did."""
        with self._lock:
            for number, rank in enumerate(self._ranks):
                if rank.hung_up is not None and not rank.ended:
                    return f"rank {number} ({rank.name}) went away {rank.place}"
        return None

    def verdict(self) -> str | None:
        """Why the attempt must end, or None while there is hope."""
        now = self._clock()
        gone = self.lost()
        with self._lock:
            if gone and now - min(r.hung_up for r in self._ranks if r.hung_up) > REPORTING:
                return gone
            if not any(rank.begun for rank in self._ranks):
                return None  # Horovod has its own limit for the start
            for number, rank in enumerate(self._ranks):
                silent = now - rank.heard
                limit = self._timeout if rank.begun else max(self._timeout, SLACK)
                if silent > limit and not rank.ended:
                    return (
                        f"rank {number} ({rank.name}) has not been heard of for {silent:.0f} "
                        f"seconds; it was {rank.place}"
                    )
            return self._standstill(now)

    def _standstill(self, now: float) -> str | None:
        still = now - max(rank.moved for rank in self._ranks)
        shares = [(r.cpu - r.cpu_moved) / (now - r.moved or 1) for r in self._ranks]
        limit = self._timeout if max(shares) < IDLE else self._timeout * COMPUTING
        if all(rank.ended for rank in self._ranks):
            limit = max(limit, SLACK)
        if still <= limit:
            return None
        places = ", ".join(f"rank {n} {rank.place}" for n, rank in enumerate(self._ranks))
        return f"no rank has taken a step for {still:.0f} seconds: {places}"
