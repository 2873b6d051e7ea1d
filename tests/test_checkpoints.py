import dataclasses
import math
import pickle
from pathlib import Path

import pytest

from spark_mnist.core import plan
from spark_mnist.store import checkpoints
from tests.conftest import rank_success


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}"


def progress(epoch, best=None):
    record = plan.EpochRecord(epoch=epoch, losses={"loss": 0.5}, metrics={"accuracy": 1.0})
    return plan.Progress(
        epoch=epoch,
        history=(record,) * epoch,
        rows_by_epoch=(((3, 1), (2, 1)),) * epoch,
        best=best or plan.BestEpoch(),
        files={"weights.npz": b"w%d" % epoch, "optimizer.npz": b"o"},
    )


def newest(url, ranks=0):
    """What rank 0 reads: the checkpoint that the driver has found."""
    found = checkpoints.locate(url, ranks)
    return found and checkpoints.read(url, found[0])


def test_nothing_is_found_before_the_first_epoch(url):
    assert newest(url) is None


def test_what_was_written_last_is_read(url):
    for epoch in (1, 2, 3):
        checkpoints.save(url, 0, progress(epoch))
    assert newest(url) == progress(3)
    assert newest(url).best.loss == math.inf
    best = plan.BestEpoch(epoch=3, loss=0.25, digest="d", files={"weights.npz": b"best"})
    checkpoints.save(url, 0, progress(4, best))
    assert newest(url) == progress(4, best)


def test_a_later_attempt_counts_even_where_an_earlier_one_still_writes(url):
    checkpoints.save(url, 0, progress(5))
    checkpoints.save(url, 1, progress(6))
    checkpoints.save(url, 0, progress(9))
    assert newest(url) == progress(6)
    checkpoints.save(url, 10, progress(7))
    assert newest(url) == progress(7)


def test_a_damaged_checkpoint_is_left_out(url, tmp_path, caplog):
    checkpoints.save(url, 0, progress(5))
    checkpoints.save(url, 1, progress(6))
    (path,) = Path(tmp_path).glob("attempt-000001-*/v*/weights.npz")
    path.write_bytes(b"w")
    assert newest(url) == progress(5)
    assert "a checkpoint of this fit is left out" in caplog.text


def test_one_that_cannot_be_removed_ends_no_fit(url, caplog, monkeypatch):
    checkpoints.save(url, 0, progress(1))

    def fail(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(checkpoints.model_store.Store, "remove", fail)
    checkpoints.save(url, 0, progress(2))
    assert newest(url) == progress(2)
    assert "the checkpoint before could not be removed: no" in caplog.text


def test_only_the_last_is_kept(url, tmp_path):
    for epoch in (1, 2, 3):
        checkpoints.save(url, 0, progress(epoch))
    assert len(list(Path(tmp_path).rglob("weights.npz"))) == 1


def test_within_an_epoch_the_last_is_kept_and_that_of_its_start(url, tmp_path):
    within = [dataclasses.replace(progress(2), step=step, ranks=3) for step in (32, 1024)]
    for each in (progress(2), *within):
        checkpoints.save(url, 0, each)
    assert newest(url, ranks=3) == within[1]
    assert newest(url, ranks=2) == newest(url) == progress(2)
    assert checkpoints.read(url, within[0]) is None
    checkpoints.save(url, 0, progress(3))
    assert newest(url) == progress(3)
    assert len(list(Path(tmp_path).rglob("weights.npz"))) == 1


def test_a_thousand_ranks_over_two_hundred_epochs_make_small_reports(url, tmp_path):
    """The rows of a rank, which no epoch changes, are told once."""
    history = tuple(
        plan.EpochRecord(epoch=n, losses={"loss": 1 / n}, metrics={"accuracy": 1 - 1 / n})
        for n in range(1, 201)
    )
    rows = tuple((60_000 + rank % 2, 15_000) for rank in range(1000))
    reached = dataclasses.replace(progress(200), history=history, rows_by_epoch=(rows,) * 200)
    checkpoints.save(url, 0, reached)
    assert newest(url) == reached
    (manifest,) = tmp_path.rglob("manifest.json")
    assert manifest.stat().st_size < 150_000
    report = rank_success(newest(url))
    assert len(pickle.dumps(report)) < 50_000
    others = dataclasses.replace(reached, history=(), rows_by_epoch=(), files={})
    assert len(pickle.dumps(rank_success(others, rank=999))) < 2_000
