"""Fit, continue and score on two executors."""

import sys

from pyspark.sql import SparkSession

import spark_mnist

spark = (
    SparkSession.builder.master("local-cluster[2,1,1024]")
    .config("spark.ui.enabled", "false")
    .config("spark.mnist.store", "models")
    .getOrCreate()
)
train = spark_mnist.datasets.digits(spark, "train")
test = spark_mnist.datasets.digits(spark, "test")
fit = spark_mnist.fit(train, "m", epochs=8)
again = spark_mnist.fit(train, "m", epochs=1, continuous=True)
right = spark_mnist.predict(test, "m", interpret=True).where("label = interpreted").count()
(row,) = spark_mnist.evaluate(test, "m", rate=1).collect()
assert row["metrics"]["accuracy"] == right / test.count() > 0.9, row


def network():
    import keras

    return keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten(), keras.layers.Dense(10)])


spark_mnist.fit(train, "own", epochs=1, network=network)
assert spark_mnist.predict(test, "own").count() == test.count()
assert "tensorflow" not in sys.modules  # the driver needs none, not even for a model of its own
executors = spark.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
print("executors", len(executors) - 1, "epochs", [e.epoch for e in again.records])
