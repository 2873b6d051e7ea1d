"""Peers that need older packages, in their own environment: one figure on stdout.

    PYTHONPATH=benchmarks .venv-peers/bin/python benchmarks/peers.py ARRAYS fit|transform|databricks

``fit`` prints the seconds of a whole KerasEstimator.fit of 5 epochs with two ranks, ``transform``
the rows/s of its model on 2,000 rows, ``databricks`` the rows/s of two ranks in the notebooks' way.
"""

import os
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

import databricks
import numpy as np
import pyarrow as pa
import tensorflow as tf
from horovod.spark.common.store import LocalStore
from horovod.spark.keras import KerasEstimator
from pyarrow import parquet
from pyspark.sql import SparkSession


def frame(spark, path, label, width):
    """``features`` array<float> in 0..1, and the label as an array, or of width 0 as a number."""
    with np.load(path) as saved:
        images, labels = saved["images"] / np.float32(255), saved["labels"]
    columns = {
        "features": _lists(images),
        label: _lists(np.eye(width, dtype="float32")[labels]) if width else pa.array(labels),
    }
    target = f"{os.path.dirname(path)}/{label}.parquet"
    parquet.write_table(pa.table(columns), target, row_group_size=10_000)
    return spark.read.parquet(target)


def _lists(values):
    offsets = np.arange(0, values.size + 1, values.shape[1], "int32")
    return pa.ListArray.from_arrays(offsets, values.ravel())


def in_the_notebooks_way(spark, path):
    """Rows/s of two ranks."""
    rows = frame(spark, path, "number", 0).withColumnsRenamed(
        {"features": "image", "number": "label"}
    )
    converter = databricks.converted(rows, tempfile.mkdtemp(dir=os.path.dirname(path)))
    return databricks.throughput(
        converter, ranks=2, batch=128, epochs=5, compiled=databricks.horovods
    )


def by_estimator(spark, path, what):
    """Seconds of a whole fit, or rows/s of its model's transform."""
    rows = frame(spark, path, "label", 10)
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((784,)),
            tf.keras.layers.Dense(128, activation="relu"),
            tf.keras.layers.Dense(32, activation="relu"),
            tf.keras.layers.Dense(10, activation="softmax"),
        ]
    )
    estimator = KerasEstimator(
        num_proc=2,
        store=LocalStore(tempfile.mkdtemp(dir=os.path.dirname(path))),
        model=model,
        optimizer=tf.keras.optimizers.Adam(0.001),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
        feature_cols=["features"],
        label_cols=["label"],
        batch_size=128,
        epochs=5 if what == "fit" else 1,
        verbose=0,
    )
    begun = time.perf_counter()
    few = rows.limit(2000).repartition(4)
    fitted = estimator.fit(rows if what == "fit" else few)
    if what == "fit":
        return time.perf_counter() - begun
    fitted.transform(rows.limit(20).repartition(2)).collect()  # both workers start
    begun = time.perf_counter()
    fitted.transform(few).write.format("noop").mode("overwrite").save()
    return 2000 / (time.perf_counter() - begun)


def main(path, what):
    """Do it once and return the figure."""
    builder = SparkSession.builder.master("local[2]").config("spark.driver.memory", "4g")
    spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    if what == "databricks":
        return in_the_notebooks_way(spark, path)
    return by_estimator(spark, path, what)


if __name__ == "__main__":
    sys.stdout.write(f"{main(*sys.argv[1:])}\n")
