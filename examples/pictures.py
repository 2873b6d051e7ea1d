"""Draw a saved model's curves, and the digits that it reads wrongly.

    python examples/pictures.py MODEL STORE DATA FOLDER

DATA is digits or mnist; FOLDER gets curves.png, mistakes.png and confusion.png.
"""

import sys
from pathlib import Path

from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist import plots

model, store, data, folder = sys.argv[1:]
spark = SparkSession.builder.appName("pictures").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
Path(folder).mkdir(parents=True, exist_ok=True)

first = spark_mnist.describe(model, version=1, store=store)
first.plot().savefig(f"{folder}/curves.png", dpi=80)

test = getattr(spark_mnist.datasets, data)(spark, "test")
predictions = spark_mnist.predict(test, model, store=store, batch_size=1000).cache()
plots.mistakes(predictions, count=10).savefig(f"{folder}/mistakes.png", dpi=80)
plots.confusion(predictions).savefig(f"{folder}/confusion.png", dpi=80)
