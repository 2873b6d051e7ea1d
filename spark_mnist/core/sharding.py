"""Sharding of the training rows among ranks, and the number of steps: integers only.

Driver and ranks compute the same values. Runs on: driver, rank.

The remainder policy is *every row once, equal steps*. Rows are dealt like cards, so two ranks
never differ by more than one row; all ranks take the steps that the longest shard needs. In the
last step the ranks that are one row short pad their batch with a row of weight zero. The weights of
the real rows compensate for the padding, so that the averaged gradient is the mean over the rows of
the step.

Worked example: 1,001 rows, 2 ranks, batch_size 100. Shards of 501 and 500 rows, 6 steps. Steps 1
to 5 take 200 rows each; in step 6 rank 0 has one row and rank 1 one padding row: batches of 1, one
real row among 2, hence weights 2 and 0, and an averaged gradient of (2 g + 0) / 2 = g.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RowSharding:
    """The division of the training rows of one fit among its ranks."""

    size: int
    """Number of ranks."""
    rows: int
    """Number of training rows of all ranks together, at least one for each rank."""
    batch_size: int
    """Number of rows of one step on one rank."""

    def __post_init__(self) -> None:
        assert 1 <= self.size <= self.rows, self
        assert self.batch_size >= 1, self

    @property
    def padded_rows(self) -> int:
        """Number of rows of a rank in an epoch, with padding: the length of the longest shard."""
        return -(-self.rows // self.size)

    @property
    def steps(self) -> int:
        """Number of steps of an epoch, the same on every rank."""
        return -(-self.padded_rows // self.batch_size)

    @property
    def last_batch(self) -> int:
        """Number of rows of a rank in the last step of an epoch, with padding."""
        return self.padded_rows - (self.steps - 1) * self.batch_size

    @property
    def last_weight(self) -> float:
        """Weight of a real row in the last step: slots of the step divided by its real rows."""
        slots = self.size * self.last_batch
        padding = self.size * self.padded_rows - self.rows
        return slots / (slots - padding)


def share(rows: int, index: int, count: int) -> int:
    """Return how many of ``rows`` go to receiver ``index`` of ``count`` when dealt in turn."""
    return rows // count + (index < rows % count)


def share_of_ratio(rows: int, ratio: float) -> int:
    """Return the number of rows nearest to the share ``ratio`` of them, halves rounded up."""
    return int(rows * ratio + 0.5)
