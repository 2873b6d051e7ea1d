"""MNIST for beginners: softmax regression, 1,000 steps of 100 rows.

    python examples/softmax_tutorial.py [mnist|digits]

The tutorial reports 0.9163 on MNIST's test rows.
"""

import sys

from pyspark.sql import SparkSession

import spark_mnist

STEPS, BATCH, RANKS = 1000, 100, 2
LEARNING_RATE = 0.5
TRAINING_ROWS = {"mnist": 50_000, "digits": 1_000}

data = sys.argv[1] if len(sys.argv) > 1 else "mnist"
spark = SparkSession.builder.appName("softmax_tutorial").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
read = getattr(spark_mnist.datasets, data)

# One step takes batch_size rows on each rank, and the learning rate is multiplied by the ranks:
# divided here, both are the tutorial's.
spark_mnist.fit(
    read(spark, "train").limit(TRAINING_ROWS[data]).cache(),  # a limit may take others each time
    "softmax_tutorial",
    network="softmax",
    optimizer="sgd",
    learning_rate=LEARNING_RATE / RANKS,
    batch_size=BATCH // RANKS,
    num_proc=RANKS,
    epochs=STEPS * BATCH // TRAINING_ROWS[data],
    train_validation_ratio=1.0,
)
evaluation = spark_mnist.evaluate(read(spark, "test"), "softmax_tutorial", rate=1, batch_size=1000)
print(f"test accuracy: {evaluation.first()['metrics']['accuracy']:.4f}")
