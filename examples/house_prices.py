"""Regression on a table: a network of dense layers beside Spark ML's linear regression.

    python examples/house_prices.py [houses|diabetes]

``houses`` makes rows like California's census blocks: prices fall with the distance to two cities,
which a linear model cannot say. ``diabetes`` reads 442 real patients of scikit-learn, of whom a
linear model says nearly all that there is to say. Both models see the same rows.
"""

import sys

import numpy as np
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.regression import LinearRegression
from pyspark.sql import DataFrame, SparkSession

import spark_mnist


def houses(spark: SparkSession) -> DataFrame:
    """Make 4,000 blocks with the median price of a house, in dollars."""
    random = np.random.default_rng(0)
    longitude, latitude = random.uniform(-124, -114, 4000), random.uniform(32, 42, 4000)
    income, rooms = random.lognormal(1.2, 0.5, 4000), random.uniform(3, 9, 4000)
    age = random.uniform(1, 52, 4000)
    to_city = np.minimum(
        np.hypot(longitude + 118.2, latitude - 34.0), np.hypot(longitude + 122.4, latitude - 37.8)
    )
    price = 60_000 + 35_000 * income + 8_000 * rooms + 200_000 * np.exp(-to_city)
    price += random.normal(0, 30_000, 4000)
    columns = [array.tolist() for array in (longitude, latitude, income, rooms, age, price)]
    names = ["longitude", "latitude", "income", "rooms", "age", "label"]
    return spark.createDataFrame(list(zip(*columns, strict=True)), names)


def diabetes(spark: SparkSession) -> DataFrame:
    """Read the patients: ten measures, and how far the disease went in a year."""
    from sklearn import datasets

    patients = datasets.load_diabetes(scaled=False)
    rows = np.column_stack([patients.data, patients.target]).tolist()
    return spark.createDataFrame(rows, [*patients.feature_names, "label"])


data = sys.argv[1] if len(sys.argv) > 1 else "houses"
spark = SparkSession.builder.appName("house_prices").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
rows = {"houses": houses, "diabetes": diabetes}[data](spark)
train, test = (part.cache() for part in rows.randomSplit([0.8, 0.2], seed=0))
features = rows.columns[:-1]

# dnn scales features and label by itself, so neither needs preparation.
spark_mnist.fit(
    train,
    "house_prices",
    features=features,
    label="label",
    task="regression",
    network="dnn",
    hidden="32,16",
    learning_rate=0.003,
    batch_size=16,
    num_proc=2,
    epochs=20,
)
evaluation = spark_mnist.evaluate(test, "house_prices", rate=1, batch_size=1000).first()["metrics"]

assemble = VectorAssembler(inputCols=features, outputCol="vector").transform
linear = LinearRegression(featuresCol="vector").fit(assemble(train)).transform(assemble(test))
r2 = RegressionEvaluator(metricName="r2").evaluate(linear)
print(f"test r2: {evaluation['r2']:.4f}, of linear regression: {r2:.4f}")
print(f"mean error of the network: {evaluation['mae']:.1f}")
