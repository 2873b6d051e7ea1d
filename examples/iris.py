"""Iris: four measures, three species, 10-20-10 hidden units, and two new flowers."""

from pyspark.sql import SparkSession

import spark_mnist

MEASURES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]

spark = SparkSession.builder.appName("iris").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
train = spark_mnist.datasets.iris(spark, "train")
test = spark_mnist.datasets.iris(spark, "test")

spark_mnist.fit(
    train,
    "iris",
    features=MEASURES,
    label="species",
    network="dnn",
    hidden="10,20,10",
    learning_rate=0.003,
    batch_size=16,
    num_proc=1,
    epochs=60,
    train_validation_ratio=1.0,
)
evaluation = spark_mnist.evaluate(test, "iris", rate=1).first()
print(f"test accuracy: {evaluation['metrics']['accuracy']:.4f}")

flowers = [(6.4, 3.2, 4.5, 1.5), (5.8, 3.1, 5.0, 1.7)]
new = spark.createDataFrame(flowers, MEASURES)
for row in spark_mnist.predict(new, "iris", interpret=True).collect():
    print(f"{list(row[:4])}: class {row['prediction'].index(1)}, {row['interpreted']}")
