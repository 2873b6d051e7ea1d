"""Training for real: Spark tasks, Petastorm shards, Horovod ranks."""

import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import errors
from spark_mnist.data import shard_writer
from spark_mnist.launch import job, launcher
from tests.conftest import arrays, manifest
from tests.faults import harness

pytestmark = pytest.mark.ranks

QUIET = {"verbose": 0, "num_proc": 2, "batch_size": 16}


def assert_close(found, expected, atol):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A model of five epochs, and one of two that was continued for three."""
    root = str(tmp_path_factory.mktemp("models"))
    options = {**QUIET, "store": root, "seed": 3}
    whole = spark_mnist.fit(digits, "whole", epochs=5, **options)
    spark_mnist.fit(digits, "parts", epochs=2, **options)
    parts = spark_mnist.fit(digits, "parts", epochs=3, continuous=True, **{**options, "seed": None})
    return root, whole, parts


def test_the_table_of_the_manual(trained):
    _, whole, _ = trained
    assert whole.history.dtypes == [
        ("epoch", "int"),
        ("losses", "map<string,double>"),
        ("metrics", "map<string,double>"),
    ]
    rows = whole.history.collect()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(set(row["losses"]) == {"loss", "val_loss"} for row in rows)
    assert all(set(row["metrics"]) == {"accuracy", "val_accuracy"} for row in rows)
    assert rows[-1]["losses"]["loss"] < rows[0]["losses"]["loss"] / 2
    assert rows[-1]["metrics"]["val_accuracy"] > 0.7


def test_two_and_three_epochs_equal_five(trained):
    root, whole, parts = trained
    assert_close(arrays(root, "parts", 2), arrays(root, "whole", 1), atol=1e-6)
    slots = [
        arrays(root, name, version, "optimizer.npz")
        for name, version in (("parts", 2), ("whole", 1))
    ]
    assert_close(*slots, atol=1e-6)
    assert [record.epoch for record in parts.records] == [3, 4, 5]
    for mine, other in zip(parts.records, whole.records[2:], strict=True):
        assert mine.losses == pytest.approx(other.losses, abs=1e-6)


def test_a_fit_tells_where_its_time_went(trained):
    _, whole, _ = trained
    timing = whole.timing
    parts = [timing.prepare, timing.start, timing.train, timing.validate, timing.publish]
    assert all(seconds > 0 for seconds in parts)
    assert timing.rows_per_second == pytest.approx(5 * 205 / timing.train)
    assert 0 < timing.input_share < 1
    assert 0 < timing.allreduce_share < 1
    assert timing.memory > 100 << 20


def test_rows_that_do_not_fit_in_memory_are_streamed(digits, store):
    options = {**QUIET, "store": store, "epochs": 5, "seed": 3}
    result = spark_mnist.fit(digits, "m", cache="none", **options)
    assert [(r.rank, r.train, r.validation, r.epochs) for r in result.rows.by_rank] == [
        (0, 103, 26, 5),
        (1, 102, 25, 5),
    ]
    assert result.records[-1].metrics["val_accuracy"] > 0.7


def test_the_manifest_tells_how_the_model_came_to_be(trained):
    root, _, _ = trained
    found = manifest(root, "parts", 2)
    assert (found["parent"], found["epochs"], found["ranks"], found["seed"]) == (1, 5, 2, 3)
    assert found["rows"] == {
        "given": 256,
        "dropped": {},
        "train": 205,
        "validation": 51,
        "read": [
            {"rank": 0, "train": 103, "validation": 26, "epochs": 3},
            {"rank": 1, "train": 102, "validation": 25, "epochs": 3},
        ],
    }
    assert found["optimizer"] == {
        "name": "adam",
        "learning_rate": 0.001,
        "warmup_epochs": 0,
        "schedule": "constant",
        "clipnorm": None,
        "accumulate_steps": 1,
    }
    assert found["libraries"]["horovod"] == "0.28.1"
    logs = [file for file in found["files"] if file.startswith("logs/")]
    assert sorted(file.split("/")[1] for file in logs) == ["train", "validation"]
    assert set(found["files"]) - set(logs) == {"weights.npz", "optimizer.npz"}


def test_models_lists_the_newest_versions(trained):
    root, whole, _ = trained
    listed = spark_mnist.models(root)
    assert [(m.name, m.version, m.num_epochs) for m in listed] == [("parts", 2, 5), ("whole", 1, 5)]
    assert listed[1].metrics == whole.records[-1].metrics
    assert listed[0].created > listed[1].created


@pytest.mark.slow
def test_the_learning_rate_is_the_same_after_three_resumes(digits, store):
    few = digits.limit(40)
    options = {**QUIET, "store": store, "epochs": 1, "network": "softmax"}
    spark_mnist.fit(few, "m", optimizer="momentum", learning_rate=0.01, **options)
    for _ in range(3):
        spark_mnist.fit(few, "m", continuous=True, **options)
    found = [manifest(store, "m", version) for version in (1, 2, 3, 4)]
    assert [m["optimizer"]["learning_rate"] for m in found] == [0.01] * 4
    assert [m["epochs"] for m in found] == [1, 2, 3, 4]
    assert [m["parent"] for m in found] == [None, 1, 2, 3]


@pytest.mark.parametrize(("rows", "batch_size"), [(128, 64), (101, 64)])
def test_one_step_of_two_ranks_equals_one_of_one_rank_on_the_joined_batch(
    digits, store, rows, batch_size
):
    few = digits.limit(rows)
    options = {
        "store": store,
        "epochs": 1,
        "train_validation_ratio": 1,
        "optimizer": "sgd",
        "verbose": 0,
    }
    two = spark_mnist.fit(
        few, "two", num_proc=2, batch_size=batch_size, learning_rate=0.05, **options
    )
    one = spark_mnist.fit(
        few, "one", num_proc=1, batch_size=2 * batch_size, learning_rate=0.1, **options
    )
    assert_close(arrays(store, "two", 1), arrays(store, "one", 1), atol=1e-6)
    assert two.records[0].losses == pytest.approx(one.records[0].losses, abs=1e-6)
    assert two.records[0].metrics == one.records[0].metrics
    assert set(two.records[0].losses) == {"loss"}  # no validation with a ratio of 1


def test_rows_sorted_by_label_train_as_well_as_shuffled(digits, store):
    options = {**QUIET, "store": store, "epochs": 2}
    in_order = spark_mnist.fit(digits.orderBy("label"), "sorted", **options)
    mixed = spark_mnist.fit(digits.orderBy(F.rand(1)), "mixed", **options)
    assert in_order.records == mixed.records


def test_nothing_is_left_and_the_session_works_on(spark, digits, store):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    cached = len(spark.sparkContext._jsc.getPersistentRDDs())
    result = spark_mnist.fit(digits.limit(50), "m", store=store, epochs=1, **QUIET)
    assert result.version == 1
    entries = sorted(path.name for path in Path(store).glob("m/*/*"))
    assert entries == [".claim", "logs", "manifest.json", "optimizer.npz", "weights.npz"]
    assert sorted(path.name for path in Path(store).glob("m/*")) == ["v000001"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert threading.active_count() <= threads + 2  # Horovod's job thread may still be ending
    assert len(spark.sparkContext._jsc.getPersistentRDDs()) == cached
    assert spark.conf.get(shard_writer.CACHE_DIR, None) is None
    assert spark.range(3).count() == 3


def test_a_fit_in_another_thread(digits, store):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            spark_mnist.fit(digits.limit(50), "m", store=store, epochs=1, **QUIET)
        )
    )
    thread.start()
    thread.join()
    assert found[0].version == 1


def test_progress_goes_to_stderr_line_by_line(digits, store, capfd):
    options = {**QUIET, "verbose": 1}
    spark_mnist.fit(digits.limit(60), "m", store=store, epochs=2, **options)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "val_accuracy" in lines[0]
    assert out == ""


def test_verbose_0_is_silent(digits, store, capfd, caplog):
    with caplog.at_level(logging.INFO, "spark_mnist"):
        spark_mnist.fit(digits.limit(60), "m", store=store, epochs=1, **QUIET)
    out, err = capfd.readouterr()
    assert (out, [line for line in err.splitlines() if "epoch" in line], caplog.text) == (
        "",
        [],
        "",
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, errors.OptionError, "epochs must be int >= 1, not 0"),
        ({"epoch": 3}, errors.UnknownOption, "did you mean 'epochs'"),
        ({"num_proc": 3}, errors.TooFewSlots, "3 ranks must run .* Spark has 2 slots"),
        ({"continuous": True}, errors.ModelNotFound, "no model 'm' .* none yet"),
        ({"train_validation_ratio": 0.0}, errors.TooFewRows, "leave 0 to train"),
    ],
)
def test_what_cannot_work_is_refused_before_a_rank_starts(
    digits, store, monkeypatch, options, error, message
):
    monkeypatch.setattr(launcher, "train", lambda *_, **__: pytest.fail("ranks were started"))
    with pytest.raises(error, match=message):
        spark_mnist.fit(digits, "m", **{**QUIET, "store": store, **options})
    assert not list(Path(store).glob("*"))


@pytest.mark.parametrize(("option", "value"), [("network", "softmax"), ("optimizer", "sgd")])
def test_continuing_as_something_else_is_refused_with_both_values(trained, digits, option, value):
    saved = {"network": "mlp", "optimizer": "adam"}[option]
    with pytest.raises(errors.ModelMismatch, match=f"{option}={saved}, .*with {option}={value}"):
        spark_mnist.fit(
            digits, "whole", store=trained[0], continuous=True, **QUIET, **{option: value}
        )


def test_continuing_with_another_number_of_ranks_scales_the_rate_by_these(digits, store, tmp_path):
    few = digits.limit(128)
    options = {"store": store, "epochs": 1, "verbose": 0, "train_validation_ratio": 1}
    one = {"num_proc": 1, "batch_size": 128}
    spark_mnist.fit(few, "m", optimizer="sgd", learning_rate=0.1, **one, **options)
    copy = str(shutil.copytree(store, tmp_path / "copy"))
    options["continuous"] = True
    two = spark_mnist.fit(few, "m", num_proc=2, batch_size=64, **options)
    assert two.records[0].epoch == 2
    assert manifest(store, "m", 2)["ranks"] == 2
    assert manifest(store, "m", 2)["optimizer"]["learning_rate"] == 0.1
    spark_mnist.fit(few, "m", **one, **{**options, "store": copy, "learning_rate": 0.2})
    assert_close(arrays(store, "m", 2), arrays(copy, "m", 2), atol=1e-6)


def test_the_rank_that_failed_is_named(digits, store):
    def broken():
        if os.environ["HOROVOD_RANK"] == "1":
            raise LookupError("no such units")
        import keras

        return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])

    with pytest.raises(
        errors.RankError, match="rank 1 of 2 raised LookupError: no such units"
    ) as caught:
        spark_mnist.fit(digits.limit(50), "m", store=store, network=broken, **QUIET)
    assert caught.value.rank == 1
    assert "in broken" in caught.value.rank_traceback
    assert not list(Path(store).glob("*"))


def test_what_ended_sparks_job_of_the_ranks_is_told(digits, store, monkeypatch):
    def broken(_):
        def task(*_):
            raise ModuleNotFoundError("No module named 'something'")

        return task

    monkeypatch.setattr(job, "_task", broken)
    message = r"(?s)the ranks did not start \(.*ModuleNotFoundError: No module named 'something'"
    with pytest.raises(errors.RanksLost, match=message):
        spark_mnist.fit(digits, "m", store=store, max_restarts=0, **QUIET)
    assert spark_mnist.models(store) == []


def test_no_server_of_horovods_is_left(digits, store):
    before = set(threading.enumerate())
    spark_mnist.fit(digits.limit(64), "m", epochs=1, num_proc=1, store=store, verbose=0)
    harness.wait(
        lambda: not any("serve_forever" in t.name for t in {*threading.enumerate()} - before)
    )
