# Databricks notebook source
# MAGIC %md
# MAGIC # Train a Keras model of your own
# MAGIC
# MAGIC A function makes the model, on the ranks: this notebook's driver needs neither TensorFlow nor a GPU for it.

# COMMAND ----------

import spark_mnist

train = spark_mnist.datasets.digits(spark, "train")
test = spark_mnist.datasets.digits(spark, "test")


def network():
    import keras

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 5, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10),  # logits: the softmax is added
        ]
    )

# COMMAND ----------

# MAGIC %md
# MAGIC Stop when the rows that validate are read no better for three epochs, and keep the best.

# COMMAND ----------

result = spark_mnist.fit(train, "own_model", network=network, epochs=12, patience=3, batch_size=16)
result.plot()

# COMMAND ----------

# MAGIC %md
# MAGIC Where did the time go?

# COMMAND ----------

print(result.timing)

# COMMAND ----------

# MAGIC %md
# MAGIC ## What is read wrongly?

# COMMAND ----------

predictions = spark_mnist.predict(test, "own_model", batch_size=256).persist()
spark_mnist.plots.mistakes(predictions, count=5)

# COMMAND ----------

spark_mnist.plots.confusion(predictions)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Take it elsewhere
# MAGIC
# MAGIC The store holds arrays and Keras's configuration. `export` makes a file of them, which Keras loads without this library.

# COMMAND ----------

spark_mnist.export("own_model", "own_model.keras")

import keras

keras.models.load_model("own_model.keras").summary()
