"""Call each verb with a session that was stopped."""

import pytest
from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist import errors

builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
spark = builder.getOrCreate()
rows = spark_mnist.datasets.digits(spark, "test")
spark.stop()
calls = [
    lambda: spark_mnist.fit(rows, "m"),
    lambda: spark_mnist.predict(rows, "m"),
    lambda: spark_mnist.evaluate(rows, "m"),
    lambda: spark_mnist.preflight(rows),
    lambda: spark_mnist.datasets.iris(spark),
    lambda: spark_mnist.command("eval m", rows),
]
for call in calls:
    with pytest.raises(errors.ClusterError, match="session was stopped"):
        call()
