"""Horovod's KerasEstimator, in the environment that it needs: one figure on stdout.

    .venv-peers/bin/python benchmarks/estimator.py ARRAYS fit|transform

``fit`` prints the seconds of a whole fit of 5 epochs with two ranks, ``transform`` the rows/s of
its model on 2,000 rows. It wants labels one-hot, and knows nothing of this library.
"""

import os
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

import numpy as np
import tensorflow as tf
from horovod.spark.common.store import LocalStore
from horovod.spark.keras import KerasEstimator
from pyspark.sql import SparkSession


def frame(spark, path):
    """``features`` array<float> in 0..1, ``label`` array<float> one-hot."""
    with np.load(path) as saved:
        images, labels = saved["images"], saved["labels"]
    one_hot = np.eye(10, dtype="float32")
    rows = (
        ((image / np.float32(255)).tolist(), one_hot[label].tolist())
        for image, label in zip(images, labels, strict=True)
    )
    found = spark.createDataFrame(rows, "features array<float>, label array<float>")
    found.write.parquet(f"{os.path.dirname(path)}/estimator", mode="overwrite")
    return spark.read.parquet(f"{os.path.dirname(path)}/estimator")


def main(path, what):
    """Do it once and return the figure."""
    spark = SparkSession.builder.master("local[2]").getOrCreate()
    rows = frame(spark, path)
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
    fitted = estimator.fit(rows if what == "fit" else rows.limit(2000))
    if what == "fit":
        return time.perf_counter() - begun
    few = rows.limit(2000).repartition(2)
    fitted.transform(rows.limit(20).repartition(2)).collect()  # both workers start
    begun = time.perf_counter()
    fitted.transform(few).write.format("noop").mode("overwrite").save()
    return 2000 / (time.perf_counter() - begun)


if __name__ == "__main__":
    sys.stdout.write(f"{main(*sys.argv[1:])}\n")
