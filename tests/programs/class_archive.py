"""Load the classes that a fit needs, for a JVM that archives its classes as it ends.

A JVM with such an archive starts in half of the time. ``SPARK_SUBMIT_OPTS`` names the file, with
``-XX:ArchiveClassesAtExit=FILE``.
"""

import tempfile

from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

import spark_mnist

spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
with tempfile.TemporaryDirectory() as directory:
    rows = spark_mnist.datasets.digits(spark, "test")
    spark_mnist.preflight(rows, store=directory, num_proc=1)
    order = F.row_number().over(Window.partitionBy("label").orderBy(F.xxhash64("image")))
    ordered = rows.withColumn("order", order).repartition(2, "label").sortWithinPartitions("order")
    ordered.write.parquet(f"{directory}/rows")
    spark.read.parquet(f"{directory}/rows").groupBy("label").count().collect()
    rows.select("label").write.csv(f"{directory}/table", header=True)
    spark.read.csv(f"{directory}/table", header=True, inferSchema=True).first()
gateway = spark.sparkContext._gateway
spark.stop()
gateway.shutdown()
gateway.proc.stdin.close()
gateway.proc.wait()  # for the archive
