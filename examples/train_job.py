"""A job of your own: train on a table, write the predictions of another, print how good they are.

spark-submit --properties-file conf/spark-defaults.conf examples/train_job.py STORE OUTPUT
"""

import sys

from pyspark.sql import SparkSession

import spark_mnist

spark = SparkSession.builder.appName("train_job").getOrCreate()
store, output = sys.argv[1:]

train = spark_mnist.datasets.digits(spark, "train")  # or spark.read.parquet("..."): image, label
test = spark_mnist.datasets.digits(spark, "test")

result = spark_mnist.fit(train, "train_job", epochs=8, batch_size=16, store=store)
predictions = spark_mnist.predict(test, "train_job", interpret=True, store=store)
predictions.write.mode("overwrite").parquet(output)
right = spark.read.parquet(output).where("label = interpreted").count()
print(f"version {result.version}: {right} of {test.count()} digits are read as they were meant")
spark.stop()
