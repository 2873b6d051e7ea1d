"""Failure policy: the error of a start of the ranks that failed, and what follows it.

Both are functions of values alone. Runs on: driver.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from spark_mnist import errors
from spark_mnist.core import plan

logger = logging.getLogger(__name__)

SHARD_ERRORS = {
    error_type.__name__: error_type for error_type in (errors.ShardsLost, errors.RowsLost)
}
"""Errors of ranks by name for which the library is responsible, not the user."""
PYTHON_ERROR_EXIT_CODE = 1
"""Exit code of a Python process after an error, which a restart would not repair."""


class Action(enum.Enum):
    """Reaction to an error after which the ranks were not started again on the same shards."""

    REWRITE_SHARDS = enum.auto()
    """Write all shards again, and start all ranks from the last checkpoint."""
    USE_FEWER_RANKS = enum.auto()
    """Write all shards for as many ranks as Spark has free slots, and start these."""
    RAISE = enum.auto()
    """Raise the error."""


def may_restart(error: Exception, *, restarts: int, max_restarts: int) -> bool:
    """Return whether all ranks start again on the same shards, from the last checkpoint.

    Args:
        error: Error of the last start.
        restarts: Restarts of the ranks on the same shards so far.
        max_restarts: Value of the option of that name.
    """
    return isinstance(error, errors.RanksLost) and restarts < max_restarts


def action(error: Exception, *, rewrites: int, max_restarts: int, min_proc: int) -> Action:
    """Return what follows an error after which the ranks may not start again.

    Args:
        error: Error of the last start.
        rewrites: How many times lost shards were written again so far.
        max_restarts: Value of the option of that name. Shards are written again once at least.
        min_proc: Least number of ranks that may go on.
    """
    if isinstance(error, errors.RanksLost) and (error.free_slots or 0) >= min_proc:
        return Action.USE_FEWER_RANKS
    if isinstance(error, errors.ShardsLost) and rewrites < max(1, max_restarts):
        return Action.REWRITE_SHARDS
    return Action.RAISE


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of one start of the ranks."""

    ranks: int
    """Number of ranks."""
    reports: Sequence[plan.RankReport] = ()
    """Reports in rank order, of the ranks that sent one."""
    exit_code: int | None = None
    """Exit code of the first rank whose process ended without a report; after a signal, 128 and its
    number."""
    loss: str | None = None
    """Text about a rank that was lost, or about ranks that stand still."""
    job_error: BaseException | None = None
    """Error of the ranks' job in Spark."""
    job_cancelled: bool = False
    """Whether somebody cancelled this job."""
    has_started: bool = True
    """Whether any rank has sent a sign of life."""
    output: str = ""
    """Last lines that the ranks printed."""


def error_of(outcome: Outcome) -> errors.TrainingError | None:
    """Return the error of a start of the ranks, or None where all ranks succeeded."""
    if outcome.loss:
        is_final = outcome.exit_code == PYTHON_ERROR_EXIT_CODE
        error_type = errors.TrainingError if is_final else errors.RanksLost
        return error_type(f"{outcome.loss}{outcome.output}")
    if outcome.job_cancelled:
        return errors.FitCancelled(
            "the job of the ranks was cancelled in Spark; nothing was published"
        )
    if outcome.job_error or len(outcome.reports) < outcome.ranks:
        event = "Spark ended the ranks' job" if outcome.has_started else "the ranks did not start"
        counts = f"{len(outcome.reports)} of {outcome.ranks} ranks gave a report"
        return errors.RanksLost(f"{event} ({outcome.job_error or counts}){outcome.output}")
    return error_of_reports(outcome.reports)


def error_of_reports(reports: Sequence[plan.RankReport]) -> errors.TrainingError | None:
    """Return the error that the reports of all ranks make up, or None where all succeeded."""
    if not succeeded(reports):
        return _error_of_failures(
            [report for report in reports if isinstance(report, plan.RankFailure)], len(reports)
        )
    progress = reports[0].progress
    last, best_epoch = progress.history[-1], progress.best.epoch
    text = (
        f"training failed in epoch {last.epoch}: its losses are {last.losses}, or a "
        "weight is no number"
    )
    if not best_epoch:
        return errors.NotFinite(
            f"{text}; nothing was saved. Lower learning_rate, or look at the features"
        )
    if progress.not_finite:
        logger.warning("%s; epoch %d, the best before, is what is saved", text, best_epoch)
    digests = {report.rank: report.progress.best.digest for report in reports}
    if len(set(digests.values())) != 1:
        return errors.RanksDiverged(
            f"the ranks ended with different weights, nothing was saved; sha256 by rank: {digests}"
        )
    return None


def succeeded(reports: Sequence[plan.RankReport]) -> TypeGuard[Sequence[plan.RankSuccess]]:
    """Return whether all reports are those of ranks that succeeded."""
    return all(isinstance(report, plan.RankSuccess) for report in reports)


def _error_of_failures(failures: Sequence[plan.RankFailure], ranks: int) -> errors.TrainingError:
    """Return the error of the rank that failed first, and not by the failure of another."""
    first = min(failures, key=lambda failure: (failure.collective, failure.time, failure.rank))
    if first.collective:
        return errors.RanksLost(f"the connection between ranks broke: {first.message}")
    if first.type in SHARD_ERRORS:
        return SHARD_ERRORS[first.type](first.message)
    return errors.RankError(
        f"rank {first.rank} of {ranks} raised {first.type}: {first.message}",
        rank=first.rank,
        rank_traceback=first.traceback,
    )
