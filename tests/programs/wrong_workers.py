"""Tell what the verbs and doctor say of Python workers: wrong_workers.py STORE STORE."""

import json
import sys

from pyspark.sql import SparkSession

import spark_mnist

spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
df = spark.createDataFrame([([0.0] * 784, 1)] * 8, "image array<double>, label int")
found = []
for call in (
    lambda: spark_mnist.fit(df, "m", store=sys.argv[1], num_proc=2),
    lambda: spark_mnist.predict(df, "m", store=sys.argv[2]),
):
    try:
        call()
    except Exception as error:
        found.append([type(error).__name__, str(error)])
doctor = spark_mnist.preflight(df, store=sys.argv[1], num_proc=2)
print(json.dumps([found, [[check.name, check.ok, check.detail] for check in doctor.checks]]))
