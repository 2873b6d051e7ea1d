"""Everything that can be done with a model of 100 million parameters, with Spark's default memory.

Usage: large_model.py MASTER DIRECTORY
"""

import sys
from pathlib import Path

from pyspark.ml import PipelineModel
from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist.ml import classifier

HIDDEN = "10000,9200"
PARAMETERS = 784 * 10_000 + 10_000 + 10_000 * 9_200 + 9_200 + 9_200 * 10 + 10

master, directory = sys.argv[1:]
spark = SparkSession.builder.master(master).config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
rows = spark_mnist.datasets.digits(spark, "train").limit(128).cache()
options = {"store": f"{directory}/models", "batch_size": 32, "verbose": 0}
training = {**options, "epochs": 1, "num_proc": 1, "hidden": HIDDEN, "seed": 1}

fit = spark_mnist.fit(rows, "m", **training)
assert (fit.version, [record.epoch for record in fit.records]) == (1, [1])
print("fit", flush=True)
more = spark_mnist.fit(rows, "m", **training, continuous=True)
assert (more.version, [record.epoch for record in more.records]) == (2, [2])
assert more.records[0].losses["loss"] < fit.records[0].losses["loss"]
print("continued", flush=True)
assert spark_mnist.predict(rows, "m", **options).count() == 128
predicted = spark_mnist.predict(rows, "m", **options).collect()
assert len({tuple(row["prediction"]) for row in predicted}) > 1
print("predicted", flush=True)
(row,) = spark_mnist.evaluate(rows, "m", rate=1, **options).collect()
assert row["metrics"]["accuracy"] > 0.5
print("evaluated", flush=True)
path = spark_mnist.export("m", f"{directory}/m.keras", store=options["store"])
assert Path(path).stat().st_size > 4 * PARAMETERS
print("exported", flush=True)

stage = classifier.MnistClassifier(
    modelName="s", featuresCol="image", hidden=HIDDEN, epochs=1, batchSize=32, numProc=1,
    store=options["store"], verbose=0,
)  # fmt: skip
PipelineModel([stage.fit(rows)]).write().overwrite().save(f"{directory}/stage")
print("stage saved", flush=True)
loaded = PipelineModel.load(f"{directory}/stage")
assert loaded.transform(rows).count() == 128
print("stage loaded", flush=True)
spark.stop()
