"""Ranks that are killed, hang, raise or lose their shards, in fits of two ranks on local Spark."""

import contextlib
import errno
import logging
import os
import signal
import threading
import time
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest

import spark_mnist
from spark_mnist import errors
from spark_mnist.launch import launcher
from spark_mnist.store.filesystem import Files
from tests.conftest import arrays
from tests.faults import harness
from tests.faults.harness import Saboteur, nothing_left, send, trained

pytestmark = pytest.mark.ranks

EPOCHS = 40
OPTIONS = {
    "num_proc": 2,
    "batch_size": 16,
    "epochs": EPOCHS,
    "verbose": 0,
    "seed": 5,
    "heartbeat_timeout": 6.0,
}


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """Return the result of these tests' fit without any fault."""
    root = str(tmp_path_factory.mktemp("undisturbed"))
    result = spark_mnist.fit(digits, "m", store=root, **OPTIONS)
    return result.records, arrays(root, "m", 1)


@pytest.fixture
def fit(digits, store):
    return lambda **change: spark_mnist.fit(digits, "m", **{**OPTIONS, "store": store, **change})


def both_run():
    return len(harness.ranks()) == 2


def assert_same(result, store, undisturbed):
    epochs, weights = undisturbed
    assert result.records == epochs
    for mine, other in zip(arrays(store, "m", result.version), weights, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    assert [rows.epochs for rows in result.rows.by_rank] == [EPOCHS] * 2


@pytest.fixture
def starts(monkeypatch):
    """The plans with which ranks were started, in order."""
    plans, real = [], launcher._attempt

    def attempt(spark, training, *others):
        plans.append(training)
        return real(spark, training, *others)

    monkeypatch.setattr(launcher, "_attempt", attempt)
    return plans


RECOVERED = {
    "a rank is killed": (3, [send(signal.SIGKILL, 1)]),
    "rank 0 is killed": (3, [send(signal.SIGKILL, 0)]),
    "a rank is killed before its first step": (0, [send(signal.SIGKILL, 1)]),
    "both ranks are killed": (3, [send(signal.SIGKILL, 0, 1)]),
    "a rank stops answering": (3, [send(signal.SIGSTOP, 1)]),
    "a rank stops answering before its first step": (0, [send(signal.SIGSTOP, 0)]),
    "a rank crashes": (3, [send(signal.SIGSEGV, 1)]),
    "a rank is terminated": (3, [send(signal.SIGTERM, 0)]),
    "a rank is killed twice": (3, [send(signal.SIGKILL, 1), send(signal.SIGKILL, 0)]),
}


@pytest.mark.parametrize(
    ("epochs", "harms"),
    [
        pytest.param(*case, id=name, marks=[] if name == "a rank is killed" else pytest.mark.slow)
        for name, case in RECOVERED.items()
    ],
)
def test_what_is_lost_is_made_up_for(fit, store, undisturbed, spark, starts, epochs, harms):
    with nothing_left(store), Saboteur(lambda: both_run() and trained(store, "m", epochs), *harms):
        result = fit()
    assert_same(result, store, undisturbed)
    assert len(starts) == 1 + len(harms)
    assert spark.range(3).count() == 3


def test_a_python_worker_is_killed(fit, store, undisturbed, starts):
    def kill_worker():
        rank = harness.all_ranks()[1]
        worker = next(p for p in rank.parents() if "pyspark.daemon" in " ".join(p.cmdline()))
        worker.kill()

    with nothing_left(store), Saboteur(lambda: trained(store, "m", 3), kill_worker):
        assert_same(fit(), store, undisturbed)
    assert len(starts) == 2


@pytest.mark.slow
def test_a_checkpoint_is_damaged_before_it_is_needed(fit, store, undisturbed, caplog):
    def damage():
        send(signal.SIGSTOP, 0, 1)()
        time.sleep(0.2)
        for path in Path(store).glob("m/.work-*/attempt-*/v*/weights.npz"):
            path.write_bytes(path.read_bytes()[:-100])

    with nothing_left(store), Saboteur(lambda: trained(store, "m", 3), damage):
        assert_same(fit(), store, undisturbed)
    assert "a checkpoint of this fit is left out" in caplog.text


@pytest.mark.slow
def test_a_continued_fit_loses_a_rank(fit, store, undisturbed):
    fit(epochs=EPOCHS - 20)
    saboteur = Saboteur(lambda: trained(store, "m", EPOCHS - 15), send(signal.SIGKILL, 1))
    with nothing_left(store), saboteur:
        result = fit(epochs=20, continuous=True)
    assert [record.epoch for record in result.records] == list(range(EPOCHS - 19, EPOCHS + 1))
    for mine, other in zip(arrays(store, "m", 2), undisturbed[1], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.slow
def test_a_fit_with_patience_loses_a_rank(fit, store, digits, tmp_path):
    options = {"patience": 5, "optimizer": "sgd", "learning_rate": 1.0, "epochs": 60}
    calm = spark_mnist.fit(digits, "m", **{**OPTIONS, **options, "store": str(tmp_path / "calm")})
    assert len(calm.records) < 60
    with Saboteur(lambda: trained(store, "m", 2), send(signal.SIGKILL, 1)):
        result = fit(**options)
    assert result.records == calm.records
    assert spark_mnist.describe("m", store=store).num_epochs == (
        spark_mnist.describe("m", store=str(tmp_path / "calm")).num_epochs
    )


def test_the_best_epoch_before_a_lost_rank_is_published(fit, store, digits, tmp_path):
    """With rates that grow, the first epochs are the best, and a later rank is lost."""
    options = {"patience": 20, "optimizer": "sgd", "learning_rate": 0.2, "epochs": 14}
    options["callbacks"] = worsen
    calm = spark_mnist.fit(digits, "m", **{**OPTIONS, **options, "store": str(tmp_path / "calm")})
    best = spark_mnist.describe("m", store=str(tmp_path / "calm")).num_epochs
    assert best < 8 < len(calm.records)
    with Saboteur(lambda: trained(store, "m", 9), send(signal.SIGKILL, 1)):
        result = fit(**options)
    assert result.records == calm.records
    assert spark_mnist.describe("m", store=store).num_epochs == best
    for mine, other in zip(arrays(store, "m", 1), arrays(tmp_path / "calm", "m", 1), strict=True):
        np.testing.assert_array_equal(mine, other)


def worsen():
    """Let a learning rate grow after four epochs until it does harm."""

    class Worsen(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            time.sleep(0.2)
            self.model.optimizer.learning_rate = 0.1 if epoch < 4 else 3.0

    return [Worsen()]


def differing():
    """A network in which ranks differ within an epoch: statistics, and what is dropped."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, activation="relu"), keras.layers.BatchNormalization()]
    layers += [keras.layers.Dropout(0.3), keras.layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((784,)), *layers])


def in_an_epoch(store):
    return list(Path(store).glob("m/.work-*/attempt-*-step-*/v000001/manifest.json"))


@pytest.mark.parametrize(
    ("cache", "rank"), [("1g", 1), pytest.param("none", 0, marks=pytest.mark.slow)]
)
def test_a_long_epoch_goes_on_at_its_last_checkpoint(
    fit, store, digits, tmp_path, starts, cache, rank
):
    options = {"epochs": 2, "batch_size": 1, "network": differing, "optimizer": "adam"}
    options |= {"cache": cache, "callbacks": slow_steps, "metrics": ["top_k_categorical_accuracy"]}
    calm = spark_mnist.fit(digits, "m", **{**OPTIONS, **options, "store": str(tmp_path / "calm")})
    starts.clear()
    with nothing_left(store), Saboteur(lambda: in_an_epoch(store), send(signal.SIGKILL, rank)):
        result = fit(**options, checkpoint_every=0.2)
    assert [start.resume and start.resume.step > 0 for start in starts] == [None, True]
    assert result.records == calm.records
    for file in ("weights.npz", "optimizer.npz"):
        mine, calms = arrays(store, "m", 1, file), arrays(tmp_path / "calm", "m", 1, file)
        for array, other in zip(mine, calms, strict=True):
            np.testing.assert_array_equal(array, other)


def slow_steps():
    """Make each step take so long that a rank can be hit between two checkpoints."""

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.02)

    return [Slow()]


@pytest.fixture
def published(fit, store, starts):
    """A version that must survive what happens to the next."""
    fit(epochs=1)
    starts.clear()
    return harness.contents(store)


@pytest.mark.slow
def test_ranks_lost_too_often_are_an_error(fit, store, published, starts):
    kill = send(signal.SIGKILL, 1)
    # Horovod tells how the process ended, unless the others are found waiting for it before that.
    words = r"exit code 137, as of a process that was kill|rank 1 did not start(.|\n)*Killed"
    lost = pytest.raises(errors.RanksLost, match=words)
    with nothing_left(store), Saboteur(both_run, *[kill] * 3), lost:
        fit()
    assert harness.contents(store) == published
    assert len(starts) == 3


def test_without_restarts_a_lost_rank_is_named_at_once(fit, store, starts):
    lost = pytest.raises(errors.RanksLost, match=r"rank 1 (\(.*went away|did not start)")
    with nothing_left(store), Saboteur(both_run, send(signal.SIGKILL, 1)), lost:
        fit(max_restarts=0)
    assert not list(Path(store).glob("*"))
    assert len(starts) == 1


def own(harm):
    """A function that makes a model which does harm on rank 1 when it begins to train."""

    def make():
        import keras

        class Harmful(keras.layers.Layer):
            def call(self, x, training=False):
                if training and os.environ["HOROVOD_RANK"] == "1":
                    harm()
                return x

        return keras.Sequential([keras.Input((784,)), Harmful(), keras.layers.Dense(10)])

    return make


def raise_on_purpose():
    raise ValueError("on purpose")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (raise_on_purpose, errors.RankError, r"(?s)rank 1 of 2 raised ValueError.*on purpose"),
        (lambda: os._exit(3), errors.RanksLost, r"rank 1 \(process .*\(exit code 3\)"),
        (lambda: time.sleep(600), errors.RanksLost, "no rank has taken a step for"),
        (lambda: os.abort(), errors.RanksLost, r"rank 1 .*\(exit code 134\)"),
    ],
    ids=["raises", "exits", "sleeps", "aborts"],
)
def test_a_users_model_misbehaves_on_one_rank(fit, store, published, harm, error, message, spark):
    with nothing_left(store), pytest.raises(error, match=message) as caught:
        fit(network=own(harm), max_restarts=0)
    if error is errors.RankError:
        assert caught.value.rank == 1
        assert "on purpose" in caught.value.rank_traceback
    assert harness.contents(store) == published
    assert spark.range(3).count() == 3


@pytest.mark.slow
def test_a_users_error_is_not_tried_again(fit, store, published, starts):
    def broken():
        raise LookupError("no such units")

    with pytest.raises(errors.RankError, match="raised LookupError: no such units") as caught:
        fit(network=broken)
    assert "in broken" in caught.value.rank_traceback
    assert len(starts) == 1
    assert harness.contents(store) == published


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def break_shards(monkeypatch, harm, times):
    """Do harm to a shard before each of the first starts of the ranks."""
    real, left = launcher._attempt, [times]

    def attempt(spark, training, *others):
        if left[0]:
            left[0] -= 1
            harm(Path(training.train.urls[1].removeprefix("file:")))
        return real(spark, training, *others)

    monkeypatch.setattr(launcher, "_attempt", attempt)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [delete, truncate])
def test_lost_shards_are_written_again(fit, store, undisturbed, monkeypatch, starts, harm):
    break_shards(monkeypatch, harm, 1)
    with nothing_left(store):
        assert_same(fit(), store, undisturbed)
    assert [start.attempt for start in starts] == [0, 3]  # 1 would be a restart on the same shards


@pytest.mark.slow
def test_shards_that_get_lost_again_are_an_error(fit, store, published, monkeypatch):
    break_shards(monkeypatch, truncate, 3)
    with (
        nothing_left(store),
        pytest.raises(errors.ShardsLost, match="rank 1 cannot read its shard"),
    ):
        fit()
    assert harness.contents(store) == published


@pytest.mark.slow
def test_training_comes_to_nothing(fit, store, published):
    with nothing_left(store), pytest.raises(errors.NotFinite, match="Lower learning_rate"):
        fit(optimizer="sgd", learning_rate=1e30)
    assert harness.contents(store) == published


@pytest.mark.slow
def test_the_disk_is_full_when_the_model_is_published(fit, store, published, monkeypatch):
    real = Files.write_blocks

    def write(self, path, blocks):
        if path.endswith("optimizer.npz"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, blocks)

    monkeypatch.setattr(Files, "write_blocks", write)
    with pytest.raises(errors.NotPublished, match="No space left") as caught:
        fit(epochs=1)
    assert [model.version for model in spark_mnist.models(store)] == [1]
    monkeypatch.setattr(Files, "write_blocks", real)
    with nothing_left(store):
        assert spark_mnist.publish("m", caught.value.work, store=store) == 2


@pytest.mark.slow
def test_slots_are_taken_by_another_job(fit, store, spark):
    def busy():
        with contextlib.suppress(Exception):  # it is cancelled
            spark.sparkContext.range(0, 1, numSlices=1).foreach(lambda _: time.sleep(30))

    other = threading.Thread(target=busy, daemon=True)
    other.start()
    tracker = spark.sparkContext.statusTracker()
    harness.wait(tracker.getActiveStageIds)
    try:
        with pytest.raises(errors.TooFewSlots, match="has 2 slots, 1 of them free"):
            fit()
    finally:
        spark.sparkContext.cancelAllJobs()
        other.join()


@pytest.mark.slow
def test_a_store_that_executors_do_not_share(fit):
    with pytest.raises(errors.ClusterError, match="Spark cannot write shards to memory://"):
        fit(store="memory://models")


@pytest.mark.slow
def test_a_store_that_cannot_be_written(fit, tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(
        errors.ClusterError, match=r"the driver cannot read and write in .*give store="
    ):
        fit(store=str(tmp_path / "file"))


def test_a_fit_that_is_cancelled_in_spark_ends_for_good(fit, store, spark, starts):
    cancelled = pytest.raises(errors.FitCancelled, match="was cancelled in Spark; nothing was pub")
    harm = Saboteur(lambda: trained(store, "m", 2), spark.sparkContext.cancelAllJobs)
    with nothing_left(store), harm, cancelled:
        fit()
    assert len(starts) == 1
    assert not list(Path(store).glob("*"))
    assert spark.range(3).count() == 3


def test_the_ranks_job_is_the_callers(fit, store, spark):
    context, tracker = spark.sparkContext, spark.sparkContext.statusTracker()
    seen = []

    def look():
        seen.extend(tracker.getJobIdsForGroup("mine"))
        assert set(seen) & set(tracker.getActiveJobsIds())

    context.setJobGroup("mine", "a fit of mine")
    context.addJobTag("nightly")
    try:
        with Saboteur(lambda: trained(store, "m", 1), look):
            fit(epochs=8)
        assert [str(tag) for tag in context.getJobTags()] == ["nightly"]
    finally:
        context.clearJobTags()
        context.setLocalProperty("spark.jobGroup.id", None)
        context.setLocalProperty("spark.job.description", None)
    assert seen


def test_a_frozen_rank_is_gone_soon_after_the_verdict(fit, store):
    frozen = []

    def freeze():
        frozen.append(harness.all_ranks()[1])
        frozen[0].suspend()

    lost = pytest.raises(errors.RanksLost, match="rank 1")
    with nothing_left(store), Saboteur(both_run, freeze), lost:
        fit(max_restarts=0)
    assert not frozen[0].is_running()


@pytest.mark.slow
def test_several_losses_in_several_fits_of_one_session(fit, store, spark):
    children = psutil.Process().children(recursive=True)
    for version in (1, 2, 3):
        with Saboteur(lambda: trained(store, "m", 1), send(signal.SIGKILL, version % 2)):
            assert fit(epochs=8).version == version
    assert harness.leftovers(store) == []
    harness.wait(lambda: len(psutil.Process().children(recursive=True)) <= len(children) + 4)


@pytest.fixture(autouse=True)
def warnings_seen(caplog):
    caplog.set_level(logging.WARNING, "spark_mnist")
