"""Pace of the checkpoints within an epoch, which all ranks take at the same step. Runs on: rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from spark_mnist.ranks import collectives, loop

EARLY_SHARE = 0.9
"""Share of the time between two checkpoints after which the next may be taken."""


class Pace:
    """Number of steps between two checkpoints, estimated from the clocks of all ranks.

    Args:
        seconds: Seconds between two checkpoints; infinity for none within an epoch.
        clock: Function that returns seconds since any moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._interval = loop.BLOCK
        """Steps after which the time is compared, a multiple of ``BLOCK``; equal on all ranks."""
        self._first_step, self._start = 0, 0.0

    def begin(self, step: int) -> None:
        """Count from a step of an epoch, at which there is a checkpoint."""
        self._first_step, self._start = step, self._clock()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due, the same on all ranks.

        Args:
            step: Steps of the epoch so far, a multiple of ``BLOCK``.
        """
        steps = step - self._first_step
        if math.isinf(self._seconds) or steps < self._interval:
            return False
        total_seconds, ranks = collectives.allreduce_sum([self._clock() - self._start, 1.0])
        seconds = total_seconds / ranks
        blocks = steps * self._seconds / max(seconds, 1e-6) / loop.BLOCK
        self._interval = loop.BLOCK * max(1, int(blocks))
        return seconds >= EARLY_SHARE * self._seconds
