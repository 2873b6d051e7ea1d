"""Where the time of a fit went, and what to do about it. Runs on the driver."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

from spark_mnist.core import plan, sharding

PARTS = ("prepare", "start", "train", "validate", "publish")
"""Of a fit, in their order."""
MUCH = 0.3
"""Share of a step from which waiting is worth a hint."""
MOST = 0.5
"""Share of a fit from which one part of it is."""
SLOW = {
    "prepare": "most of the time went into the rows: persist() the DataFrame if it costs much to "
    "compute",
    "start": "most of the time went into starting ranks, which pays with more rows or epochs",
}
"""Hints on parts of a fit."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a fit by what was done in them, and how a training step spent its time."""

    prepare: float
    """Checking, counting and writing the rows."""
    start: float
    """Starting and ending ranks, which read their rows and write checkpoints."""
    train: float
    validate: float
    publish: float
    rows_per_second: float
    """Training rows of all ranks, for each second of ``train``."""
    input_share: float
    """Of a step, spent waiting for rows; 0..1."""
    allreduce_share: float
    """Of a step, from a rank's last gradient until all ranks' are averaged; 0..1."""
    memory: int
    """Most bytes that a rank's process had in memory."""
    hint: str | None
    """What would make the next fit faster, where something stands out."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part of the fit, by its name."""
        return {name: getattr(self, name) for name in PARTS}

    def __str__(self) -> str:
        seconds = ", ".join(f"{name} {times:.1f}" for name, times in self.seconds.items())
        text = (
            f"{self.rows_per_second:,.0f} rows/s; seconds: {seconds}; of a step "
            f"{self.input_share:.0%} waited for rows and {self.allreduce_share:.0%} for other ranks"
        )
        return f"{text}. Hint: {self.hint}" if self.hint else text


class Clock:
    """Adds up the driver's seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


def measure(clock: Clock, times: plan.RankTimes, training: plan.TrainingPlan) -> Timing:
    """Put together what driver and ranks measured.

    Args:
        clock: With the seconds ``prepare``, ``ranks`` and ``publish``.
        times: By the ranks since they last started.
        training: What they did.
    """
    seconds, train = clock.seconds, max(times.train, 1e-9)
    timing = Timing(
        prepare=seconds["prepare"],
        start=max(0.0, seconds["ranks"] - times.train - times.validate),
        train=times.train,
        validate=times.validate,
        publish=seconds["publish"],
        rows_per_second=times.epochs * training.sharding.rows / train,
        input_share=times.input / train,
        allreduce_share=times.allreduce / train,
        memory=times.memory,
        hint=None,
    )
    if times.attempt:  # what was lost before counts as time to start
        return timing
    return dataclasses.replace(timing, hint=hint(timing, training.sharding))


def hint(timing: Timing, sharding: sharding.RowSharding) -> str | None:
    """What would make the next fit faster, if something stands out."""
    ranks, batch = sharding.size, f"raise batch_size={sharding.batch_size}"
    if timing.allreduce_share >= MUCH:
        slower = ranks * (1 - timing.allreduce_share) < 1
        found = f"{ranks} ranks are slower than one would be" if slower else "ranks wait much"
        return f"{found}: steps are too small for what ranks must tell each other; {batch}"
    if timing.input_share >= MUCH:
        return "steps wait for rows: raise cache where they do not fit, or give ranks more cores"
    times = timing.seconds
    most = max(times, key=lambda name: times[name])
    if times[most] > MOST * sum(times.values()) and most in SLOW:
        return SLOW[most]
    return None
