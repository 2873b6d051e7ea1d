# Databricks notebook source
# MAGIC %md
# MAGIC # Train on the GPUs of a cluster
# MAGIC
# MAGIC One rank for each GPU. The cluster's settings, in `conf/spark-defaults-gpu.conf` or the cluster's page:
# MAGIC
# MAGIC | setting | value |
# MAGIC |---|---|
# MAGIC | `spark.task.resource.gpu.amount` | 1 |
# MAGIC | `spark.mnist.store` | a path that all hosts have, `dbfs:/models` or one below `/Volumes/` |
# MAGIC | `spark.dynamicAllocation.enabled` | false |
# MAGIC | `spark.speculation` | false |
# MAGIC
# MAGIC This notebook runs without a GPU, too: the ranks then train on cores.

# COMMAND ----------

import logging

import spark_mnist

logging.basicConfig(level="INFO", format="%(message)s")
logging.getLogger("py4j").setLevel("WARNING")

train = spark_mnist.datasets.digits(spark, "train")
gpus = "spark.task.resource.gpu.amount" in dict(spark.sparkContext.getConf().getAll())

# COMMAND ----------

# MAGIC %md
# MAGIC Could a fit start? The slots have their hosts, and their GPUs where Spark schedules them.

# COMMAND ----------

spark_mnist.preflight(train, batch_size=16)

# COMMAND ----------

# MAGIC %md
# MAGIC Half precision uses the tensor cores, and halves what the ranks send each other. Weights stay float32.
# MAGIC The first lines of the log say which rank has which GPU, the last where the time went.

# COMMAND ----------

result = spark_mnist.fit(
    train,
    "gpu_model",
    network="cnn",
    epochs=2,
    batch_size=32,
    warmup_epochs=1,
    precision="mixed_float16" if gpus else "float32",
    compression="fp16" if gpus else "none",
)
result

# COMMAND ----------

# MAGIC %md
# MAGIC A GPU wants large batches: where `allreduce` or `input` takes much of a step, the hint says what to raise.

# COMMAND ----------

print(result.timing.hint)
