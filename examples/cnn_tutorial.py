"""Deep MNIST for experts: two convolutions with pooling, 1,024 units, dropout.

    python examples/cnn_tutorial.py [mnist|digits]

The tutorial reports about 0.992 on MNIST's test rows after 20,000 steps of 50; a learning rate
that falls along a cosine needs fewer.
"""

import sys

from pyspark.sql import SparkSession

import spark_mnist

data = sys.argv[1] if len(sys.argv) > 1 else "mnist"
spark = SparkSession.builder.appName("cnn_tutorial").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
read = getattr(spark_mnist.datasets, data)

spark_mnist.fit(
    read(spark, "train"),
    "cnn_tutorial",
    network="cnn",
    dropout=0.5,
    optimizer="adam",
    lr_schedule="cosine:5",
    batch_size=25,
    num_proc=2,
    epochs=5,
    train_validation_ratio=0.9,
)
evaluation = spark_mnist.evaluate(read(spark, "test"), "cnn_tutorial", rate=1, batch_size=500)
print(f"test accuracy: {evaluation.first()['metrics']['accuracy']:.4f}")
