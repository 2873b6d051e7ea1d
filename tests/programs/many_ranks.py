"""Fit the same model twice with each of several numbers of ranks: many_ranks.py STORE COUNT..."""

import json
import sys

import keras
import numpy as np
from pyspark.sql import SparkSession

import spark_mnist
from tests.conftest import arrays

counts = [int(word) for word in sys.argv[2:]]
builder = SparkSession.builder.master(f"local[{max(counts)}]").config("spark.ui.enabled", "false")
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
digits = spark_mnist.datasets.digits(spark, "train").limit(256).cache()
options = {"verbose": 0, "batch_size": 8, "epochs": 1, "store": sys.argv[1]}
same = {}
for ranks in counts:
    for name in ("one", "other"):  # three buckets of gradients
        spark_mnist.fit(digits, f"{name}-{ranks}", hidden="1024,512", num_proc=ranks, **options)
    pairs = zip(
        *(arrays(sys.argv[1], f"{name}-{ranks}", 1) for name in ("one", "other")), strict=True
    )
    same[ranks] = all(np.array_equal(one, other) for one, other in pairs)
model = keras.Sequential(
    [
        keras.Input((784,)),
        keras.layers.Dense(64, trainable=False),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
spark_mnist.fit(digits, "frozen", network=model, num_proc=3, **options)
found = arrays(sys.argv[1], "frozen", 1)
before = model.get_weights()
frozen = [any(np.array_equal(weight, other) for other in found) for weight in before[:2]]
trained = [any(np.array_equal(weight, other) for other in found) for weight in before[-2:]]
print(json.dumps({"same": same, "frozen": frozen, "trained": trained}))
