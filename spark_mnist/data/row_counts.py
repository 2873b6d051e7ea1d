"""Where each row of a fit's input went: the receipt that a manifest keeps. Runs on the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spark_mnist import errors
from spark_mnist.core import plan, sharding


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """The rows of one rank, the same in each epoch of the fit."""

    rank: int
    train: int
    validation: int
    epochs: int
    """In how many epochs it used each of them once."""


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """The rows of a fit: ``given`` is ``dropped``, ``train`` and ``validation`` together."""

    given: int
    dropped: Mapping[str, int]
    """Rows that could not be used, by reason."""
    train: int
    validation: int
    read: tuple[RankRows, ...]
    """What each rank read, in rank order."""


def verify(
    training: plan.TrainingPlan, progress: plan.Progress, given: int, dropped: Mapping[str, int]
) -> RowCounts:
    """Account for all rows.

    Args:
        training: With the rows of the shards, as the footers of their files say.
        progress: With the rows that the model saw on each rank in each epoch.
        given: Rows of the input.
        dropped: Rows that could not be used, by reason.

    Raises:
        errors.RowsLost: A row of the input is in no file, or a rank did not use each row of its
            files once in each epoch.
    """
    train, validation = training.train, training.validation
    ranks = training.sharding.size
    expected = tuple(
        (rows_of(train, r, ranks), rows_of(validation, r, ranks)) for r in range(ranks)
    )
    for record, found in zip(progress.history, progress.read, strict=True):
        if found != expected:
            raise errors.RowsLost(
                f"in epoch {record.epoch} the ranks trained and validated on {found} rows; the "
                f"footers of their files say {expected}. Nothing was saved"
            )
    left_out = sum(dropped.values())
    if given != left_out + train.rows + validation.rows:
        raise errors.RowsLost(
            f"of {given} rows {left_out} were left out, and the files have {train.rows} to train "
            f"and {validation.rows} to validate. Nothing was saved"
        )
    return RowCounts(
        given=given,
        dropped=dict(dropped),
        train=train.rows,
        validation=validation.rows,
        read=tuple(
            RankRows(rank=rank, train=t, validation=v, epochs=len(progress.read))
            for rank, (t, v) in enumerate(expected)
        ),
    )


def rows_of(shards: plan.Shards, rank: int, ranks: int) -> int:
    """Rows in the files of one rank."""
    files = len(shards.urls)
    return sum(sharding.share(shards.rows, index, files) for index in range(rank, files, ranks))
