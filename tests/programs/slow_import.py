"""Fit once with two ranks and a short heartbeat."""

import logging

from pyspark.sql import SparkSession

import spark_mnist

logging.basicConfig(level="WARNING")
builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").limit(64)
result = spark_mnist.fit(
    rows, "m", epochs=1, num_proc=2, batch_size=16, heartbeat_timeout=4, max_restarts=0, verbose=0
)
print("start", result.timing.start)
