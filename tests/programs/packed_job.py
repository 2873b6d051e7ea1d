"""Fit and predict in a packed environment: packed_job.py STORE."""

import sys

from pyspark.sql import SparkSession

import spark_mnist


def network():
    import sys

    import keras

    assert "/environment/" in sys.executable
    assert "spark_mnist.zip" in spark_mnist.__file__
    return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])


spark = SparkSession.builder.getOrCreate()
digits = spark_mnist.datasets.digits(spark, "train")
spark_mnist.fit(digits, "m", network=network, epochs=2, num_proc=2, store=sys.argv[1])
print("predicted", spark_mnist.predict(digits, "m", store=sys.argv[1]).count())
