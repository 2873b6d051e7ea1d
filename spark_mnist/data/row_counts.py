"""Row counts of a fit: where each row of its input went; a manifest keeps them. Runs on: driver."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spark_mnist import errors
from spark_mnist.core import plan, renames, sharding

MANIFEST_KEYS = {"total": "given", "by_rank": "read"}
"""Names of fields in manifests, where they have another."""


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """The rows of one rank, the same in each epoch in which there were as many ranks."""

    rank: int
    """Number of the rank, from 0."""
    train: int
    """Number of rows that the rank trained on."""
    validation: int
    """Number of rows that the rank validated on."""
    epochs: int
    """Number of epochs in which the rank used each of these rows once."""


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """The rows of a fit: ``total`` is ``dropped``, ``train`` and ``validation`` together."""

    total: int
    """Number of rows of the input."""
    dropped: Mapping[str, int]
    """Number of rows that could not be used, by reason."""
    train: int
    """Number of rows that trained."""
    validation: int
    """Number of rows that validated."""
    by_rank: tuple[RankRows, ...]
    """Rows that each rank used, in rank order; first those of epochs with more ranks, if any."""

    @property
    def given(self) -> int:
        """Former name of ``total``; deprecated."""
        renames.warn("RowCounts.given", "total")
        return self.total

    @property
    def read(self) -> tuple[RankRows, ...]:
        """Former name of ``by_rank``; deprecated."""
        renames.warn("RowCounts.read", "by_rank")
        return self.by_rank

    def as_manifest(self) -> dict[str, Any]:
        """Return the counts as JSON values, by the names that every release has written."""
        fields = dataclasses.asdict(self)
        return {MANIFEST_KEYS.get(name, name): value for name, value in fields.items()}


def verify(
    training: plan.TrainingPlan, progress: plan.Progress, num_rows: int, dropped: Mapping[str, int]
) -> RowCounts:
    """Verify that all rows of the input are accounted for, and return their counts.

    Args:
        training: The plan, with the rows of the shards as the footers of their files say.
        progress: The progress, with the rows that the model saw on each rank in each epoch.
        num_rows: Number of rows of the input.
        dropped: Number of rows that could not be used, by reason.

    Raises:
        errors.RowsLost: A row of the input is in no file, or a rank did not use each row of its
            files once in each epoch.
    """
    train, validation = training.train, training.validation
    ranks = training.sharding.size
    expected = {ranks: rows_by_rank(train, validation, ranks)}
    epochs: Counter[int] = Counter()
    for record, actual_rows in zip(progress.history, progress.rows_by_epoch, strict=True):
        size = len(actual_rows)
        if size > ranks and size not in expected:  # before ranks were lost for good
            expected[size] = rows_by_rank(train, validation, size)
        epochs[size] += 1
        expected_rows = expected.get(size, expected[ranks])
        if actual_rows != expected_rows:
            raise errors.RowsLost(
                f"in epoch {record.epoch} the ranks trained and validated on {actual_rows} rows; "
                f"the footers of their files say {expected_rows}. Nothing was saved"
            )
    num_dropped = sum(dropped.values())
    if num_rows != num_dropped + train.rows + validation.rows:
        raise errors.RowsLost(
            f"of {num_rows} rows {num_dropped} were left out, and the files have {train.rows} to "
            f"train and {validation.rows} to validate. Nothing was saved"
        )
    return RowCounts(
        total=num_rows,
        dropped=dict(dropped),
        train=train.rows,
        validation=validation.rows,
        by_rank=tuple(
            RankRows(rank=rank, train=train_rows, validation=validation_rows, epochs=epochs[size])
            for size in sorted(expected, reverse=True)
            for rank, (train_rows, validation_rows) in enumerate(expected[size])
        ),
    )


def rows_by_rank(train: plan.Shards, validation: plan.Shards, ranks: int) -> plan.RowsByRank:
    """Return the rows of each rank, for training and for validation.

    Rows are dealt to the files in turn, and files to the ranks.
    """
    return tuple(
        (sharding.share(train.rows, rank, ranks), sharding.share(validation.rows, rank, ranks))
        for rank in range(ranks)
    )
