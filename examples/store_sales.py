"""Sales of stores: categories as embeddings beside numbers, and a loss on the logarithm of sales.

    python examples/store_sales.py

The rows are made here: 40 stores, each day of two years. The model trains on all days but the last
six weeks, and is compared there with the mean of each store.
"""

import datetime

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import spark_mnist

STORES, DAYS, HELD_OUT_DAYS = 40, 730, 42
NUMBERS = ["promo", "distance"]
COLUMNS = (
    "store int, weekday int, month int, promo int, distance double, sales double, held_out boolean"
)


def make_rows(spark: SparkSession) -> DataFrame:
    """Make the sales: a level of each store times effects of weekday, month and promotion."""
    random = np.random.default_rng(0)
    level, promo_effect = random.normal(8.5, 0.4, STORES), random.uniform(0.1, 0.5, STORES)
    distance = random.lognormal(7, 1, STORES)  # metres to the nearest competitor
    by_weekday = np.array([0.2, 0.0, -0.05, -0.05, 0.1, 0.25, -0.6])
    by_month = np.array([-0.15, -0.1, 0, 0, 0.05, 0, 0, -0.05, 0, 0, 0.1, 0.35])
    rows = []
    for day in range(DAYS):
        date = datetime.date(2024, 1, 1) + datetime.timedelta(day)
        weekday, month = date.weekday(), date.month
        promo = day // 7 % 2 if weekday < 5 else 0  # every other week, Monday to Friday
        log_sales = level + 0.1 * np.log(distance / 1000) + promo * promo_effect
        log_sales += by_weekday[weekday] + by_month[month - 1] + random.normal(0, 0.1, STORES)
        rows += [
            (store, weekday, month, promo, float(distance[store]), float(np.exp(log_sales[store])),
             day >= DAYS - HELD_OUT_DAYS)
            for store in range(STORES)
        ]  # fmt: skip
    return spark.createDataFrame(rows, COLUMNS)


def log_error(sales, predicted):
    """Return the absolute error of the logarithm, which weighs small and large stores alike."""
    from keras import ops

    return ops.abs(ops.log(sales) - ops.log(predicted))


def rmspe():
    """Make the metric of the ranks: the root of the mean squared percentage error."""
    import keras

    class Rmspe(keras.metrics.Mean):
        def update_state(self, sales, predicted, sample_weight=None):
            return super().update_state(((sales - predicted) / sales) ** 2, sample_weight)

        def result(self):
            return keras.ops.sqrt(super().result())

    return Rmspe(name="rmspe")


spark = SparkSession.builder.appName("store_sales").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
rows = make_rows(spark).cache()
past, held_out = rows.where("NOT held_out"), rows.where("held_out")

# Several inputs are not standardized, so the network does it, with figures that Spark computes.
figures = past.select(
    *(F.mean(name) for name in NUMBERS),
    *(F.var_pop(name) for name in NUMBERS),
    F.mean(F.log("sales")),
).first()
means, variances, mean_log = list(figures[:2]), list(figures[2:4]), figures[4]


def network():
    """Make the model; runs on each rank."""
    import keras
    from keras import layers

    store, weekday, month = (
        keras.Input((1,), name=name, dtype="int32") for name in ("store", "weekday", "month")
    )
    numbers = keras.Input((len(NUMBERS),), name="numbers")
    x = layers.Concatenate()(
        [
            layers.Flatten()(layers.Embedding(STORES, 8)(store)),
            layers.Flatten()(layers.Embedding(7, 3)(weekday)),
            layers.Flatten()(layers.Embedding(13, 4)(month)),  # months are 1 to 12
            layers.Normalization(mean=means, variance=variances)(numbers),
        ]
    )
    x = layers.Dense(64, activation="relu")(x)
    x = layers.Dense(32, activation="relu")(x)
    # The exponential makes sales of logarithms; the bias starts at a usual day's.
    bias = keras.initializers.Constant(mean_log)
    sales = layers.Dense(1, activation="exponential", bias_initializer=bias)(x)
    return keras.Model([store, weekday, month, numbers], sales)


result = spark_mnist.fit(
    rows,
    "store_sales",
    features={"store": "store", "weekday": "weekday", "month": "month", "numbers": NUMBERS},
    label="sales",
    task="regression",
    network=network,
    loss=log_error,
    metrics=rmspe,
    validation_indicator="held_out",
    learning_rate=0.003,
    lr_schedule="cosine:8",
    batch_size=128,
    num_proc=2,
    epochs=8,
)
print(f"RMSPE by epoch: {[round(r.metrics['val_rmspe'], 3) for r in result.records]}")

# The same figure from the predictions, beside that of each store's mean.
by_store = past.groupBy("store").agg(F.mean("sales").alias("store_mean"))
predictions = spark_mnist.predict(held_out, "store_sales", batch_size=1000)
squares = [F.pow(1 - F.col(name) / F.col("sales"), 2) for name in ("prediction", "store_mean")]
errors = predictions.join(by_store, "store").select(*(F.sqrt(F.mean(s)) for s in squares)).first()
print(f"held-out RMSPE: {errors[0]:.4f}, mean by store: {errors[1]:.4f}")
evaluation = spark_mnist.evaluate(held_out, "store_sales", rate=1, batch_size=1000, loss=log_error)
metrics = evaluation.first()["metrics"]
print(f"held-out r2: {metrics['r2']:.4f}, mean error: {metrics['mae']:.0f}")
