"""The same call gives the same model, to the last bit, however many ranks there are."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import errors
from spark_mnist.cluster import signals
from spark_mnist.ranks import collectives
from spark_mnist.store import leases, model_store
from tests.conftest import PROGRAMS, arrays

QUIET = {"verbose": 0, "batch_size": 16}


@pytest.mark.ranks
@pytest.mark.parametrize("counts", [("3", "4"), pytest.param(("2", "8"), marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_model_again_and_frozen_layers_stay(tmp_path, counts):
    done = subprocess.run(
        [sys.executable, PROGRAMS / "many_ranks.py", str(tmp_path / "models"), *counts],
        cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == dict.fromkeys(counts, True)
    assert found["frozen"] == [True, True]
    assert not any(found["trained"][:1])


def normalised():
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(16, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(10, activation="softmax"),
        ]
    )


@pytest.mark.ranks
def test_one_step_of_two_ranks_is_one_of_one_rank_with_normalised_batches(digits, store):
    few = digits.limit(128).cache()
    options = {"network": normalised, "train_validation_ratio": 1, "epochs": 1, "optimizer": "sgd"}
    both = {**options, "num_proc": 2, "learning_rate": 0.1, "batch_size": 64}
    spark_mnist.fit(few, "synchronised", sync_batch_norm=True, store=store, **both, verbose=0)
    spark_mnist.fit(few, "apart", store=store, **both, verbose=0)
    alone = {**options, "num_proc": 1, "learning_rate": 0.2, "batch_size": 128}
    spark_mnist.fit(few, "alone", store=store, **alone, verbose=0)

    def distance(name):
        pairs = zip(arrays(store, name, 1), arrays(store, "alone", 1), strict=True)
        return max(np.abs(one - other).max() for one, other in pairs)

    assert distance("synchronised") < 1e-5
    assert distance("apart") > 1e-4


def test_how_far_the_loss_is_scaled_goes_on(digits, store):
    options = {**QUIET, "precision": "mixed_float16", "store": store}
    spark_mnist.fit(digits.limit(80), "m", epochs=1, **options)
    steps, scale = arrays(store, "m", 1, "loss_scale.npz")
    assert (steps, scale) == (4, 2**15)
    spark_mnist.fit(digits.limit(80), "m", epochs=2, continuous=True, **options)
    assert arrays(store, "m", 2, "loss_scale.npz")[0] == 12
    whole = {**QUIET, "store": store, "continuous": True, "epochs": 1}
    spark_mnist.fit(digits.limit(80), "m", **whole)  # another precision may follow
    assert "loss_scale.npz" not in model_store.Store(store).manifest("m", 3)["files"]


def test_a_statistic_that_is_no_number_is_not_published():
    model = normalised()
    assert collectives.finite(model)
    model.layers[1].moving_variance.assign(np.full(16, np.nan))
    assert not collectives.finite(model)


def test_a_model_that_the_store_did_not_take_is_published_later(digits, store, monkeypatch, caplog):
    options = {**QUIET, "epochs": 1, "store": store}
    spark_mnist.fit(digits, "m", **options)
    real = model_store.Store.publish

    def refuse(self, name, *rest):
        if name == "m":
            raise PermissionError("read-only")
        return real(self, name, *rest)

    monkeypatch.setattr(model_store.Store, "publish", refuse)
    with pytest.raises(errors.NotPublished, match=r"spark_mnist\.publish\('m', ") as caught:
        spark_mnist.fit(digits, "m", epochs=3, continuous=True, **{**QUIET, "store": store})
    monkeypatch.setattr(model_store.Store, "publish", real)
    work = Path(caught.value.work.removeprefix("file://"))
    gone = {**json.loads(leases.create()), "started": 0}
    (work / model_store.OWNER).write_text(json.dumps(gone))  # as the next process finds it
    assert spark_mnist.fit(digits, "m", **options).version == 2
    assert "holds a trained model that was not published" in caplog.text
    copy = work.with_name(".work-" + "1" * 32)
    shutil.copytree(work, copy)
    assert spark_mnist.publish("m", caught.value.work, store=store) == 3
    info = spark_mnist.describe("m", store=store)
    assert (info.version, info.num_epochs) == (3, 4)
    assert spark_mnist.predict(digits, "m", store=store).count() == 256
    assert spark_mnist.fit(digits, "m", **options).version == 4  # the copy is of a version
    assert not list((Path(store) / "m").glob(".work-*"))
    for gone in (caught.value.work, f"{store}/m", "nowhere://m/.work-" + "0" * 32):
        with pytest.raises(errors.ModelNotFound):
            spark_mnist.publish("m", gone, store=store)


def test_only_the_newest_versions_are_kept(digits, store):
    for version in (1, 2, 3):
        options = {**QUIET, "network": "softmax", "epochs": 1, "store": store}
        assert spark_mnist.fit(digits, "m", keep=2, **options).version == version
    assert model_store.Store(store).versions("m") == [2, 3]


def in_a_thread(function):
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    return found[0]


def test_an_interrupt_of_the_main_thread_ends_a_fit_in_another(digits, store, monkeypatch):
    """As under a CrossValidator: the main thread has gone, and no job was there to cancel."""
    real = model_store.Store.work

    def interrupted(self, name):
        monkeypatch.setattr(sys, "last_value", KeyboardInterrupt(), raising=False)
        return real(self, name)

    options = {**QUIET, "network": "softmax", "epochs": 1, "store": store}
    monkeypatch.setattr(sys, "last_value", KeyboardInterrupt(), raising=False)  # long ago
    assert in_a_thread(lambda: spark_mnist.fit(digits, "m", **options)).version == 1
    monkeypatch.setattr(model_store.Store, "work", interrupted)
    ended = in_a_thread(lambda: spark_mnist.fit(digits, "m", **options))
    assert isinstance(ended, errors.FitCancelled)
    assert model_store.Store(store).versions("m") == [1]
    signals.check()  # in the main thread an interrupt is raised where it comes


@pytest.mark.parametrize(
    ("convert", "hint"),
    [
        (lambda df: df.limit(3).toPandas(), r"use spark\.createDataFrame"),
        (lambda df: df.rdd, r"use \.toDF\(\)"),
        (lambda df: df.groupBy("label"), "aggregate it first"),
        (lambda df: "rows.parquet", "the DataFrame comes first, then the model's name"),
        (lambda df: None, "read or make one first"),
        (lambda df: df.collect()[:3], r"use spark\.createDataFrame"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "predict", "evaluate", "preflight"])
def test_what_is_no_dataframe_is_refused(digits, verb, convert, hint):
    df = convert(digits)
    if verb == "preflight" and df is None:
        return
    with pytest.raises(errors.NotADataFrame, match=hint):
        getattr(spark_mnist, verb)(df, "m")


def test_a_stream_is_refused_but_by_predict(spark, root, tmp_path):
    rows = spark_mnist.datasets.digits(spark, "test").limit(3)
    rows.write.parquet(str(tmp_path / "rows"))
    stream = spark.readStream.schema(rows.schema).parquet(str(tmp_path / "rows"))
    for verb in (spark_mnist.fit, spark_mnist.evaluate, spark_mnist.preflight):
        with pytest.raises(errors.NotADataFrame, match="is a stream, which has no end"):
            verb(stream, "m", store=root)
    assert spark_mnist.predict(stream, "m", store=root).isStreaming


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: [layers.Dense(10)(x), layers.Dense(1)(x)], "the network has 2 outputs"),
        (lambda x: {"a": layers.Dense(10)(x), "b": layers.Dense(10)(x)}, "has 2 outputs"),
    ],
)
def test_a_network_with_two_outputs_is_refused(digits, store, outputs, message):
    def network():
        inputs = keras.Input((784,))
        return keras.Model(inputs, outputs(inputs))

    with pytest.raises(errors.TrainingError, match=message):
        spark_mnist.fit(digits, "m", network=network, store=store, **QUIET)
    with pytest.raises(errors.ModelMismatch, match=message):
        spark_mnist.fit(digits, "m", network=network(), store=store, **QUIET)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model", "network"),
        ("lr", "learning_rate"),
        ("num_workers", "num_proc"),
        ("np", "num_proc"),
    ],
)
def test_what_others_call_an_option(digits, name, meant):
    with pytest.raises(errors.UnknownOption, match=f"did you mean '{meant}'"):
        spark_mnist.fit(digits, "m", **{name: 1})


def test_wide_rows_are_sent_to_python_a_few_at_a_time(spark, store):
    wide = spark.range(64).select(
        F.array_repeat(F.col("id").cast("float"), 40_000).alias("x"), (F.col("id") % 2).alias("y")
    )
    setting = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(setting)
    options = {"features": "x", "label": "y", "hidden": "2", "epochs": 1, "batch_size": 16}
    spark_mnist.fit(wide, "wide", store=store, verbose=0, **options)
    assert spark.conf.get(setting) == before
    try:
        predicted = spark_mnist.predict(wide, "wide", store=store)
        assert int(spark.conf.get(setting)) * 40_000 * 8 <= 128 << 20
        assert predicted.where("prediction IS NOT NULL").count() == 64
    finally:
        spark.conf.set(setting, before)


@pytest.mark.ranks
def test_a_session_that_was_stopped_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAMS / "stopped_session.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
