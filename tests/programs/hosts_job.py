"""Fit, continue and score on several hosts: hosts_job.py SHARED EPOCHS RANKS PAUSE MORE.

Each step takes PAUSE seconds longer; MORE are options of the fit, as JSON.
"""

import json
import logging
import os
import socket
import sys
import time
from pathlib import Path

from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist.launch import launcher

logging.basicConfig(stream=sys.stderr)
shared, epochs, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
pause, more = float(sys.argv[4]), json.loads(sys.argv[5])
if "min_proc" in more:
    launcher.SLOT_RECOVERY_S = 30.0  # the host does not come back
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
spark = SparkSession.builder.appName("hosts").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
train = spark_mnist.datasets.digits(spark, "train")
test = spark_mnist.datasets.digits(spark, "test")


def network():
    import keras

    place = (
        f"{os.environ['HOROVOD_RANK']} {socket.gethostname()} {os.environ['HOROVOD_LOCAL_RANK']}"
    )
    (shared / "ranks" / place).touch()
    layers = [keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((784,)), *layers])


def slow():
    """Make each step long enough for a rank to be hit between two checkpoints."""
    import keras

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(pause)

    return [Slow()]


options = {"num_proc": ranks, "batch_size": 32, "store": str(shared / "models"), "verbose": 0}
options |= {"heartbeat_timeout": 12.0, **({"callbacks": slow} if pause else {}), **more}
begun = time.monotonic()
fit = spark_mnist.fit(train, "m", network=network, epochs=epochs, **options)
seconds = time.monotonic() - begun
options["num_proc"] = spark_mnist.describe("m", store=options["store"]).ranks
again = spark_mnist.fit(train, "m", epochs=1, continuous=True, **options)
store = options["store"]
right = (
    spark_mnist.predict(test, "m", interpret=True, store=store).where("label = interpreted").count()
)
(row,) = spark_mnist.evaluate(test, "m", rate=1, store=store).collect()
print(
    json.dumps(
        {
            "losses": [record.losses for record in fit.records],
            "accuracy": row["metrics"]["accuracy"],
            "right": right / test.count(),
            "epochs": [record.epoch for record in again.records],
            "seconds": seconds,
            "ranks": options["num_proc"],
            "read": [[row.rank, row.train, row.epochs] for row in fit.rows.by_rank],
        }
    )
)
spark.stop()
