"""Timing of a fit: seconds by part, and a hint for the next fit. Runs on: driver."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

from spark_mnist.core import plan, sharding

PARTS = ("prepare", "start", "train", "validate", "publish")
"""Parts of a fit, in their order."""
WAIT_HINT_SHARE = 0.3
"""Share of a training step from which waiting is worth a hint."""
PART_HINT_SHARE = 0.5
"""Share of a fit from which one part of it is worth a hint."""
PART_HINTS = {
    "prepare": "most of the time went into the rows: persist() the DataFrame if it costs much to "
    "compute",
    "start": "most of the time went into starting ranks, which pays with more rows or epochs",
}
"""Hint for each part of a fit that may take most of the time."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each part of a fit, and the shares of a training step that were waiting."""

    prepare: float
    """Seconds for checking, counting and writing the rows."""
    start: float
    """Seconds for starting and ending ranks, which read their rows and write checkpoints."""
    train: float
    """Seconds of training steps, waiting included."""
    validate: float
    """Seconds of validation after each epoch."""
    publish: float
    """Seconds for publishing the new version."""
    rows_per_second: float
    """Training rows of all ranks, for each second of ``train``."""
    input_share: float
    """Share of a step spent waiting for rows; 0..1."""
    allreduce_share: float
    """Share of a step from a rank's last gradient until all ranks' are averaged; 0..1."""
    memory: int
    """Most bytes that a rank's process had in memory."""
    hint: str | None
    """Advice that would make the next fit faster; None where nothing stands out."""

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part of the fit, by its name."""
        return {name: getattr(self, name) for name in PARTS}

    def __str__(self) -> str:
        seconds = ", ".join(f"{name} {part:.1f}" for name, part in self.seconds.items())
        text = (
            f"{self.rows_per_second:,.0f} rows/s; seconds: {seconds}; of a step "
            f"{self.input_share:.0%} waited for rows and {self.allreduce_share:.0%} for other ranks"
        )
        return f"{text}. Hint: {self.hint}" if self.hint else text


class Clock:
    """Clock that adds up the driver's seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def add_time(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to those of its name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def measure(clock: Clock, times: plan.RankTimes, training: plan.TrainingPlan) -> Timing:
    """Combine the seconds that the driver and the ranks measured.

    Args:
        clock: The driver's clock, with the seconds ``prepare``, ``ranks`` and ``publish``.
        times: Times of the ranks since they last started.
        training: The plan that the ranks carried out.
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
    if times.attempt:  # no hint: ``start`` includes the time of the attempts that failed
        return timing
    return dataclasses.replace(timing, hint=hint(timing, training.sharding))


def hint(timing: Timing, row_sharding: sharding.RowSharding) -> str | None:
    """Return advice that would make the next fit faster, or None where nothing stands out."""
    ranks, remedy = row_sharding.size, f"raise batch_size={row_sharding.batch_size}"
    if timing.allreduce_share >= WAIT_HINT_SHARE:
        slower = ranks * (1 - timing.allreduce_share) < 1
        problem = f"{ranks} ranks are slower than one would be" if slower else "ranks wait much"
        return f"{problem}: steps are too small for what ranks must tell each other; {remedy}"
    if timing.input_share >= WAIT_HINT_SHARE:
        return "steps wait for rows: raise cache where they do not fit, or give ranks more cores"
    seconds = timing.seconds
    longest = max(seconds, key=lambda name: seconds[name])
    if seconds[longest] > PART_HINT_SHARE * sum(seconds.values()) and longest in PART_HINTS:
        return PART_HINTS[longest]
    return None
