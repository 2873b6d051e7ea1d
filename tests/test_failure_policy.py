import pytest

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.launch import failure_policy
from spark_mnist.launch.failure_policy import Action, Outcome
from tests.conftest import rank_success

EFFECT = {"type": "UnknownError", "message": "Horovod has been shut down", "collective": True}
CAUSE = {"type": "ValueError", "message": "bad row", "collective": False}


def success(rank, digest="same", epoch=1, loss=0.5, not_finite=False):
    record = plan.EpochRecord(epoch=1, losses={"loss": loss}, metrics={})
    best = plan.BestEpoch(epoch=epoch, digest=digest)
    progress = plan.Progress(epoch=1, history=(record,), best=best, not_finite=not_finite)
    return rank_success(progress, rank)


def failure(rank, time=1.0, **values):
    return plan.RankFailure(rank=rank, time=time, traceback=f"line {rank}", **values)


LOST, SHARDS = errors.RanksLost("gone"), errors.ShardsLost("deleted")
OTHERS = [
    errors.RankError("raised", rank=1, rank_traceback=""),
    errors.RowsLost("short"),
    errors.NotFinite("nan"),
    errors.RanksDiverged("differ"),
    errors.FitCancelled("cancelled"),
    errors.TrainingError("exit code 1"),
    ValueError("a defect"),
]


@pytest.mark.parametrize(
    ("error", "restarts", "max_restarts", "expected"),
    [
        (LOST, 0, 2, True),
        (LOST, 1, 2, True),
        (LOST, 2, 2, False),
        (LOST, 0, 0, False),
        (SHARDS, 0, 2, False),
        *((error, 0, 9, False) for error in OTHERS),
    ],
)
def test_lost_ranks_start_again(error, restarts, max_restarts, expected):
    restart = failure_policy.may_restart(error, restarts=restarts, max_restarts=max_restarts)
    assert restart is expected


@pytest.mark.parametrize(
    ("error", "rewrites", "max_restarts", "expected"),
    [
        (SHARDS, 0, 2, Action.REWRITE_SHARDS),
        (SHARDS, 1, 2, Action.REWRITE_SHARDS),
        (SHARDS, 2, 2, Action.RAISE),
        (SHARDS, 0, 0, Action.REWRITE_SHARDS),
        (SHARDS, 1, 0, Action.RAISE),
        (errors.RanksLost("gone", 4), 9, 2, Action.USE_FEWER_RANKS),
        (errors.RanksLost("gone", 3), 0, 0, Action.USE_FEWER_RANKS),
        (errors.RanksLost("gone", 2), 0, 2, Action.RAISE),
        (errors.RanksLost("gone", 0), 0, 2, Action.RAISE),
        (LOST, 0, 2, Action.RAISE),
        *((error, 0, 9, Action.RAISE) for error in OTHERS),
    ],
)
def test_what_follows_where_ranks_do_not_start_again(error, rewrites, max_restarts, expected):
    action = failure_policy.action(error, rewrites=rewrites, max_restarts=max_restarts, min_proc=3)
    assert action is expected


BOTH = [success(0), success(1)]


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        ({"reports": BOTH}, None, ""),
        ({"loss": "rank 1 went away", "output": "\nlast line"}, errors.RanksLost, "away\nlast"),
        ({"loss": "rank 1 (signal 9)", "exit_code": 137}, errors.RanksLost, "signal 9"),
        ({"loss": "rank 1 (exit code 1)", "exit_code": 1}, errors.TrainingError, "code 1"),
        ({"loss": "rank 1", "job_cancelled": True}, errors.RanksLost, "rank 1"),
        ({"job_cancelled": True, "job_error": OSError("x")}, errors.FitCancelled, "cancelled"),
        ({"job_error": OSError("disk")}, errors.RanksLost, "Spark ended the ranks' job (disk)"),
        ({"job_error": OSError("disk"), "has_started": False}, errors.RanksLost, "did not start"),
        ({"reports": BOTH[:1]}, errors.RanksLost, "1 of 2 ranks gave a report"),
        ({"reports": [success(0), success(1, digest="other")]}, errors.RanksDiverged, "sha256"),
        ({"reports": [success(r, epoch=0, loss=float("nan")) for r in (0, 1)]},
         errors.NotFinite, "epoch 1: its losses are {'loss': nan}"),
        ({"reports": [success(r, not_finite=True) for r in (0, 1)]}, None, ""),
        ({"reports": [failure(0, 1.0, **EFFECT), failure(1, 2.0, **CAUSE)]},
         errors.RankError, "rank 1 of 2 raised ValueError: bad row"),
        ({"reports": [failure(0, 2.0, **CAUSE), failure(1, 1.0, **CAUSE)]},
         errors.RankError, "rank 1 of 2"),
        ({"reports": [success(0), failure(1, **EFFECT)]}, errors.RanksLost, "connection between"),
        ({"reports": [success(0), failure(1, **{**CAUSE, "type": "ShardsLost"})]},
         errors.ShardsLost, "bad row"),
        ({"reports": [success(0), failure(1, **{**CAUSE, "type": "RowsLost"})]},
         errors.RowsLost, "bad row"),
    ],
)  # fmt: skip
def test_the_error_of_a_start(outcome, kind, message):
    error = failure_policy.error_of(Outcome(ranks=2, **outcome))
    assert type(error) is (kind or type(None))
    assert message in str(error or "")


def test_the_rank_that_failed_first_is_told_with_its_traceback():
    reports = [failure(0, 1.0, **EFFECT), failure(1, 2.0, **CAUSE)]
    error = failure_policy.error_of_reports(reports)
    assert (error.rank, error.rank_traceback) == (1, "line 1")
