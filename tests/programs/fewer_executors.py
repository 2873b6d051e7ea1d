"""Take an executor away for good while a model is fitted: fewer_executors.py MIN_PROC."""

import json
import logging
import sys
import time

import keras
from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist.launch import launcher
from tests.faults import harness

logging.basicConfig(level="WARNING")
EARLY_EPOCHS = 8
launcher.SLOT_RECOVERY_S = 8.0  # Spark has the executor back in a second, or never
spark = (
    SparkSession.builder.master("local-cluster[3,1,1024]")
    .config("spark.ui.enabled", "false")
    .getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").orderBy("image").limit(256)
options = {"epochs": 30, "batch_size": 16, "num_proc": 3, "seed": 5, "verbose": 0}
options |= {"heartbeat_timeout": 8.0}


def slow():
    """Make an epoch long enough to be hit."""

    class Slow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            time.sleep(0.3)

    return [Slow()]


def take_away():
    """Spark asks for no other executor in place of one that it was told to end."""
    context = spark.sparkContext._jsc.sc()
    assert context.killExecutor(context.getExecutorIds().head())


for number in range(EARLY_EPOCHS):  # a version for each epoch on three ranks
    one = {**options, "epochs": 1, "continuous": number > 0}
    spark_mnist.fit(rows, "calm", store="models", **one)
result, error = None, ""
with harness.Saboteur(lambda: harness.trained("models", "m", 3), take_away):
    try:
        asked = {**options, "min_proc": int(sys.argv[1]), "callbacks": slow}
        result = spark_mnist.fit(rows, "m", store="models", **asked)
    except spark_mnist.errors.RanksLost as lost:
        error = str(lost)
harness.wait(lambda: not harness.ranks())
found = {"error": error, "left": harness.leftovers("models")}
if result:
    found["epochs"] = [record.epoch for record in result.records]
    found["losses"] = [record.losses["loss"] for record in result.records]
    found["read"] = [[r.rank, r.train, r.validation, r.epochs] for r in result.rows.by_rank]
    found["ranks"] = spark_mnist.describe("m", store="models").ranks
    early = result.rows.by_rank[0].epochs
    spark_mnist.rollback("calm", version=early, store="models")
    rest = {**options, "epochs": 30 - early, "num_proc": 2, "continuous": True}
    calm = spark_mnist.fit(rows, "calm", store="models", **rest)
    found["calm"] = [record.losses["loss"] for record in calm.records]
print(json.dumps(found))
spark.stop()
