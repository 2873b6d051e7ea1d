# Databricks notebook source
# MAGIC %md
# MAGIC # Go on with a saved model when new rows come
# MAGIC
# MAGIC A model is a row of versions. Each fit publishes one, whole or not at all, and none is ever changed.

# COMMAND ----------

import spark_mnist

# Widgets are Databricks'; elsewhere the values stand here.
if "dbutils" in globals():
    dbutils.widgets.text("model", "continuous")
    dbutils.widgets.text("epochs", "4")
    model, epochs = dbutils.widgets.get("model"), int(dbutils.widgets.get("epochs"))
else:
    model, epochs = "continuous", 4

rows = spark_mnist.datasets.digits(spark, "train")
monday, tuesday = rows.randomSplit([0.5, 0.5], seed=1)
test = spark_mnist.datasets.digits(spark, "test")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Monday: a new model

# COMMAND ----------

first = spark_mnist.fit(monday, model, epochs=epochs, batch_size=16)
first

# COMMAND ----------

# MAGIC %md
# MAGIC ## Tuesday: new rows
# MAGIC
# MAGIC `continuous=True` restores weights, the optimizer's state, the learning rate and the count of epochs. The network and
# MAGIC the columns are the saved model's; another number of ranks is fine.

# COMMAND ----------

second = spark_mnist.fit(tuesday, model, epochs=epochs, continuous=True, batch_size=16)
second

# COMMAND ----------

# MAGIC %md
# MAGIC ## Which version is better?

# COMMAND ----------

for version in (1, 2):
    (row,) = spark_mnist.evaluate(test, model, rate=1, version=version).collect()
    print(f"version {version}: accuracy {row['metrics']['accuracy']:.3f}, loss {row['losses']['loss']:.3f}")

# COMMAND ----------

# MAGIC %md
# MAGIC Was Monday's better after all? `rollback` publishes a copy of it as the newest; nothing is lost.

# COMMAND ----------

newest = spark_mnist.rollback(model, version=1)
spark_mnist.describe(model).parent, newest
