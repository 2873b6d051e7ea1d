"""Do harm to an executor while a model is fitted: harmed_executor.py HARM."""

import json
import logging
import sys

from pyspark.sql import SparkSession

import spark_mnist
from tests.faults import harness

logging.basicConfig(level="WARNING")
spark = (
    SparkSession.builder.master("local-cluster[2,1,1024]")
    .config("spark.ui.enabled", "false")
    .getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").orderBy("image").limit(256)
options = {"epochs": 40, "batch_size": 16, "num_proc": 2, "seed": 5, "verbose": 0}
options["heartbeat_timeout"] = 8.0


def ancestor(process, words):
    return next(p for p in process.parents() if words in " ".join(p.cmdline()))


def executor():
    return ancestor(harness.all_ranks()[1], "CoarseGrainedExecutorBackend")


def worker():
    return ancestor(harness.all_ranks()[1], "pyspark.daemon")


HARMS = {
    "kill the executor": lambda: executor().kill(),
    "kill its Python worker": lambda: worker().kill(),
    "kill the rank": lambda: harness.all_ranks()[1].kill(),
    "freeze the executor with all below": lambda: [p.suspend() for p in victims],
}
victims = []


def harm():
    victims.extend([executor(), *executor().children(recursive=True)])
    HARMS[sys.argv[1]]()


with harness.Saboteur(lambda: harness.trained("models", "m", 3), harm):
    result = spark_mnist.fit(rows, "m", store="models", **options)
again = spark_mnist.fit(rows, "m", store="models", continuous=True, **{**options, "epochs": 1})
for process in victims:
    if process.is_running():
        process.resume()
if "freeze" in sys.argv[1]:  # once it can, what was frozen ends by itself
    harness.wait(lambda: not any(process.is_running() for process in victims))
harness.wait(lambda: not harness.ranks())
print(
    json.dumps(
        {
            "epochs": [record.epoch for record in result.records],
            "loss": result.records[-1].losses["loss"],
            "again": again.records[0].epoch,
            "left": harness.leftovers("models"),
            "count": spark.range(3).count(),
        }
    )
)
spark.stop()
