# Databricks notebook source
# MAGIC %md
# MAGIC # Read handwritten digits with Spark, Petastorm, Horovod and Keras
# MAGIC
# MAGIC The cluster's own tasks train the model; the images never leave its DataFrames.
# MAGIC `spark` is the notebook's session.

# COMMAND ----------

import spark_mnist

train = spark_mnist.datasets.digits(spark, "train")  # columns: image (784 bytes), label
test = spark_mnist.datasets.digits(spark, "test")

# COMMAND ----------

# MAGIC %md
# MAGIC One rank for each slot of the session, busy or free. The rows that do not train validate after every epoch.

# COMMAND ----------

result = spark_mnist.fit(train, "quickstart", epochs=10, batch_size=32)
result.history.show(truncate=False)

# COMMAND ----------

predicted = spark_mnist.predict(test, "quickstart", interpret=True, batch_size=128)
predicted.select("label", "prediction", "interpreted").show(5, truncate=False)

# COMMAND ----------

spark_mnist.evaluate(test, "quickstart", repeat=2, rate=0.8, batch_size=128).show(truncate=False)

# COMMAND ----------

# MAGIC %md
# MAGIC New rows tomorrow? Training goes on where it stopped: weights, optimizer and epoch count.

# COMMAND ----------

more = spark_mnist.fit(train, "quickstart", epochs=2, continuous=True)
print([(model.name, model.version, model.num_epochs) for model in spark_mnist.models()])
