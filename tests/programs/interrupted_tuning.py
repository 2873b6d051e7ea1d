"""Interrupt a CrossValidator: interrupted_tuning.py PARALLELISM shards|publish."""

import os
import signal
import sys
import threading
import time

from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist.data import shard_writer
from spark_mnist.fitting import pipeline
from spark_mnist.ml import MnistClassifier

builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").limit(200).cache()
classifier = MnistClassifier(modelName="cv", store="models", verbose=0, numProc=1, epochs=2)
grid = ParamGridBuilder().addGrid(classifier.learningRate, [0.01, 0.001, 0.1]).build()
evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
tuning = CrossValidator(
    estimator=classifier,
    estimatorParamMaps=grid,
    evaluator=evaluator,
    numFolds=2,
    parallelism=int(sys.argv[1]),
)
phase, done = sys.argv[2], threading.Event()


def strike():
    if not done.is_set():
        done.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)


target, name = {"shards": (shard_writer, "check_row_count"), "publish": (pipeline, "_publish")}[
    phase
]
real = getattr(target, name)


def struck(*words):
    if phase == "publish":
        result = real(*words)
        strike()
        return result
    strike()
    return real(*words)


setattr(target, name, struck)
try:
    tuning.fit(rows)
except KeyboardInterrupt:  # as in a notebook, whose process goes on
    print("interrupted", flush=True)
time.sleep(20)
print("versions", [model.version for model in spark_mnist.models("models")], flush=True)
os._exit(0)
