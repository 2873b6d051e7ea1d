"""TensorFlow Mechanics 101: two ReLU layers, 2,000 steps of 100 rows, then precision @ 1.

    python examples/mechanics_101.py [mnist|digits]

The tutorial ends near 0.90 on MNIST's test rows, as this does: 2,000 small steps are few.
"""

import sys

from pyspark.sql import DataFrame, SparkSession

import spark_mnist

STEPS, BATCH, RANKS = 2000, 100, 2
LEARNING_RATE = 0.01
TRAINING_ROWS = {"mnist": 50_000, "digits": 1_000}


def show_precision(title: str, rows: DataFrame) -> None:
    """Print one evaluation in the tutorial's words."""
    evaluation = spark_mnist.evaluate(rows, "mechanics_101", rate=1, batch_size=1000, details=True)
    row = evaluation.first()
    print(
        f"{title} Data Eval:\n  Num examples: {row['num_examples']}  "
        f"Num correct: {row['num_correct']}  Precision @ 1: {row['precision_at_1']:0.04f}"
    )


data = sys.argv[1] if len(sys.argv) > 1 else "mnist"
spark = SparkSession.builder.appName("mechanics_101").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
read = getattr(spark_mnist.datasets, data)
rows, test = read(spark, "train").cache(), read(spark, "test").cache()
training = rows.limit(TRAINING_ROWS[data]).cache()
validation = rows.exceptAll(training).cache()

# One step takes batch_size rows on each rank, and the learning rate is multiplied by the ranks:
# divided here, both are the tutorial's.
spark_mnist.fit(
    training,
    "mechanics_101",
    network="mlp",
    hidden="128,32",
    optimizer="sgd",
    learning_rate=LEARNING_RATE / RANKS,
    batch_size=BATCH // RANKS,
    num_proc=RANKS,
    epochs=STEPS * BATCH // TRAINING_ROWS[data],
    train_validation_ratio=1.0,
)
show_precision("Training", training)
show_precision("Validation", validation)
show_precision("Test", test)
