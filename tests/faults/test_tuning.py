"""Ctrl-C while a CrossValidator fits in threads of a pool."""

import subprocess
import sys

import pytest

TUNE = """
import os, signal, sys, threading, time
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import SparkSession
import spark_mnist
from spark_mnist.ml import MnistClassifier

builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").limit(200).cache()
classifier = MnistClassifier(modelName="cv", store="models", verbose=0, numProc=1, epochs=2)
grid = ParamGridBuilder().addGrid(classifier.learningRate, [0.01, 0.001, 0.1]).build()
evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
tuning = CrossValidator(
    estimator=classifier, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2,
    parallelism=int(sys.argv[1]),
)
phase, done = sys.argv[2], threading.Event()

def strike():
    if not done.is_set():
        done.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

from spark_mnist import fitting, shards
target, name = {"shards": (shards, "check_enough"), "publish": (fitting, "_publish")}[phase]
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
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["1", "2"])
@pytest.mark.parametrize(("phase", "versions"), [("shards", "[]"), ("publish", "[1]")])
def test_no_fit_goes_on_when_its_cross_validator_was_interrupted(
    tmp_path, parallelism, phase, versions
):
    done = subprocess.run(
        [sys.executable, "-c", TUNE, parallelism, phase], cwd=tmp_path,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["interrupted", f"versions {versions}"], done.stderr
